"""The ReFT family against its formulas, and inside pyvene."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import pyvene
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import reftnoise as rn
from reftnoise.interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
    ReftIntervention,
)

WIDTH, RANK = 32, 4
POSITIONS = [1, 4]

Parameters = dict[str, Tensor]
Formula = Callable[[Tensor, Parameters, Callable[[Tensor], Tensor]], Tensor]


def rotation(p: Parameters) -> Tensor:
    """R = L⁻¹X with XXᵀ = LLᵀ."""
    raw = p["rotate_layer.weight"]
    return torch.linalg.solve_triangular(torch.linalg.cholesky(raw @ raw.T), raw, upper=False)


def source(h: Tensor, p: Parameters) -> Tensor:
    return h @ p["learned_source.weight"].T + p["learned_source.bias"]


def loreft(h: Tensor, p: Parameters, act: Callable[[Tensor], Tensor]) -> Tensor:
    return h + (act(source(h, p)) - h @ rotation(p).T) @ rotation(p)


def noreft(h: Tensor, p: Parameters, act: Callable[[Tensor], Tensor]) -> Tensor:
    projected = h @ p["proj_layer.weight"].T + p.get("proj_layer.bias", 0.0)
    return h + (act(source(h, p)) - projected) @ p["proj_layer.weight"]


def direft(h: Tensor, p: Parameters, act: Callable[[Tensor], Tensor]) -> Tensor:
    return h + act(source(h, p)) @ rotation(p)


def nodireft(h: Tensor, p: Parameters, act: Callable[[Tensor], Tensor]) -> Tensor:
    return h + act(source(h, p)) @ p["proj_layer.weight"]


def consreft(h: Tensor, p: Parameters, _: Callable[[Tensor], Tensor]) -> Tensor:
    return h + (p["learned_source"] - h @ rotation(p).T) @ rotation(p)


def lobireft(h: Tensor, p: Parameters, _: Callable[[Tensor], Tensor]) -> Tensor:
    return h + p["learned_source"] @ rotation(p)


FORMULAS: dict[type[ReftIntervention], Formula] = {
    LoreftIntervention: loreft,
    NoreftIntervention: noreft,
    DireftIntervention: direft,
    NodireftIntervention: nodireft,
    ConsreftIntervention: consreft,
    LobireftIntervention: lobireft,
}
CONSTANT = (ConsreftIntervention, LobireftIntervention)
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "tanh": torch.tanh,
    "silu": F.silu,
}
every_class = pytest.mark.parametrize("cls", FORMULAS, ids=lambda cls: cls.__name__)
VARIANTS = [
    *[pytest.param(cls, {}, id=cls.__name__) for cls in FORMULAS],
    *[
        pytest.param(cls, {"act_fn": name}, id=f"{cls.__name__}-{name}")
        for cls in FORMULAS
        for name in ("tanh", "silu")
        if cls not in CONSTANT
    ],
    pytest.param(NoreftIntervention, {"add_bias": True}, id="NoreftIntervention-bias"),
    pytest.param(
        NoreftIntervention, {"add_bias": True, "act_fn": "silu"}, id="NoreftIntervention-bias-silu"
    ),
]


def build(cls: type[ReftIntervention], **arguments: Any) -> ReftIntervention:
    """A unit whose parameters are all random, so that none is hidden by a special value."""
    unit = cls(embed_dim=WIDTH, low_rank_dimension=RANK, **arguments)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.normal_(std=0.5)
    return unit


def reference(unit: ReftIntervention, hidden: Tensor) -> tuple[Tensor, Tensor, Parameters]:
    """The formula in float64: output, leaf hidden states, leaf parameters."""
    exact = {n: p.detach().double().requires_grad_() for n, p in unit.named_parameters()}
    leaf = hidden.detach().double().requires_grad_()
    return FORMULAS[type(unit)](leaf, exact, ACTIVATIONS[unit.act_fn_name]), leaf, exact


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Equal up to `relative` times the largest expected value."""
    bound = relative * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


