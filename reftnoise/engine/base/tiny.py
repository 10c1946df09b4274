"""The embedded tiny model: a small chat Llama that the package ships, with its demo data.

`examples/make_tiny_model.py` made it, weights and text.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...config.base_model import EMBEDDED

NAME = EMBEDDED
DIRECTORY = Path(__file__).parent / NAME
Split: TypeAlias = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class TinyExample:
    """A question, its answer in words, and its answer in emoji."""

    prompt: str
    words: str
    completion: str


def load_tiny_model() -> tuple[Any, Any]:
    """The embedded model, fp32 and in evaluation mode, and its tokenizer, padding on the left.

    It answers simple questions in words; asked to, it answers in emoji.
    """
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, padding_side="left")
    return model.eval(), tokenizer


def load_tiny_examples(split: Split) -> list[TinyExample]:
    """The demo's questions; none of either split is in the text that the model was made from."""
    lines = (DIRECTORY / "emoji.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    names = TinyExample.__dataclass_fields__
    return [TinyExample(**{n: row[n] for n in names}) for row in rows if row["split"] == split]
