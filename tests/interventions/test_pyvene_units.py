"""Interventions of pyvene that are not ours, as units."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pyvene as pv
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import reftnoise as rn
from reftnoise.interventions import LowRankRotateLayer, register_intervention
from support.models.pyreft_units import INPUTS, WIDTH, at, base, signature, wrapped
from support.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("restored_registry")

LAST = at([[5], [5]])


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


class Half(pv.SourcelessIntervention, pv.TrainableIntervention):
    """It has a state of its own, as pyreft's LoReFT has."""

    def __init__(self, scale: float = 1.0, **fields: Any) -> None:
        super().__init__(**fields, keep_last_dim=True)
        self.rotate_layer = orthogonal(LowRankRotateLayer(self.embed_dim, 2))
        self.scale = scale

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return base - self.rotate_layer(base) @ self.rotate_layer.weight.T

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"rotate_layer": self.rotate_layer.weight.data}


class Two(Own):
    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.parts = nn.ModuleList(Half(**fields) for _ in range(2))

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return self.parts[0](base) + self.parts[1](base) - base

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"{n}_{k}": t for n, p in enumerate(self.parts) for k, t in p.state_dict().items()}


@pytest.mark.parametrize("cls", [Own, Half, Two])
def test_its_weights_are_saved_under_the_name_of_its_class(cls: Any, tmp_path: Path) -> None:
    reft_model = wrapped((1,), lambda _: cls(embed_dim=WIDTH))
    expected = called(reft_model)
    reft_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "reft_config.json").read_text())
    assert config["representations"][0]["intervention"] == cls.__name__
    loaded = rn.ReftModel.from_pretrained(base(), tmp_path).eval()
    assert called(loaded) == expected


def test_what_no_file_can_say_is_left_out_with_a_warning(tmp_path: Path) -> None:
    class Asking(Own):
        def __init__(self, number: int, table: Tensor | None = None, **fields: Any) -> None:
            super().__init__(**fields)
            self.table = torch.ones(2) if table is None else table

    reft_model = wrapped((1,), lambda _: Asking(number=3, embed_dim=WIDTH))
    message = "number, table of Asking: no file can say it.* Its weights are saved without it"
    with pytest.warns(UserWarning, match=message):
        reft_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Asking needs 'number'"):
        rn.ReftModel.from_pretrained(base(), tmp_path)


def test_its_latents_can_be_read() -> None:
    reft_model = wrapped((1, 2), lambda _: Latent(embed_dim=WIDTH))
    assert reft_model.full_intervention_outputs == []
    reft_model(**INPUTS)
    latents = [output.latent for output in reft_model.full_intervention_outputs]
    assert [latent.shape for latent in latents] == [(2, 1), (2, 1)]
    with ThreadPoolExecutor(1) as other:  # which has run no pass
        assert other.submit(lambda: reft_model.full_intervention_outputs).result() == []
    copy.deepcopy(reft_model)


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
