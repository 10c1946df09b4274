"""Adapters by name on one base: routed, mixed and scaled rows against each row alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from torch import Tensor

import reftnoise as rn

ENTRIES: dict[str, Any] = {
    "last": [{"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}],
    "ends": [
        {
            "layer": [0, 2],
            "intervention": "loreft",
            "low_rank_dimension": 4,
            "positions": "f2+l3",
            "tied": False,
            "act_fn": "gelu",
        }
    ],
    "everywhere": [
        {"layer": 1, "intervention": "noreft", "low_rank_dimension": 3, "positions": "all+decode"},
        {"component": "embeddings", "intervention": "lobireft", "low_rank_dimension": 1},
        {"component": "embeddings", "intervention": "neftune", "alpha": 5.0},
    ],
    "houlsby": [
        {
            "layer": "all",
            "component": "mlp_output",
            "intervention": "adapter",
            "low_rank_dimension": 5,
        },
        {"layer": 2, "component": "attention_output", "intervention": "bias"},
    ],
    "direft": [
        {"layer": 0, "intervention": "direft", "low_rank_dimension": 2, "act_fn": "relu"},
        {"layer": 1, "intervention": "nodireft", "low_rank_dimension": 2, "positions": [0, 2]},
        {"layer": 2, "intervention": "consreft", "low_rank_dimension": 2, "positions": "f1"},
    ],
}
NAMES = ["last", None, "ends", "everywhere", "houlsby", "direft", None, "last"]


def wrapped(entries: Any, base: Any, seed: int) -> rn.ReftModel:
    """A model whose units are far from the identity."""
    torch.manual_seed(seed)
    reft_model = rn.get_reft_model(base, rn.ReftConfig(entries)).eval()
    with torch.no_grad():
        for name, parameter in reft_model.interventions.named_parameters():
            if "rotate_layer" not in name:
                parameter.normal_(std=0.5)
    return reft_model


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, entries) in enumerate(ENTRIES.items()):
        wrapped(entries, tiny_model(), seed).save_pretrained(folder / name)
    return {name: folder / name for name in ENTRIES}


@pytest.fixture
def reft_model(directories: dict[str, Path]) -> rn.ReftModel:
    model = rn.get_reft_model(tiny_model().eval())
    for name, directory in directories.items():
        model.load_adapter(directory, name)
    return model


def prompts(rows: int, side: str = "left") -> dict[str, Tensor]:
    """Rows of different lengths."""
    torch.manual_seed(5)
    ids = torch.randint(3, 90, (rows, 9))
    mask = torch.ones_like(ids)
    for row in range(rows):
        padding = slice(0, row % 5) if side == "left" else slice(9 - row % 5, 9)
        mask[row, padding] = 0
        ids[row, padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def alone(name: str | None, directories: dict[str, Path]) -> Any:
    base = tiny_model().eval()
    return base if name is None else rn.ReftModel.from_pretrained(base, directories[name])


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_is_what_its_adapter_makes_of_it(
    reft_model: rn.ReftModel, directories: dict[str, Path], side: str
) -> None:
    batch = prompts(len(NAMES), side)
    with torch.no_grad():
        logits = reft_model(**batch, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            kept = batch["attention_mask"][row].bool()
            ids = batch["input_ids"][row][kept][None]
            expected = alone(name, directories)(input_ids=ids).logits[0]
            torch.testing.assert_close(logits[row][kept], expected, rtol=0, atol=1e-5)


def test_generated_tokens_are_those_of_each_row_alone(
    reft_model: rn.ReftModel, directories: dict[str, Path]
) -> None:
    batch = prompts(len(NAMES))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = reft_model.generate(**batch, adapter_names=NAMES, **settings)
    for row, name in enumerate(NAMES):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        mask = torch.ones_like(ids)
        expected = alone(name, directories).generate(input_ids=ids, attention_mask=mask, **settings)
        assert tokens[row, 9:].tolist() == expected[0, ids.shape[1] :].tolist()