# -- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize(("cls", "arguments"), VARIANTS)
def test_forward_is_the_formula(
    cls: type[ReftIntervention], arguments: dict[str, Any], dtype: str, tolerance: float
) -> None:
    unit = build(cls, dtype=dtype, **arguments)
    hidden = torch.randn(3, 5, WIDTH, dtype=getattr(torch, dtype))
    assert_near(unit(hidden), reference(unit, hidden)[0], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize(("cls", "arguments"), VARIANTS)
def test_gradients_are_those_of_the_formula(
    cls: type[ReftIntervention], arguments: dict[str, Any], dtype: str, tolerance: float
) -> None:
    unit = build(cls, dtype=dtype, **arguments)
    hidden = torch.randn(3, 5, WIDTH, dtype=getattr(torch, dtype), requires_grad=True)
    direction = torch.randn_like(hidden)
    (unit(hidden) * direction).sum().backward()
    output, leaf, exact = reference(unit, hidden)
    (output * direction.double()).sum().backward()
    assert_near(hidden.grad, leaf.grad, tolerance)
    for name, parameter in unit.named_parameters():
        assert_near(parameter.grad, exact[name].grad, tolerance)


@every_class
def test_evaluation_mode_gives_the_same_edit(cls: type[ReftIntervention]) -> None:
    unit = build(cls, dropout=0.5).eval()
    hidden = torch.randn(2, 3, WIDTH)
    expected = reference(unit, hidden)[0]
    assert_near(unit(hidden), expected, 1e-6)
    with torch.inference_mode():
        assert_near(unit(hidden), expected, 1e-6)


# -- parameters and dtypes -----------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "layers", "total"), [(8, 32, 2_097_408), (4, 8, 262_176)])
@pytest.mark.parametrize(
    "cls", [LoreftIntervention, NoreftIntervention, DireftIntervention, NodireftIntervention]
)
def test_published_parameter_counts_of_a_7b_model(
    cls: type[ReftIntervention], rank: int, layers: int, total: int
) -> None:
    with torch.device("meta"):
        unit = cls(embed_dim=4096, low_rank_dimension=rank)
    assert layers * sum(p.numel() for p in unit.parameters()) == total


@pytest.mark.parametrize("cls", CONSTANT)
def test_constant_sources_have_rank_times_width_plus_rank_parameters(
    cls: type[ReftIntervention],
) -> None:
    count = sum(p.numel() for p in build(cls).parameters())
    assert count == RANK * WIDTH + RANK


@pytest.mark.parametrize(("tied", "sets"), [(True, 1), (False, 2)])
def test_a_model_counts_layers_times_sets_of_weights(
    tiny_llama: LlamaForCausalLM, tied: bool, sets: int
) -> None:
    entry = {"intervention": "loreft", "layer": "all", "positions": "f2+l2", "tied": tied}
    config = rn.ReftConfig(representations=entry | {"low_rank_dimension": RANK})
    units, base, _ = rn.get_reft_model(tiny_llama, config).parameter_counts()
    assert units == 3 * sets * (2 * RANK * WIDTH + RANK)
    assert base == 0


@every_class
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_edited_in_fp32(
    cls: type[ReftIntervention], base_dtype: torch.dtype
) -> None:
    unit = build(cls)
    hidden = torch.randn(2, 3, WIDTH).to(base_dtype)
    output = unit(hidden)
    assert {p.dtype for p in unit.parameters()} == {torch.float32}
    assert output.dtype == base_dtype
    assert unit.delta(hidden).dtype == torch.float32
    # Nothing but the last rounding, of at most half a unit in the last place, is 16-bit.
    rounding = 0.51 * torch.finfo(base_dtype).eps
    torch.testing.assert_close(
        output.double(), reference(unit, hidden)[0].detach(), rtol=rounding, atol=1e-5
    )


@every_class
def test_the_edit_runs_in_the_widest_dtype_of_its_parameters(cls: type[ReftIntervention]) -> None:
    unit = build(cls, dtype="bfloat16")
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.bfloat16)
    widest = torch.float32 if hasattr(unit, "rotate_layer") else torch.bfloat16
    assert unit.delta(hidden).dtype == widest
    assert unit(hidden).dtype == torch.bfloat16


