"""Rows of several lengths, padded to one batch, and what a model writes after each."""

from typing import Any

import torch
from torch import Tensor

import reftnoise as rn
from support.models.architectures import PAD

LENGTHS = [12, 3, 7]


def wrapped(model: Any, positions: Any = "f2+l3", **entry: Any) -> rn.ReftModel:
    """A model with LoReFT, the same at every call."""
    torch.manual_seed(1)
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    config = rn.ReftConfig(representations=loreft | {"positions": positions} | entry)
    return rn.get_reft_model(model, config)


def rows(pad: int = PAD) -> list[Tensor]:
    torch.manual_seed(2)
    made = [torch.randint(3, 101, (length,)) for length in LENGTHS]
    made[0][3] = pad  # a padding id within a prompt is a token like any other
    return made


def padded(side: str, pad: int = PAD) -> dict[str, Tensor]:
    width = max(LENGTHS)
    ids = torch.full((len(LENGTHS), width), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows(pad)):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, columns], mask[index, columns] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    tokens = model.generate(
        **batch, max_new_tokens=8, do_sample=False, eos_token_id=None, **settings
    )
    return tokens[:, batch["input_ids"].shape[1] :]


def reference(model: rn.ReftModel, row: Tensor) -> Tensor:
    """Greedy decoding by whole forward passes, without generate, cache or padding."""
    ids = row[None]
    for _ in range(8):
        logits = model(input_ids=ids, prompt_lengths=torch.tensor([len(row)])).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(row) :]
