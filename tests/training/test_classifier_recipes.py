"""GLUE's recipe on a tiny RoBERTa: the head is trained, and the best epoch is kept."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    set_seed,
)

import reftnoise as rn
from reftnoise.cli.main import main
from reftnoise.inference.loading import load_library

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "glue.yaml"
ADJECTIVES = {
    1: ["witty", "moving", "fresh", "clever", "warm", "superb", "funny", "bold", "tender"],
    0: ["dull", "clumsy", "stale", "tedious", "cold", "awful", "bland", "lazy", "flat"],
}


def reviews(seed: int, rows: int = 192) -> list[dict[str, Any]]:
    """Rows in the form of SST-2."""
    draw = random.Random(seed)
    made = []
    for _ in range(rows):
        label = draw.randrange(2)
        noun = draw.choice(["film", "plot", "cast", "script", "ending", "music", "dialogue"])
        opening = draw.choice(["i thought that the", "in short , the", "they say its", "the"])
        first, second = draw.sample(ADJECTIVES[label], 2)
        made.append({"sentence": f"{opening} {noun} is {first} and {second} .", "label": label})
    return made


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    """A random RoBERTa whose tokenizer knows the reviews' words."""
    special: list[Any] = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learned = ByteLevelBPETokenizer()
    texts = (row["sentence"] for row in reviews(0))
    learned.train_from_iterator(texts, 2000, special_tokens=special, show_progress=False)
    learned.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ["bos_token", "pad_token", "eos_token", "unk_token", "mask_token"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, **dict(zip(names, special, strict=True))
    )
    set_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=260,
        initializer_range=0.2,  # so that a random model tells tokens apart
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_papers_flow_on_made_up_reviews(
    roberta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = (write(tmp_path / f"{n}.jsonl", reviews(n)) for n in (0, 1))
    options = {
        "model": roberta,
        "data.train": train,
        "data.eval": held_out,
        "data.eval_split": "validation[:50%]",
        "data.subset": "null",
        "evaluation.data": held_out,
        "evaluation.subset": "null",
        "training.num_train_epochs": 8,
        "training.learning_rate": 6e-3,
        "output_dir": tmp_path / "run",
        "device": "cpu",
    }
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    assert main(["train", str(RECIPE), *given, "--quiet"]) == 0
    [entry] = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert entry["split"] == "validation[50%:]"
    assert entry["rows"] == 96
    assert entry["scores"]["accuracy"] > 0.65
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    selected = [line["eval_accuracy"] for line in log if "eval_accuracy" in line]
    assert len(selected) == 8

    capsys.readouterr()
    for command in (
        ["generate", str(tmp_path / "run"), "--prompt", "a"],
        ["chat", str(tmp_path / "run")],
    ):
        assert main(command) == 2
        assert capsys.readouterr().err == (
            f"reftnoise: {tmp_path / 'run'}: the run is a classifier, which writes no text; "
            f"to score it, run 'reftnoise eval {tmp_path / 'run'}'\n"
        )
    with pytest.raises(ValueError, match="the run is a classifier, which writes no text"):
        load_library({"run": tmp_path / "run"})

    base = AutoModelForSequenceClassification.from_pretrained(roberta)
    adapted = rn.ReftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(roberta)
    first = reviews(1)[:96]
    batch = tokenizer([row["sentence"] for row in first], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = adapted(**batch).logits.argmax(1)
    right = (predicted == torch.tensor([row["label"] for row in first])).float().mean()
    assert float(right) == pytest.approx(max(selected))  # the epoch that was best there is kept
