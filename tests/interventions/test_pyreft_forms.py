"""What classes of ours take, have and load as pyreft's of the same names do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import reftnoise as rn
from reftnoise.interventions import LowRankRotateLayer, LowRankRotation, orthonormal_rows
from support.models.pyreft_formed import intervention
from support.models.pyreft_units import INPUTS, RANK, SIZES, WIDTH, rotated, wrapped
from support.tolerance import assert_close

CLASSES: list[Any] = [
    rn.LoreftIntervention,
    rn.NoreftIntervention,
    rn.ConsreftIntervention,
    rn.LobireftIntervention,
    rn.DireftIntervention,
    rn.NodireftIntervention,
]
every_class = pytest.mark.parametrize("cls", CLASSES)


class Own(rn.LoreftIntervention):
    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:  # type: ignore[override]
        return base + self.rotate_layer(base) @ self.rotate_layer.weight.T


# -- arguments -----------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("add_bias", [False, True])
def test_arguments_of_pyrefts_training_script(cls: Any, add_bias: bool) -> None:
    unit = cls(**SIZES, dropout=0.05, act_fn=None, device="cpu", add_bias=add_bias, init_orth=True)
    assert unit.arguments() == cls(**SIZES, dropout=0.05).arguments() | (
        {"add_bias": True} if add_bias and cls is rn.NoreftIntervention else {}
    )


@pytest.mark.parametrize("cls", [rn.ConsreftIntervention, rn.LobireftIntervention])
def test_a_constant_source_does_not_read_an_activation(cls: Any) -> None:
    unit = rotated_constant(cls(**SIZES, act_fn="relu"))
    assert_close(unit(STATES), rotated_constant(cls(**SIZES))(STATES))
    assert "act_fn" not in unit.arguments()


STATES = torch.linspace(-2, 2, 2 * WIDTH).view(1, 2, WIDTH)


def rotated_constant(unit: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.normal_()
    return unit


@pytest.mark.parametrize("cls", [rn.BiasIntervention, rn.RedIntervention, rn.AdditionIntervention])
def test_classes_that_pyreft_has_not_take_no_such_arguments(cls: Any) -> None:
    with pytest.raises(TypeError, match="unknown argument 'device'"):
        cls(embed_dim=WIDTH, device="cpu")


# -- activations ---------------------------------------------------------------------------------


def test_an_activation_can_be_called() -> None:
    assert rn.LoreftIntervention(**SIZES).act_fn(torch.ones(2)).tolist() == [1.0, 1.0]
    assert rn.LoreftIntervention(**SIZES, act_fn="relu").act_fn(-torch.ones(2)).tolist() == [0, 0]


@pytest.mark.parametrize("function", [torch.relu, nn.ReLU()])
@pytest.mark.parametrize("cls", [rn.LoreftIntervention, rn.DireftIntervention])
def test_an_activation_may_be_a_function(cls: Any, function: Any) -> None:
    unit, expected = rotated(cls(**SIZES, act_fn=function)), rotated(cls(**SIZES, act_fn="relu"))
    assert_close(unit(STATES), expected(STATES))
    later = rotated(cls(**SIZES))
    later.act_fn = nn.ReLU()
    assert_close(later(STATES), expected(STATES))


def test_a_function_has_no_name_in_a_file(tmp_path: Any) -> None:
    reft_model = wrapped((1,), lambda _: rn.LoreftIntervention(**SIZES, act_fn=torch.relu))
    with pytest.raises(ValueError, match=r"act_fn of LoreftIntervention: no file can say it"):
        reft_model.save_pretrained(tmp_path)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("act_fn", [nn.PReLU(), nn.ReLU, 3])
def test_an_activation_that_is_none(act_fn: Any) -> None:
    with pytest.raises(ValueError, match=r"act_fn .*(has weights|is not an activation)"):
        rn.LoreftIntervention(**SIZES, act_fn=act_fn)


# -- the rotation --------------------------------------------------------------------------------


def test_a_call_is_pyrefts() -> None:
    unit = rotated(rn.LoreftIntervention(**SIZES)).eval()
    states = torch.randn(1, 2, WIDTH, generator=torch.Generator().manual_seed(9))
    values = unit(states).flatten().tolist()[:6]
    assert values == pytest.approx([-4.8587, -1.271, 0.0355, -1.1849, -3.5124, 2.443], abs=1e-4)


def test_the_rotation_rotates_states() -> None:
    rotation = LowRankRotation(WIDTH, RANK)
    assert rotation(torch.zeros(2, WIDTH)).shape == (2, RANK)
    assert_close(rotation(STATES), STATES @ rotation().T)
    assert rotation(STATES.bfloat16()).dtype == torch.float32


def test_a_class_with_its_own_forward_sees_pyrefts_layer() -> None:
    layer, raw = Own(**SIZES).rotate_layer, rn.LoreftIntervention(**SIZES).rotate_layer.weight
    assert layer.weight.shape == (WIDTH, RANK)
    assert_close(layer.weight.T @ layer.weight, torch.eye(RANK))
    assert_close(layer(STATES), STATES @ layer.weight)
    assert isinstance(raw, nn.Parameter)
    assert raw.shape == (RANK, WIDTH)


def test_its_gradient_reaches_the_rotation() -> None:
    unit = Own(**SIZES)
    unit(STATES).square().sum().backward()
    (gradient,) = [p.grad for name, p in unit.named_parameters() if "rotate_layer" in name]
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_its_weight_can_be_set() -> None:
    matrix = torch.linalg.qr(torch.randn(WIDTH, RANK))[0]
    unit = Own(**SIZES)
    unit.rotate_layer.weight = matrix
    assert_close(unit.rotate_layer.weight, matrix)
    for rows in (-matrix, matrix.T):
        with torch.no_grad():
            unit.rotate_layer.weight.copy_(rows)
        assert_close(unit.rotate_layer.weight, rows if rows.shape == (WIDTH, RANK) else rows.T)
    with pytest.raises(ValueError, match="expected orthonormal rows, but RRᵀ − I reaches 3"):
        unit.rotate_layer.weight = 2 * matrix
    with pytest.raises(ValueError, match=r"R \(3, 32\): expected \(4, 32\)"):
        unit.rotate_layer.weight = matrix[:, :3]


def test_pyrefts_layer() -> None:
    layer = LowRankRotateLayer(WIDTH, RANK)
    assert layer.weight.shape == (WIDTH, RANK)
    assert_close(layer.weight.T @ layer.weight, torch.eye(RANK))
    assert layer(torch.zeros(2, 3, WIDTH, dtype=torch.float64)).dtype == torch.float32
    rotated_layer = orthogonal(layer)
    assert_close(rotated_layer.weight.T @ rotated_layer.weight, torch.eye(RANK))
    assert LowRankRotateLayer(WIDTH, RANK, init_orth=False).weight.shape == (WIDTH, RANK)


# -- states --------------------------------------------------------------------------------------


@every_class
def test_it_loads_the_state_of_pyrefts_class(cls: Any) -> None:
    formed = intervention(cls.__name__.removesuffix("Intervention").lower())
    unit = cls(**SIZES)
    unit.load_state_dict(formed.state_dict())
    torch.testing.assert_close(unit(STATES), formed(STATES), rtol=1e-5, atol=1e-5)
    again = cls(**SIZES)
    again.load_state_dict(unit.state_dict())
    assert_close(again(STATES), unit(STATES))


def test_it_loads_pyrefts_state_of_lower_precision() -> None:
    matrix = torch.linalg.qr(torch.randn(WIDTH, RANK))[0]
    state = {"weight": torch.zeros(RANK, WIDTH).bfloat16(), "bias": torch.zeros(RANK).bfloat16()}
    unit = rn.LoreftIntervention(**SIZES)
    unit.load_state_dict(state | {"rotate_layer": matrix})
    assert_close(orthonormal_rows(unit.rotate_layer.weight), matrix.T)
    with pytest.raises(ValueError, match="expected orthonormal rows"):
        unit.load_state_dict(state | {"rotate_layer": matrix * 1.1})
    with pytest.raises(RuntimeError, match="size mismatch"):
        unit.load_state_dict(state | {"rotate_layer": matrix[:, :2]})


# -- pairs of older versions ---------------------------------------------------------------------


def test_the_first_of_a_unit_is_the_unit() -> None:
    reft_model = wrapped((1, 2), lambda _: rn.LoreftIntervention(**SIZES))
    for unit in reft_model.interventions.values():
        assert unit[0] is unit  # type: ignore[index]
        with pytest.raises(IndexError):
            unit[1]  # type: ignore[index]
    assert reft_model(**INPUTS).logits.isfinite().all()