@every_class
def test_autocast_does_not_touch_the_edit(cls: type[ReftIntervention]) -> None:
    unit = build(cls)
    hidden = torch.randn(2, 3, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe = hidden[0] @ hidden[0].T
        output = unit(hidden)
    assert probe.dtype == torch.bfloat16  # autocast was on
    assert output.dtype == torch.float32
    assert_near(output, reference(unit, hidden)[0], 1e-6)


# -- dropout -------------------------------------------------------------------------------------


@every_class
def test_dropout_acts_on_the_edit_alone(cls: type[ReftIntervention]) -> None:
    unit = build(cls, dropout=0.5, dtype="float64")
    hidden = torch.randn(16, 8, WIDTH, dtype=torch.float64)
    change = unit(hidden) - hidden
    kept = change != 0
    edit = reference(unit, hidden)[0].detach() - hidden
    torch.testing.assert_close(change[kept], edit[kept] / (1 - 0.5), rtol=1e-9, atol=1e-9)
    # Five standard deviations of a share of 4096 fair coins.
    assert abs(kept.double().mean().item() - 0.5) < 5 * 0.5 / 4096**0.5


@every_class
def test_dropout_is_off_in_evaluation(cls: type[ReftIntervention]) -> None:
    unit = build(cls, dropout=0.5)
    hidden = torch.randn(2, 3, WIDTH)
    assert not torch.equal(unit(hidden), unit(hidden))
    unit.eval()
    assert torch.equal(unit(hidden), unit(hidden))


# -- inside pyvene -------------------------------------------------------------------------------


def locations(batch: int) -> dict[str, Any]:
    return {"sources->base": (None, [[POSITIONS] * batch])}


def logits_with_hook(base: nn.Module, layer: nn.Module, unit: nn.Module, tokens: Tensor) -> Tensor:
    """The base's logits, with the unit's own forward applied at POSITIONS by a plain hook."""

    def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        edited = output.clone()
        edited[:, POSITIONS] = unit(output[:, POSITIONS])
        return edited

    handle = layer.register_forward_hook(replace)
    try:
        return base(input_ids=tokens).logits
    finally:
        handle.remove()


@every_class
@pytest.mark.parametrize("form", ["intervention", "intervention_type"])
def test_pyvene_and_reftnoise_agree(
    cls: type[ReftIntervention], form: str, tiny_llama: LlamaForCausalLM
) -> None:
    tokens = torch.randint(3, 101, (2, 6))
    entry = {"layer": 1, "component": "block_output", "low_rank_dimension": RANK}
    given = build(cls) if form == "intervention" else cls
    theirs = pyvene.IntervenableModel(entry | {form: given}, model=copy.deepcopy(tiny_llama))
    (unit,) = theirs.interventions.values()
    assert type(unit) is cls

    twin = copy.deepcopy(unit)
    config = rn.ReftConfig(representations=entry | {"intervention": twin, "positions": POSITIONS})
    ours = rn.get_reft_model(tiny_llama, config)
    expected = logits_with_hook(tiny_llama, tiny_llama.model.layers[1], unit, tokens)
    _, output = theirs({"input_ids": tokens}, unit_locations=locations(2))
    assert_near(output.logits, expected, 1e-6)
    assert_near(ours(input_ids=tokens).logits, expected, 1e-6)

    weights = torch.randn_like(expected)
    (output.logits * weights).sum().backward()
    (ours(input_ids=tokens).logits * weights).sum().backward()
    for (name, mine), (_, other) in zip(
        twin.named_parameters(), unit.named_parameters(), strict=True
    ):
        assert other.grad.abs().max() > 0, name
        assert_near(mine.grad, other.grad, 1e-6)


@every_class
def test_pyvene_sees_a_trainable_sourceless_intervention(
    cls: type[ReftIntervention], tiny_llama: LlamaForCausalLM
) -> None:
    unit = build(cls)
    entry = {"layer": 0, "component": "block_output", "intervention": unit}
    model = pyvene.IntervenableModel(entry, model=tiny_llama)
    bases = (
        pyvene.SourcelessIntervention,
        pyvene.TrainableIntervention,
        pyvene.DistributedRepresentationIntervention,
    )
    assert all(isinstance(unit, base) for base in bases)
    assert unit.is_source_constant
    assert unit.keep_last_dim
    assert model.count_parameters() == sum(p.numel() for p in unit.parameters())
    # The width is configuration, not state.
    assert set(unit.state_dict()) == {name for name, _ in unit.named_parameters()}


# -- what bad input gets -------------------------------------------------------------------------


@every_class
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        (
            "low_rank_dimension",
            [0, -1, WIDTH + 1, 2.0, "4", None, True],
            "a rank from 1 to the width of the hidden states, 32",
        ),
        ("dropout", [1.0, 1, -0.1, float("nan"), "0.1", None], "a probability in [0, 1)"),
        (
            "dtype",
            ["bf16", "int64", "nn", torch.int8, None],
            "'float16', 'bfloat16', 'float32' or 'float64'",
        ),
    ],
    ids=["low_rank_dimension", "dropout", "dtype"],
)
def test_values_out_of_range(
    cls: type[ReftIntervention], name: str, values: list[Any], expected: str
) -> None:
    for value in values:
        said = rf"{name} {re.escape(repr(value))}: expected (an integer, )?{re.escape(expected)}"
        with pytest.raises(ValueError, match=said):
            cls(**{"embed_dim": WIDTH, "low_rank_dimension": RANK} | {name: value})


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("cls", [c for c in FORMULAS if c not in CONSTANT])
@pytest.mark.parametrize(("name", "near"), [("rleu", "relu"), ("qwerty", ""), (3, "")])
def test_unknown_activation_names_the_nearest(
    cls: type[ReftIntervention], name: Any, near: str
) -> None:
    message = f"act_fn {name!r} is not an activation of transformers" + (near and f".*{near}")
    with pytest.raises(ValueError, match=message):
        cls(embed_dim=WIDTH, low_rank_dimension=RANK, act_fn=name)


