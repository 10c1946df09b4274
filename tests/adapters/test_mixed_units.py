"""Adapters of all kinds of units in one batch: each row gets what its adapter alone gives."""

from typing import Any

import pytest
import torch

import reftnoise as rn
from reftnoise.adapters.frozen import FrozenAdapter
from reftnoise.interventions import VectorIntervention
from support.adapters import wrapped
from support.models.architectures import tiny_model
from support.tolerance import assert_close

KINDS: list[dict[str, Any]] = [
    {"layer": "all", "intervention": "loreft", "low_rank_dimension": 3, "positions": "f1+l1"},
    {"layer": "all", "component": "mlp_output", "intervention": "red"},
    {"layer": [0, 2], "component": "mlp_output", "intervention": "bias"},
    {"layer": 1, "intervention": "addition"},
    {"intervention": "ablate"},
    {"layer": "all", "intervention": "red", "positions": "l2"},
    {"layer": 1, "intervention": "noreft", "low_rank_dimension": 2, "positions": "all+decode"},
]
COUNT = 64


@pytest.fixture(scope="module")
def own() -> dict[str, rn.ReftModel]:
    """Each adapter as the units of a model."""
    models = {}
    for number in range(COUNT):
        kind = KINDS[number % len(KINDS)]
        models[str(number)] = wrapped([kind], tiny_model().eval(), seed=number)
        for unit in models[str(number)].interventions.values():
            if isinstance(unit, VectorIntervention):
                unit.vector.normal_()
    return models


@pytest.fixture(scope="module")
def together(own: dict[str, rn.ReftModel]) -> rn.ReftModel:
    model = rn.get_reft_model(tiny_model().eval())
    for name, single in own.items():
        model.adapters.put(name, FrozenAdapter.of(single.engine.units))
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, 100, (COUNT, 7))
    mask = (torch.arange(7) >= torch.randint(0, 4, (COUNT, 1))).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def test_a_row_of_each_is_as_alone(
    own: dict[str, rn.ReftModel], together: rn.ReftModel, batch: Any
) -> None:
    scales = [1.0 if row < COUNT // 2 else -0.7 for row in range(COUNT)]
    rows = [{name: scale} for name, scale in zip(own, scales, strict=True)]
    logits = together(**batch, adapter_names=rows).logits
    for row, (name, single) in enumerate(own.items()):
        with single.using(scale=scales[row]):
            alone = single(**{key: value[row : row + 1] for key, value in batch.items()}).logits[0]
        attended = batch["attention_mask"][row].bool()
        difference = (logits[row] - alone)[attended].abs().max() / alone.abs().max()
        assert difference <= 1e-5, (name, KINDS[row % len(KINDS)])


def test_generated_tokens_are_as_alone(
    own: dict[str, rn.ReftModel], together: rn.ReftModel, batch: Any
) -> None:
    names = list(own)[: len(KINDS)]
    rows = {key: value[: len(names)] for key, value in batch.items()}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    found = together.generate(**rows, adapter_names=names, **settings)
    for row, name in enumerate(names):
        inputs = {key: value[row : row + 1] for key, value in rows.items()}
        alone = own[name].generate(**inputs, **settings)
        assert torch.equal(found.sequences[row], alone.sequences[0]), name
        assert_close(torch.stack(found.logits)[:, row], torch.stack(alone.logits)[:, 0])
