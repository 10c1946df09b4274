"""A config survives every form it is written in, and says what is wrong with a bad one."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.activations import ACT2FN

import reftnoise as rn
from reftnoise.config.components import COMPONENTS
from reftnoise.interventions import INTERVENTIONS
from support.models.architectures import tiny_model

WIDTH, LAYERS = 32, 3
LOREFT: dict[str, Any] = {"layer": 0, "intervention": "loreft", "low_rank_dimension": 2}
NEFTUNE: dict[str, Any] = {"intervention": "neftune"}

REFT = [name for name, unit in INTERVENTIONS.items() if issubclass(unit, rn.ReftIntervention)]
NOISE = [name for name in INTERVENTIONS if name not in REFT]

OTHER_THAN_DEFAULT: dict[str, Any] = {
    "low_rank_dimension": 3,
    "dropout": 0.25,
    "act_fn": "relu",
    "dtype": "bfloat16",
    "add_bias": True,
    "alpha": 7.5,
    "topk": 3,
    "sparsity": 0.1,
    "factor": 2.0,
    "skip": 0,
    "weight": 0.5,
    "step": 0.5,
    "epsilon": 0.25,
    "distribution": "normal",
    "length": "padded",
    "where": "completion",
    "trained": "both",
    "l1": 0.25,
    "l0": 0.25,
    "schedule": "linear",
}


def other_arguments(name: str) -> dict[str, Any]:
    """A value for each argument of a unit, none of them its default."""
    parameters = inspect.signature(INTERVENTIONS[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    values = OTHER_THAN_DEFAULT | {"unit_variance": not defaults.get("unit_variance")}
    if name == "smart":
        values["distribution"] = "uniform"
    own = [key for key in defaults if key not in ("embed_dim", "head_width")]
    if name == "nodireft":
        own.remove("add_bias")  # which has no effect
    assert all(values[key] != defaults[key] for key in own)
    return {key: values[key] for key in own}


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def loreft_module(**changes: Any) -> rn.LoreftIntervention:
    return rn.LoreftIntervention(**{"embed_dim": WIDTH, "low_rank_dimension": 2} | changes)


def round_trips(config: rn.ReftConfig) -> Iterator[rn.ReftConfig]:
    yield rn.ReftConfig.from_dict(config.to_dict())
    yield rn.ReftConfig.from_json(config.to_json())
    yield rn.ReftConfig.from_yaml(config.to_yaml())


# -- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.parametrize("is_default", [True, False])
def test_every_unit_and_argument_survives(name: str, is_default: bool, tmp_path: Path) -> None:
    place: dict[str, Any] = {"component": "mlp_output", "layer": [0, 2]}
    if name in REFT:
        place |= {"positions": "f3+l2+decode", "tied": False}
    chosen = other_arguments(name)
    if is_default:
        chosen = {key: value for key, value in chosen.items() if key == "low_rank_dimension"}
    entry = place | {"intervention": name} | chosen
    config = rn.ReftConfig(representations=entry)

    written = config.to_dict()["representations"][0]
    assert entry.items() <= written.items()
    for again in round_trips(config):
        assert again == config
        assert again.to_dict() == config.to_dict()
    for file, text in (("config.json", config.to_json()), ("config.yaml", config.to_yaml())):
        (tmp_path / file).write_text(text, encoding="utf-8")
        assert rn.ReftConfig.from_file(tmp_path / file) == config


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_argument_reaches_the_unit(name: str) -> None:
    arguments = other_arguments(name)
    config = rn.ReftConfig(
        representations={"layer": 1, "component": "block_output", "intervention": name} | arguments
    )
    (unit,) = rn.get_reft_model(tiny_model(), config).interventions.values()
    assert type(unit) is INTERVENTIONS[name]
    assert arguments.items() <= unit.arguments().items()


@pytest.mark.parametrize(
    "place",
    [
        {"layer": 15},
        {"layer": [3, 1]},
        {"layer": "all"},
        {"layer": "8-15"},
        {"layer": "2-2"},
        {"component": "embeddings"},
        {"component": "model.layers[3].mlp.output"},
        {"component": "model.layers.3.input", "layer": 3},
        {"component": "block_input", "layer": 0, "embed_dim": 64},
        {"layer": 0, "positions": [0, -1]},
        {"layer": 0, "positions": "all+decode"},
        {"layer": 0, "tied": False, "positions": "f1+l1"},
    ],
    ids=str,
)
def test_every_place_survives(place: dict[str, Any]) -> None:
    entry = {"intervention": "loreft", "low_rank_dimension": 2} | place
    config = rn.ReftConfig(representations=[entry])
    assert place.items() <= config.to_dict()["representations"][0].items()
    for again in round_trips(config):
        assert again == config


def test_a_list_of_units_keeps_its_order() -> None:
    entries = [LOREFT | {"layer": layer} for layer in (2, 0, 1)] + [NEFTUNE]
    for config in round_trips(rn.ReftConfig(representations=entries)):
        found = config.to_dict()["representations"]
        assert [entry.get("layer") for entry in found] == [2, 0, 1, None]
        assert found[3]["intervention"] == "neftune"


def test_defaults_are_written() -> None:
    loreft, neftune = rn.ReftConfig(representations=[LOREFT, NEFTUNE]).to_dict()["representations"]
    assert loreft == LOREFT | {  # without positions: calls may say them
        "component": "block_output",
        "tied": True,
        "dropout": 0.0,
        "act_fn": None,
        "dtype": "float32",
    }
    assert neftune == {
        "component": "embeddings",
        "intervention": "neftune",
        "alpha": 5.0,
        "length": "attended",
        "unit_variance": None,
        "where": "all",
    }


def test_a_torch_dtype_becomes_its_name() -> None:
    config = rn.ReftConfig(representations=LOREFT | {"dtype": torch.bfloat16})
    assert config.to_dict()["representations"][0]["dtype"] == "bfloat16"


def test_a_class_in_pyvenes_field_becomes_its_name() -> None:
    entry = {"layer": 0, "low_rank_dimension": 2, "unit": "pos", "max_number_of_units": 1}
    config = rn.ReftConfig(representations=entry | {"intervention_type": rn.LoreftIntervention})
    assert config == rn.ReftConfig(representations=LOREFT)


def test_a_config_does_not_share_the_callers_lists() -> None:
    layers, positions = [0, 1], [0, -1]
    config = rn.ReftConfig(representations=LOREFT | {"layer": layers, "positions": positions})
    layers.append(2)
    positions.append(5)
    (entry,) = config.to_dict()["representations"]
    assert (entry["layer"], entry["positions"]) == ([0, 1], [0, -1])


# -- the original form: a ready module -----------------------------------------------------------


def test_the_original_form_as_it_stands() -> None:
    model = tiny_model()
    module = rn.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4)
    config = rn.ReftConfig(
        representations={
            "layer": 1,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": module,
        }
    )
    reft_model = rn.get_reft_model(model, config)
    assert list(reft_model.interventions.values()) == [module]
    assert config.to_dict()["representations"] == [
        {
            "layer": 1,
            "component": "block_output",
            "intervention": "loreft",
            "tied": True,
            "low_rank_dimension": 4,
            "dropout": 0.0,
            "act_fn": None,
            "dtype": "float32",
        }
    ]


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_a_ready_module_becomes_its_name_and_arguments(name: str) -> None:
    arguments = other_arguments(name)
    module = INTERVENTIONS[name](embed_dim=WIDTH, **arguments)
    place = {"layer": 1, "component": "block_output"}
    ready = rn.ReftConfig(representations=place | {"intervention": module})
    named = rn.ReftConfig(representations=place | {"intervention": name} | arguments)
    assert ready.to_dict() == named.to_dict()
    for again in round_trips(ready):
        assert again == named


# -- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "layers"),
    [(2, [2]), ([2, 0], [2, 0]), ("all", [0, 1, 2]), ("0-1", [0, 1]), ("1-1", [1])],
)
def test_layers(layer: Any, layers: list[int]) -> None:
    config = rn.ReftConfig(representations=LOREFT | {"layer": layer})
    reft_model = rn.get_reft_model(tiny_model(), config)
    expected = [f"layer_{index}_comp_block_output_unit_pos_nunit_1#0" for index in layers]
    assert list(reft_model.interventions) == expected


def test_untied_units_are_all_prefixes_before_all_suffixes() -> None:
    entry = LOREFT | {"layer": [0, 2], "positions": "f2+l3", "tied": False}
    reft_model = rn.get_reft_model(tiny_model(), rn.ReftConfig(representations=entry))
    key = "layer_{}_comp_block_output_unit_pos_nunit_1#{}"
    places = [(0, 0), (2, 0), (0, 1), (2, 1)]
    assert list(reft_model.interventions) == [key.format(*place) for place in places]
    assert len({id(unit) for unit in reft_model.interventions.values()}) == 4


# -- bad entries ---------------------------------------------------------------------------------

REFT_KEYS = (
    "layer, component, heads, embed_dim, positions, tied, gate, intervention, low_rank_dimension"
)
NOISE_KEYS = "layer, component, heads, embed_dim, intervention, alpha, length, unit_variance, where"
NAMES = ", ".join(INTERVENTIONS)
PATH = "or a dotted path that ends in .output or .input, such as 'model.layers[3].output'"
PLACES = f"{', '.join(COMPONENTS)}, {PATH}"
LAYER = "expected an integer from 0, a list of them, 'all' or a range such as '8-15'"
UNIT = "expected an 'intervention': a registered name such as 'loreft', or a ready module"
PEFT = (
    "is a method of PEFT: give it next to representations, as in peft={'peft_type': 'lora', 'r': 8}"
)
MODULE = (
    "expected a registered name, or a module derived from ReftIntervention or NoiseIntervention"
)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        # keys
        (
            LOREFT | {"dropuot": 0.1},
            "unknown key 'dropuot' for LoreftIntervention; did you mean 'dropout'? possible: "
            f"{REFT_KEYS}, dropout, act_fn, dtype",
        ),
        (
            LOREFT | {"qqq": 0},
            f"unknown key 'qqq' for LoreftIntervention; possible: {REFT_KEYS}, dropout, "
            "act_fn, dtype",
        ),
        (
            LOREFT | {"intervention": "consreft", "act_fn": "relu"},
            f"unknown key 'act_fn' for ConsreftIntervention; possible: {REFT_KEYS}, dropout, dtype",
        ),
        (
            NEFTUNE | {"positions": "l1"},
            f"unknown key 'positions' for NeftuneIntervention; possible: {NOISE_KEYS}",
        ),
        (
            NEFTUNE | {"tied": True},
            f"unknown key 'tied' for NeftuneIntervention; possible: {NOISE_KEYS}",
        ),
        (
            NEFTUNE | {"alhpa": 5},
            "unknown key 'alhpa' for NeftuneIntervention; did you mean 'alpha'? possible: "
            f"{NOISE_KEYS}",
        ),
        (
            {"layer": 0, "intervention": "loreft", "rank": 4},
            "unknown key 'rank' for LoreftIntervention; did you mean 'low_rank_dimension'? "
            f"possible: {REFT_KEYS}, dropout, act_fn, dtype",
        ),
        (
            {"layer": 0, "intervention": "loreft", "r": 4},
            "unknown key 'r' for LoreftIntervention; did you mean 'low_rank_dimension'? possible: "
            f"{REFT_KEYS}, dropout, act_fn, dtype",
        ),
        (
            LOREFT | {"Positions": "l1"},
            "unknown key 'Positions' for LoreftIntervention; did you mean 'positions'? possible: "
            f"{REFT_KEYS}, dropout, act_fn, dtype",
        ),
        (LOREFT | {"unit": "h"}, "unit 'h': only 'pos' is supported; see 'positions'"),
        (
            LOREFT | {"max_number_of_units": 2},
            "max_number_of_units 2: only 1 is supported; see 'positions'",
        ),
        # interventions
        (
            LOREFT | {"intervention": "lorefd"},
            f"intervention 'lorefd' is not registered; did you mean 'loreft'? known: {NAMES}; "
            "register_intervention('lorefd') adds a class of your own",
        ),
        (
            LOREFT | {"intervention": "LoReFT"},
            f"intervention 'LoReFT' is not registered; did you mean 'loreft'? known: {NAMES}; "
            "register_intervention('LoReFT') adds a class of your own",
        ),
        ({"peft_type": "lora", "r": 8}, f"peft_type 'lora' {PEFT}"),
        (LOREFT | {"intervention": "LoRA"}, f"intervention 'LoRA' {PEFT}"),
        (
            LOREFT | {"intervention": "xyz"},
            f"intervention 'xyz' is not registered; known: {NAMES}; "
            "register_intervention('xyz') adds a class of your own",
        ),
        ({"layer": 0}, UNIT),
        ({"layer": 0, "intervention": None}, UNIT),
        (
            LOREFT | {"intervention": rn.LoreftIntervention},
            "intervention LoreftIntervention: expected an instance or a name",
        ),
        (LOREFT | {"intervention": 3}, f"intervention 3: {MODULE}"),
        (
            {"layer": 0, "intervention": nn.Identity()},
            f"intervention Identity(): {MODULE}",
        ),
        (
            {"layer": 0, "intervention_type": nn.Identity},
            "Identity is not registered, so no configuration can name it: decorate the class with "
            '@register_intervention("some_name")',
        ),
        (
            {"layer": 0, "intervention": "loreft"},
            "LoreftIntervention needs 'low_rank_dimension'",
        ),
        # components and layers
        (
            LOREFT | {"component": "block_outptu"},
            f"component 'block_outptu'; did you mean 'block_output'? possible: {PLACES}",
        ),
        (
            LOREFT | {"component": "decodr.block_output"},
            "component 'decodr.block_output'; did you mean 'decoder.block_output'? possible: "
            f"{', '.join(f'decoder.{name}' for name in COMPONENTS)}, {PATH}",
        ),
        (LOREFT | {"component": "xyz"}, f"component 'xyz'; possible: {PLACES}"),
        (LOREFT | {"component": 3}, "component 3: expected a string"),
        (LOREFT | {"layer": -1}, f"layer -1: {LAYER}"),
        (LOREFT | {"layer": "5-2"}, f"layer '5-2': {LAYER}"),
        (LOREFT | {"layer": "1-"}, f"layer '1-': {LAYER}"),
        (LOREFT | {"layer": "first"}, f"layer 'first': {LAYER}"),
        (LOREFT | {"layer": True}, f"layer True: {LAYER}"),
        (LOREFT | {"layer": 1.0}, f"layer 1.0: {LAYER}"),
        (LOREFT | {"layer": []}, f"layer []: {LAYER}"),
        (LOREFT | {"layer": [0, True]}, f"layer [0, True]: {LAYER}"),
        (LOREFT | {"layer": [0, -1]}, f"layer [0, -1]: {LAYER}"),
        (LOREFT | {"layer": None}, f"layer is missing: {LAYER}"),
        ({"intervention": "loreft", "low_rank_dimension": 2}, f"layer is missing: {LAYER}"),
        (LOREFT | {"layer": [1, 0, 1]}, "layer [1, 0, 1]: every layer may occur once"),
        (
            LOREFT | {"component": "embeddings"},
            "layer 0: 'embeddings' has no layers, leave it out",
        ),
        (NEFTUNE | {"layer": 2}, "layer 2: 'embeddings' has no layers, leave it out"),
        # positions
        (
            LOREFT | {"positions": "f7-l7"},
            "positions 'f7-l7': expected terms like 'f7' or 'l7' joined by '+', got '-' at column "
            "3",
        ),
        (
            LOREFT | {"positions": 7},
            "positions 7: expected a string such as 'f7+l7' or a list of integers",
        ),
        (LOREFT | {"tied": "no"}, "tied 'no': expected true or false"),
        (LOREFT | {"tied": 0}, "tied 0: expected true or false"),
        # ready modules
        (
            {"layer": 0, "intervention": loreft_module(dropout=0.5), "dropout": 0.0},
            "dropout 0.0 with a ready LoreftIntervention whose dropout is 0.5: set it in the "
            "module",
        ),
        (
            {"layer": 0, "intervention": loreft_module(), "positions": "f1+l1", "tied": False},
            "tied False needs two sets of weights: name the intervention instead",
        ),
        (
            {"layer": [0, 1], "intervention": loreft_module()},
            "layer [0, 1] with a ready LoreftIntervention: a module serves one layer; name the "
            "intervention, or give one entry per layer",
        ),
        (
            {"layer": "all", "intervention": loreft_module()},
            "layer 'all' with a ready LoreftIntervention: a module serves one layer; name the "
            "intervention, or give one entry per layer",
        ),
        # not an entry
        (3, "expected a mapping, got 3"),
        (None, "expected a mapping, got None"),
        ("loreft", "expected a mapping, got 'loreft'"),
    ],
)
def test_bad_entry(entry: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=exactly(f"representations[1]: {problem}")):
        rn.ReftConfig(representations=[LOREFT, entry])


@pytest.mark.parametrize("representations", ["loreft", None, 3])
def test_not_a_list_of_entries(representations: Any) -> None:
    message = f"representations {representations!r}: expected an entry or a list of entries"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.ReftConfig(representations=representations)


@pytest.mark.parametrize("values", [[], None, "x", {}, {"representation": []}])
def test_not_a_config(values: Any) -> None:
    message = f"expected a mapping with 'representations', got {values!r}"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.ReftConfig.from_dict(values)


def test_a_config_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with pytest.raises(ValueError, match=exactly(f"{path}: expected one of .json, .yaml, .yml")):
        rn.ReftConfig.from_file(path)


# -- entries that do not fit the model -----------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (LOREFT | {"layer": 3}, "layer 3: the model has layers 0 to 2, not 3"),
        (LOREFT | {"layer": [0, 9]}, "layer [0, 9]: the model has layers 0 to 2, not 9"),
        (LOREFT | {"layer": "1-5"}, "layer '1-5': the model has layers 0 to 2, not 3"),
        (
            LOREFT | {"low_rank_dimension": 33},
            "low_rank_dimension 33: expected a rank from 1 to the width of the hidden states, 32",
        ),
        (
            LOREFT | {"low_rank_dimension": 0},
            "low_rank_dimension 0: expected a rank from 1 to the width of the hidden states, 32",
        ),
        (
            LOREFT | {"low_rank_dimension": "4"},
            "low_rank_dimension '4': expected an integer, a rank from 1 to the width of the hidden "
            "states, 32",
        ),
        (LOREFT | {"dropout": 1.0}, "dropout 1.0: expected a probability in [0, 1)"),
        (
            LOREFT | {"act_fn": "xyz"},
            f"act_fn 'xyz' is not an activation of transformers; it has: {', '.join(ACT2FN)}",
        ),
        (
            LOREFT | {"act_fn": "prelu"},
            "act_fn 'prelu' has weights of its own: expected one without",
        ),
        (
            LOREFT | {"dtype": "int8"},
            "dtype 'int8': expected 'float16', 'bfloat16', 'float32' or 'float64'",
        ),
        (
            LOREFT | {"embed_dim": 12},
            "embed_dim 12: the hidden states at 'block_output' have width 32",
        ),
        (
            {"layer": 0, "intervention": loreft_module(embed_dim=12)},
            "embed_dim 12: the hidden states at 'block_output' have width 32",
        ),
        (
            {"component": "embeddings", "intervention": loreft_module(embed_dim=12)},
            "embed_dim 12: the hidden states at 'embeddings' have width 32",
        ),
        (
            {
                "component": "model.layers[0].mlp.up_proj.output",
                "intervention": loreft_module(embed_dim=12),
            },
            "embed_dim 12: the hidden states at 'model.layers[0].mlp.up_proj.output' have width 64",
        ),
        (NEFTUNE | {"alpha": -1}, "alpha -1: expected a finite number of at least 0"),
        (NEFTUNE | {"length": "row"}, "length 'row': expected 'attended' or 'padded'"),
        (NEFTUNE | {"where": "here"}, "where 'here': expected 'all', 'prompt' or 'completion'"),
        (
            LOREFT | {"component": "model.layers[7].output"},
            "component 'model.layers[7].output': ModuleList has no '7', but 0, 1, 2",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_an_entry_that_does_not_fit_the_model(entry: dict[str, Any], problem: str) -> None:
    config = rn.ReftConfig(representations=[NEFTUNE, entry])
    with pytest.raises(ValueError, match=exactly(f"representations[1]: {problem}")):
        rn.get_reft_model(tiny_model(), config)


@pytest.mark.parametrize(
    ("entry", "argument"),
    [
        (LOREFT | {"low_rank_dimension": "4"}, "low_rank_dimension '4'"),
        (LOREFT | {"low_rank_dimension": 2.0}, "low_rank_dimension 2.0"),
        (LOREFT | {"low_rank_dimension": None}, "low_rank_dimension None"),
        (LOREFT | {"low_rank_dimension": True}, "low_rank_dimension True"),
        (LOREFT | {"dropout": "0.1"}, "dropout '0.1'"),
        (LOREFT | {"dropout": None}, "dropout None"),
        (LOREFT | {"act_fn": "rleu"}, "act_fn 'rleu'"),
        (LOREFT | {"act_fn": 3}, "act_fn 3"),
        (LOREFT | {"dtype": 16}, "dtype 16"),
        (NEFTUNE | {"alpha": "5"}, "alpha '5'"),
        (NEFTUNE | {"alpha": float("nan")}, "alpha nan"),
        (NEFTUNE | {"length": 5}, "length 5"),
        (NEFTUNE | {"where": None}, "where None"),
        (NEFTUNE | {"unit_variance": "false"}, "unit_variance 'false'"),
        pytest.param(LOREFT | {"intervention": "noreft", "add_bias": "false"}, "add_bias 'false'"),
        pytest.param(LOREFT | {"embed_dim": "32"}, "embed_dim '32'"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_a_value_of_the_wrong_type(entry: dict[str, Any], argument: str) -> None:
    start = f"^representations\\[1\\]: {re.escape(argument)}(:| is not)"
    with pytest.raises(ValueError, match=start):
        rn.get_reft_model(tiny_model(), rn.ReftConfig(representations=[NEFTUNE, entry]))


KEY = "layer_{}_comp_{}_unit_pos_nunit_1#{}"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [LOREFT | {"positions": "l1"}, LOREFT | {"positions": "l1"}],
            f"positions 'l1' of {KEY.format(0, 'block_output', 0)} and 'l1' of "
            f"{KEY.format(0, 'block_output', 1)} can overlap at model.layers.0.output: units at "
            "one site need disjoint positions",
        ),
        (
            [
                LOREFT | {"layer": "all", "positions": "f2+l2"},
                LOREFT | {"layer": 2, "positions": "l1"},
            ],
            f"positions 'f2+l2' of {KEY.format(2, 'block_output', 0)} and 'l1' of "
            f"{KEY.format(2, 'block_output', 1)} can overlap at model.layers.2.output: units at "
            "one site need disjoint positions",
        ),
        (
            [LOREFT | {"positions": [0]}, LOREFT | {"positions": "l1"}],
            f"positions [0] of {KEY.format(0, 'block_output', 0)} and 'l1' of "
            f"{KEY.format(0, 'block_output', 1)} can overlap at model.layers.0.output: units at "
            "one site need disjoint positions",
        ),
    ],
)
def test_overlapping_positions_at_one_site(entries: list[Any], message: str) -> None:
    config = rn.ReftConfig(representations=entries)
    with pytest.raises(ValueError, match=exactly(message)):
        rn.get_reft_model(tiny_model(), config)


@pytest.mark.parametrize(
    ("component", "path"),
    [
        pytest.param(component, path)
        for component, path in [
            ("block_output", "model.layers[0].output"),
            ("block_input", "model.layers.0.input"),
            ("mlp_output", "model.layers[0].mlp.output"),
            ("model.layers.0.output", "model.layers[0].output"),
        ]
    ],
)
def test_two_names_of_one_site_are_one_site(component: str, path: str) -> None:
    named = LOREFT | {"positions": "l1"}
    entries = [named | {"component": component}, named | {"component": path}]
    with pytest.raises(ValueError, match=r"can overlap at model\.layers"):
        rn.get_reft_model(tiny_model(), rn.ReftConfig(representations=entries))


@pytest.mark.parametrize(
    "entries",
    [
        [LOREFT | {"positions": "f2"}, LOREFT | {"positions": "l2"}],
        [LOREFT, LOREFT | {"layer": 1}],
        [LOREFT, LOREFT | {"component": "mlp_output"}],
        [LOREFT | {"positions": "all"}, LOREFT | {"positions": "decode"}],
        [
            LOREFT | {"component": "block_output"},
            NEFTUNE | {"component": "block_output"} | {"layer": 0},
        ],
        [NEFTUNE, {"intervention": "gaussian"}],
        [
            {"layer": 0, "intervention": loreft_module()},
            {"layer": 1, "intervention": loreft_module()},
        ],
    ],
)
def test_units_that_may_stand_side_by_side(entries: list[Any]) -> None:
    reft_model = rn.get_reft_model(tiny_model(), rn.ReftConfig(representations=entries))
    assert len(reft_model.interventions) == 2


def test_one_module_in_two_entries() -> None:
    module = loreft_module()
    entries = [{"layer": layer, "intervention": module} for layer in (0, 1)]
    message = "one module serves two entries: give each entry a module of its own"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.get_reft_model(tiny_model(), rn.ReftConfig(representations=entries))


def test_a_model_is_wrapped_once() -> None:
    config = rn.ReftConfig(representations=LOREFT)
    message = "the model is a ReftModel already: put all units into one ReftConfig"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.get_reft_model(rn.get_reft_model(tiny_model(), config), config)


# -- mistakes that name the entry or the file --------------------------------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(
            lambda: rn.ReftConfig(
                representations=[
                    LOREFT,
                    {"layer": 0, "intervention": loreft_module(), "embed_dim": 12},
                ]
            ),
            id="embed_dim beside a ready module of another width",
        ),
        pytest.param(
            lambda: rn.ReftConfig(
                representations=[
                    LOREFT,
                    LOREFT | {"layer": "all", "component": "model.layers[2].output"},
                ]
            ),
            id="many layers beside a dotted path to one",
        ),
        pytest.param(
            lambda: rn.ReftConfig(
                representations=[LOREFT, rn.RepresentationConfig(intervention="loreft", layer=-1)]
            ),
            id="an entry that is built directly",
        ),
    ],
)
def test_mistakes_name_the_entry(mistake: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"^representations\[1\]: "):
        mistake()


def test_a_key_that_is_no_string() -> None:
    with pytest.raises(ValueError, match=r"^representations\[0\]: unknown key 1 for Loreft"):
        rn.ReftConfig(representations=LOREFT | {1: 2})


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("config.yaml", "a: [")])
def test_a_damaged_config_file(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}: "):
        rn.ReftConfig.from_file(tmp_path / name)


@pytest.mark.parametrize("text", ["config.yaml", "runs/config.json", Path("config.yml")])
@pytest.mark.parametrize("read", [rn.ReftConfig.from_yaml, rn.ReftConfig.from_json])
def test_a_path_instead_of_a_text(read: Callable[[Any], Any], text: Any) -> None:
    message = f"{read.__name__} takes the text of a config: read {str(text)!r} with from_file"
    with pytest.raises(ValueError, match=exactly(message)):
        read(text)


def test_swapped_arguments() -> None:
    model, config = tiny_model(), rn.ReftConfig(LOREFT)
    message = "the arguments are swapped: get_reft_model(model, reft_config)"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.get_reft_model(config, model)  # type: ignore[arg-type]
    message = "the arguments are swapped: ReftModel(config, model)"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.ReftModel(model, config)  # type: ignore[arg-type]
    message = "the arguments are swapped: ReftModel.from_pretrained(model, directory)"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.ReftModel.from_pretrained("adapter", model)  # type: ignore[arg-type]
    message = "model: expected a model of transformers, got 'a-model'"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.ReftModel.from_pretrained("a-model", "adapter")  # type: ignore[arg-type]
    message = "reft_config: expected a ReftConfig, got LlamaForCausalLM"
    with pytest.raises(ValueError, match=exactly(message)):
        rn.get_reft_model(model, tiny_model())  # type: ignore[arg-type]


def test_decode_where_nothing_is_decoded() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=64, vocab_size=50))
    message = (
        "representations[0]: positions 'decode': BertForSequenceClassification writes no tokens at "
        "bert.encoder.layer.0.output; expected prompt positions such as 'f1+l1' or 'all'"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        rn.get_reft_model(bert, rn.ReftConfig(LOREFT | {"positions": "decode"}))
    rn.get_reft_model(bert, rn.ReftConfig(LOREFT | {"positions": "all+decode"}))
