"""Names of interventions, and interventions of one's own."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import reftnoise as rn
from reftnoise.interventions import (
    INTERVENTIONS,
    NoiseIntervention,
    ReftIntervention,
    intervention_class,
    intervention_name,
    register_intervention,
)
from support.tolerance import assert_close

REFT = ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"]
ADAPTERS = ["bias", "red", "addition", "ablate", "adapter", "reftr1", "lofit", "jola"]
NOISE = ["neftune", "gaussian", "bernoulli", "symnoise", "r3f", "smart", "hype"]

# For every argument of a registered class, a value that is no class's default.
OTHER_VALUES: dict[str, list[Any]] = {
    "low_rank_dimension": [3],
    "dropout": [0.25],
    "act_fn": ["relu"],
    "dtype": ["bfloat16", torch.float64],
    "add_bias": [True],
    "alpha": [2.5, 10, 0],
    "epsilon": [0.25],
    "distribution": ["normal"],
    "weight": [0.5],
    "step": [0.5],
    "topk": [3],
    "sparsity": [0.1, 0],
    "factor": [2.0, -1],
    "skip": [0],
    "length": ["padded"],
    "unit_variance": [True, False],
    "where": ["prompt", "completion"],
    "trained": ["scaling", "both"],
    "l1": [0.5],
    "l0": [0.5],
    "schedule": ["linear", "constant"],
    "head_width": [],  # of the place
}


def default(name: str) -> ReftIntervention | NoiseIntervention:
    required = {"low_rank_dimension": 2} if name in (*REFT, "adapter") else {}
    return INTERVENTIONS[name](embed_dim=8, **required)


CASES = [
    (name, argument, value)
    for name in (*REFT, *ADAPTERS, *NOISE)
    for argument in default(name).arguments()
    for value in OTHER_VALUES[argument]
    if (name, argument) != ("nodireft", "add_bias")  # which must stay False
]


def shapes(unit: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in unit.state_dict().items()}


def assert_equal_units(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    assert one.arguments() == other.arguments()
    assert repr(one) == repr(other)
    assert shapes(one) == shapes(other)


# -- names ---------------------------------------------------------------------------------------


def test_the_family_is_registered() -> None:
    assert list(INTERVENTIONS) == [*REFT, *ADAPTERS, *NOISE]
    assert all(issubclass(INTERVENTIONS[name], ReftIntervention) for name in (*REFT, *ADAPTERS))
    assert all(issubclass(INTERVENTIONS[name], NoiseIntervention) for name in NOISE)


@pytest.mark.parametrize("name", [*REFT, *ADAPTERS, *NOISE])
def test_a_name_and_its_class_are_one(name: str) -> None:
    assert intervention_name(intervention_class(name)) == name


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="'lorft' is not registered; did you mean 'loreft'") as e:
        intervention_class("lorft")
    assert all(name in str(e.value) for name in (*REFT, *ADAPTERS, *NOISE))
    with pytest.raises(ValueError, match="'xyz' is not registered; known: loreft, noreft"):
        intervention_class("xyz")


def test_an_unregistered_class_has_no_name() -> None:
    class Unregistered(NoiseIntervention):
        pass

    with pytest.raises(ValueError, match=r"Unregistered is not registered.*register_intervention"):
        intervention_name(Unregistered)


@pytest.mark.usefixtures("restored_registry")
def test_a_name_has_one_class() -> None:
    class Another(NoiseIntervention):
        pass

    message = "intervention name 'loreft' belongs to LoreftIntervention already"
    with pytest.raises(ValueError, match=message):
        register_intervention("loreft")(Another)
    assert INTERVENTIONS["loreft"] is rn.LoreftIntervention
    # A module that is imported again registers what is registered.
    assert register_intervention("loreft")(rn.LoreftIntervention) is rn.LoreftIntervention


@pytest.mark.usefixtures("restored_registry")
@pytest.mark.parametrize("cls", [nn.Linear, int])
def test_only_interventions_are_registered(cls: type) -> None:
    message = f"{cls.__name__}: expected a subclass of ReftIntervention or NoiseIntervention"
    with pytest.raises(TypeError, match=message):
        register_intervention("wrong")(cls)
    assert "wrong" not in INTERVENTIONS


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REFT, *ADAPTERS, *NOISE])
def test_the_arguments_of_a_default_rebuild_it(name: str) -> None:
    unit = default(name)
    arguments = json.loads(json.dumps(unit.arguments()))
    assert_equal_units(INTERVENTIONS[name](embed_dim=8, **arguments), unit)


@pytest.mark.parametrize(("name", "argument", "value"), CASES)
def test_every_argument_survives(name: str, argument: str, value: Any) -> None:
    given = default(name).arguments() | {argument: value}
    unit = INTERVENTIONS[name](embed_dim=8, **given)
    arguments = json.loads(json.dumps(unit.arguments()))
    plain = "float64" if value is torch.float64 else value
    assert arguments == given | {argument: plain}
    assert_equal_units(INTERVENTIONS[name](embed_dim=8, **arguments), unit)


# -- one's own -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("restored_registry")
def test_an_intervention_of_ones_own_works_by_its_name(tiny_llama: LlamaForCausalLM) -> None:
    @register_intervention("scale")
    class ScaleIntervention(ReftIntervention):
        """h + s ⊙ h."""

        def __init__(self, *, embed_dim: int, strength: float = 0.1, **arguments: Any) -> None:
            super().__init__(embed_dim=embed_dim, **arguments)
            self.strength = strength
            self.scale = nn.Parameter(torch.full((embed_dim,), strength, dtype=self.dtype))

        def edit(self, hidden: Tensor) -> Tensor:
            return self.scale * hidden

    entry = {"layer": 1, "intervention": "scale", "low_rank_dimension": 1, "positions": "all"}
    config = rn.ReftConfig(representations=entry | {"strength": 0.5})
    assert rn.ReftConfig.from_json(config.to_json()).to_dict() == config.to_dict()
    assert config.to_dict()["representations"][0]["strength"] == 0.5

    tokens = torch.randint(3, 101, (2, 5))
    layer = tiny_llama.model.layers[1]
    handle = layer.register_forward_hook(lambda _, __, output: 1.5 * output)
    expected = tiny_llama(input_ids=tokens).logits
    handle.remove()
    reft_model = rn.get_reft_model(tiny_llama, config)
    logits = reft_model(input_ids=tokens).logits
    assert_close(logits, expected)
    logits.sum().backward()
    (unit,) = reft_model.interventions.values()
    assert unit.scale.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"representations\[0\]: unknown key 'strenght'.*strength"):
        rn.ReftConfig(representations=entry | {"strenght": 0.5})


@pytest.mark.usefixtures("restored_registry")
def test_a_noise_of_ones_own_works_by_its_name(tiny_llama: LlamaForCausalLM) -> None:
    @register_intervention("shift")
    class ShiftNoise(NoiseIntervention):
        """x + c while training."""

        def __init__(self, *, by: float = 1.0, **pyvene: Any) -> None:
            super().__init__(**pyvene)
            self.by = by

        def delta(self, hidden: Tensor, *_: Any, **masks: Tensor) -> Tensor:
            return torch.full_like(hidden, self.by)

    tokens = torch.randint(3, 101, (2, 5))
    embedded = tiny_llama.model.embed_tokens(tokens).detach()
    expected = tiny_llama(inputs_embeds=embedded + 0.25).logits
    config = rn.ReftConfig(representations={"intervention": "shift", "by": 0.25})
    reft_model = rn.get_reft_model(tiny_llama, config)
    torch.testing.assert_close(
        reft_model.train()(input_ids=tokens).logits, expected, rtol=0, atol=1e-6
    )
    assert torch.equal(
        reft_model.eval()(input_ids=tokens).logits, tiny_llama(input_ids=tokens).logits
    )