@every_class
@pytest.mark.parametrize(
    ("argument", "near"),
    [("low_rank_dimensoin", "low_rank_dimension"), ("dropuot", "dropout"), ("dytpe", "dtype")],
)
def test_a_mistyped_argument_names_the_nearest(
    cls: type[ReftIntervention], argument: str, near: str
) -> None:
    message = f"{cls.__name__} got an unknown argument '{argument}'; did you mean '{near}'"
    with pytest.raises(TypeError, match=message):
        cls(embed_dim=WIDTH, low_rank_dimension=RANK, **{argument: 1})


@every_class
def test_a_mistyped_required_argument_is_named(cls: type[ReftIntervention]) -> None:
    with pytest.raises(TypeError, match="low_rank_dimension"):
        cls(embed_dim=WIDTH, low_rank_dimensoin=RANK)  # type: ignore[call-arg]


@every_class
def test_an_argument_like_no_other_lists_what_there_is(cls: type[ReftIntervention]) -> None:
    message = f"{cls.__name__} got an unknown argument 'qqq'.*low_rank_dimension, dropout"
    with pytest.raises(TypeError, match=message):
        cls(embed_dim=WIDTH, low_rank_dimension=RANK, qqq=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", [c for c in FORMULAS if c is not NoreftIntervention])
def test_only_noreft_has_a_bias_of_its_projection(cls: Any) -> None:
    unit = cls(embed_dim=WIDTH, low_rank_dimension=RANK, add_bias=True)
    assert unit.arguments() == cls(embed_dim=WIDTH, low_rank_dimension=RANK).arguments()
