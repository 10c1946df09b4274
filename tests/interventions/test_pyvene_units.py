"""Interventions of pyvene that are not ours, as units."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pyvene as pv
import torch
from torch import Tensor, nn

import reftnoise as rn
from reftnoise.interventions import INTERVENTIONS, register_intervention
from support.models.pyreft_units import INPUTS, WIDTH, at, base, signature, wrapped
from support.tolerance import assert_close

LAST = at([[5], [5]])


@pytest.fixture(autouse=True)
def _restored_registry() -> Iterator[None]:
    before = dict(INTERVENTIONS)
    yield
    INTERVENTIONS.clear()
    INTERVENTIONS.update(before)


class Own(
    pv.SourcelessIntervention, pv.TrainableIntervention, pv.DistributedRepresentationIntervention
):
    """h + b."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields, keep_last_dim=True)
        self.b = nn.Parameter(torch.ones(int(self.embed_dim)))

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return base + self.b


class Flat(Own):
    """It reads the states of all positions as one vector."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.keep_last_dim = False

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        assert base.dim() == 2
        return base + self.b.repeat(base.shape[1] // len(self.b))


class Latent(Own):
    """It says more than states, and reads a mapping of subspaces."""

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Any:
        self.seen = subspaces
        return pv.InterventionOutput(output=base + self.b, latent=base.mean(-1))


@torch.no_grad()
def called(reft_model: rn.ReftModel, **options: Any) -> list[float]:
    return signature(reft_model(**INPUTS, unit_locations=LAST, **options))


@pytest.mark.parametrize("cls", [Own, Flat, Latent])
def test_it_edits_as_in_pyreft(cls: Any) -> None:
    unit = cls(embed_dim=WIDTH)
    reft_model = wrapped((1,), lambda _: unit)
    expected = [0.041, 0.0044, 0.106, 0.055, -0.0282, -0.0469]
    expected += [0.041, 0.0088, -0.152, 0.0882, 0.097, -0.0456]
    assert called(reft_model) == expected
    assert list(reft_model.interventions.values()) == [unit]
    assert isinstance(unit, cls)
    assert type(unit).__name__ == cls.__name__
    assert called(copy.deepcopy(reft_model)) == expected


def test_it_is_trained() -> None:
    reft_model = wrapped((1,), lambda _: Own(embed_dim=WIDTH)).train()
    names = [name for name, p in reft_model.named_parameters() if p.requires_grad]
    assert names == ["interventions.layer_1_comp_block_output_unit_pos_nunit_1#0.b"]
    reft_model(**INPUTS, labels=INPUTS["input_ids"], unit_locations=at([[2], [2]])).loss.backward()
    (unit,) = reft_model.interventions.values()
    assert unit.b.grad.abs().max() > 0


def test_it_gets_subspaces_as_they_are() -> None:
    unit: Any = Latent(embed_dim=WIDTH)
    reft_model = wrapped((1,), lambda _: unit)
    subspaces = {"input_subspaces": [0, 1], "output_subspaces": [2, 3]}
    called(reft_model, subspaces=[subspaces])
    assert unit.seen == subspaces


def test_it_may_write_into_its_states() -> None:
    class Zeroing(Own):
        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
            base[..., :] = 0.0
            return base

    reft_model = wrapped((1,), lambda _: Zeroing(embed_dim=WIDTH))
    expected = [0.041, 0.0044, 0.106, 0.055, -0.0282, -0.0628]
    expected += [0.041, 0.0088, -0.152, 0.0882, 0.097, 0.0436]
    assert called(reft_model) == expected


def test_a_class_with_a_name_is_saved_and_loaded(tmp_path: Path) -> None:
    assert register_intervention("own")(Own) is Own
    reft_model = wrapped((1,), lambda _: Own(embed_dim=WIDTH))
    with torch.no_grad():
        next(iter(reft_model.interventions.values())).b.normal_()
    expected = called(reft_model)
    reft_model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(base(), tmp_path).eval()
    assert called(loaded) == expected
    assert isinstance(next(iter(loaded.interventions.values())), Own)
    loaded.load_adapter(tmp_path, "again")
    with torch.no_grad():
        rows = loaded(**INPUTS, adapter_names=["again", None]).logits
        assert_close(rows, torch.stack([loaded(**INPUTS).logits[0], base()(**INPUTS).logits[1]]))

    by_type = {"layer": 1, "component": "block_output", "intervention_type": Own}
    (unit,) = rn.get_reft_model(base(), rn.ReftConfig(by_type)).interventions.values()
    assert isinstance(unit, Own)


def test_a_class_without_a_name_is_not_saved(tmp_path: Path) -> None:
    reft_model = wrapped((1,), lambda _: Own(embed_dim=WIDTH))
    with pytest.raises(ValueError, match=r"Own is not registered.*@register_intervention"):
        reft_model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (pv.VanillaIntervention(embed_dim=WIDTH), "VanillaIntervention reads a source"),
        (pv.CollectIntervention(embed_dim=WIDTH), "expected an intervention that edits"),
        (Own(embed_dim=8), "embed_dim 8: the hidden states at 'block_output' have width 32"),
    ],
)
def test_an_intervention_that_cannot_be_a_unit(unit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped((1,), lambda _: unit)
