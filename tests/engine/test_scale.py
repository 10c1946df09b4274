"""`ReftModel.scale`: every edit is h + s·edit(h), in evaluation and generation."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from support.adapters import moved
from support.models.architectures import tiny_model
from support.tolerance import assert_close

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
BIAS = {"layer": "all", "component": "mlp_output", "intervention": "bias", "positions": "all"}
ADAPTER = {"layer": 1, "intervention": "adapter", "low_rank_dimension": 3, "positions": "f2"}
UNITS = {
    "loreft at the last token": [LOREFT],
    "loreft at both ends": [LOREFT | {"positions": "f1+l2", "tied": False}],
    "loreft everywhere, also while decoding": [LOREFT | {"positions": "all+decode"}],
    "loreft, bias and adapter": [LOREFT | {"positions": "l1"}, BIAS, ADAPTER],
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def wrapped(entries: Any) -> rn.ReftModel:
    reft_model = rn.get_reft_model(tiny_model(), rn.ReftConfig(entries)).eval()
    return moved(reft_model)


def columns(positions: str) -> list[int]:
    """The prompt's edited columns."""
    return {
        "all": list(range(8)),
        "all+decode": list(range(8)),
        "l1": [7],
        "l2": [6, 7],
        "f1": [0],
        "f2": [0, 1],
    }[positions]


def by_hand(reft_model: rn.ReftModel, scale: float) -> Tensor:
    """The bare base with h + s·edit(h) written out as hooks, in the order of the units."""
    handles = []
    for one in reft_model.engine.units:
        at, unit = columns(one.positions.spec()), one.unit

        def edit(_: Any, __: Any, output: Any, at: Any = at, unit: Any = unit) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            hidden[:, at] += scale * unit.edit(hidden[:, at])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(one.site.module.register_forward_hook(edit))
    try:
        return reft_model.model(IDS).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("entries", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("scale", [0.5, 1.0, -1.0, 3])
@torch.no_grad()
def test_edits_are_multiplied(entries: Any, scale: float) -> None:
    reft_model = wrapped(entries)
    reft_model.scale = scale
    expected = by_hand(reft_model, scale)
    assert_close(reft_model(IDS).logits, expected)
    assert not torch.allclose(by_hand(reft_model, 0.0), expected, atol=1e-3)


@pytest.mark.parametrize("entries", UNITS.values(), ids=UNITS)
@torch.no_grad()
def test_scale_0_is_the_base_and_1_changes_no_bit(entries: Any) -> None:
    reft_model = wrapped(entries)
    fresh = reft_model(IDS).logits
    reft_model.scale = 0
    assert torch.equal(reft_model(IDS).logits, reft_model.model(IDS).logits)
    reft_model.scale = 1
    assert torch.equal(reft_model(IDS).logits, fresh)


@torch.no_grad()
def test_scale_0_is_the_base_also_where_an_edit_is_not_a_number() -> None:
    reft_model = wrapped([BIAS])
    for parameter in reft_model.interventions.parameters():
        parameter.fill_(math.nan)
    reft_model.scale = 0.0
    assert torch.equal(reft_model(IDS).logits, reft_model.model(IDS).logits)


@pytest.mark.parametrize("entries", UNITS.values(), ids=UNITS)
@torch.no_grad()
def test_generation_with_a_cache_equals_whole_passes(entries: Any) -> None:
    reft_model = wrapped(entries)
    reft_model.scale = 0.5
    tokens = IDS
    for _ in range(5):
        lengths = torch.tensor([IDS.shape[1]])
        logits = reft_model(tokens, prompt_lengths=lengths).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    generated = reft_model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, tokens)
    reft_model.scale = 0.0
    with reft_model.disabled():
        bare = reft_model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(
        reft_model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None), bare
    )


@torch.no_grad()
def test_a_low_precision_base_gets_the_scaled_edit_rounded_once() -> None:
    reft_model = wrapped([BIAS | {"component": "block_output", "layer": 2}])
    reft_model.model.to(torch.bfloat16)
    seen: dict[str, Tensor] = {}
    site = reft_model.engine.units[0].site.module

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, out: seen.update({name: out[0] if isinstance(out, tuple) else out})

    with site.register_forward_hook(keep("edited")):
        reft_model.scale = 0.3
        reft_model(IDS)
    with site.register_forward_hook(keep("plain")):
        reft_model.model(IDS)
    (bias,) = reft_model.interventions.parameters()
    assert torch.equal(seen["edited"], seen["plain"] + (0.3 * bias).to(torch.bfloat16))


def test_noise_is_not_scaled_and_training_takes_1_alone() -> None:
    reft_model = wrapped([LOREFT, {"intervention": "neftune"}]).train()
    reft_model.scale = 0.5
    with pytest.raises(ValueError, match=r"^scale 0\.5: edits are trained as they are"):
        reft_model(IDS, labels=IDS)
    reft_model.scale = 1.0
    assert reft_model(IDS, labels=IDS).loss.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True])
def test_what_is_no_scale(value: Any) -> None:
    reft_model = wrapped([LOREFT])
    with pytest.raises(ValueError, match=r"^scale .*: expected a finite number"):
        reft_model.scale = value
    assert reft_model.scale == 1.0


@torch.no_grad()
def test_a_copy_keeps_it_and_a_saved_adapter_does_not(tmp_path: Path) -> None:
    reft_model = wrapped([LOREFT])
    reft_model.scale = 0.25
    copied = copy.deepcopy(reft_model)
    assert copied.scale == 0.25
    assert torch.equal(copied(IDS).logits, reft_model(IDS).logits)
    reft_model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.scale == 1.0
    reft_model.scale = 1.0
    assert torch.equal(loaded(IDS).logits, reft_model(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("gate", [None, {"type": "norm"}])
@pytest.mark.parametrize("name", ["bias", "addition"])
def test_vectors_are_saved_times_the_scale(name: str, gate: Any, tmp_path: Path) -> None:
    entry = {"layer": [0, 2], "intervention": name} | ({} if gate is None else {"gate": gate})
    reft_model = wrapped([entry, {"intervention": "neftune"}])
    for placed in reft_model.engine.units[:2]:
        unit: Any = placed.unit
        (unit.bias if name == "bias" else unit.vector).normal_()
    reft_model.scale = -0.75
    reft_model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.scale == 1.0
    assert_close(loaded(IDS).logits, reft_model(IDS).logits)


@pytest.mark.parametrize("name", ["red", "ablate", "reftr1"])
def test_a_scale_that_has_no_place_is_said_not_to_be_saved(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reft_model = wrapped([{"layer": 0, "intervention": "bias"}, {"layer": 1, "intervention": name}])
    reft_model.scale = 2.0
    reft_model.save_pretrained(tmp_path)
    unit = type(reft_model.engine.units[1].unit).__name__
    assert f"scale 2.0 is not saved, but 1: {unit} has no place for it" in caplog.text
