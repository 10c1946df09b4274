"""A config accepts exactly what can be saved and loaded equal."""

import json
from collections import OrderedDict, deque
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import peft
import pytest
import torch

import reftnoise as rn
from reftnoise.interventions import INTERVENTIONS
from support.models.architectures import tiny_model

BIAS: dict[str, Any] = {"intervention": "bias", "layer": 0}
LOREFT: dict[str, Any] = {"intervention": "loreft", "layer": 0, "low_rank_dimension": 2}
NEFTUNE: dict[str, Any] = {"intervention": "neftune"}
LORA: dict[str, Any] = {"peft_type": "lora", "target_modules": ["q_proj"]}


class Word(str, Enum):
    NAME = "q_proj"


class Count(IntEnum):
    TWO = 2


class Text(str):
    def __str__(self) -> str:
        return "something else"


RECURSIVE: list[Any] = []
RECURSIVE.append(RECURSIVE)
DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]

NUMBERS: list[Any] = [
    *(2, 0, -1, 2**62, 2**63, 10**5000, True, Count.TWO, 0.5, 1e-5, -0.0, 1e300),
    *(float("nan"), float("inf"), np.float64("nan"), np.float32("inf"), torch.tensor(float("nan"))),
    *(np.int64(2), np.uint8(2), np.bool_(True), np.float16(0.5), np.float32(0.1), np.float64(0.1)),
    *(np.longdouble(2), torch.tensor(2), torch.tensor(0.5, requires_grad=True), torch.tensor(True)),
    *(torch.tensor(0.1, dtype=torch.bfloat16), np.array(2), 2j, np.complex64(2), Decimal(2)),
    *(Fraction(1, 2), np.datetime64("2020"), torch.empty((), device="meta")),
]
TEXTS: list[Any] = [
    *("q_proj", "", "f1+l1", "all", "0-1", "embeddings", "no", "1e3", "0x1", "null", "~", "a: b"),
    *("\x00", "\x85", "\u2028", "é", "\ud800", " q ", "#x", "it's\n", Word.NAME, Text("q_proj")),
    *(np.str_("q_proj"), Path("q_proj"), PurePosixPath("a/b"), b"q_proj", np.bytes_(b"q_proj")),
    *(torch.bfloat16, torch.int8, np.dtype("float32"), np.float32, torch.device("cpu"), "float16"),
    *("relu", torch.relu, torch.nn.ReLU(), torch.nn.ReLU, len, object(), None, ...),
]
LISTS: list[Any] = [
    *([], [0, 1], (0, 1), range(2), {1, 0}, frozenset({1}), deque([0, 1]), np.arange(2)),
    *(torch.arange(2), [np.int64(0), torch.tensor(1)], [0, 0], [[0, 1]], np.eye(2), iter([0])),
    *(["q_proj"], ("q_proj",), {"q_proj", "v_proj"}, np.array(["q_proj"]), [Word.NAME], {1, "a"}),
    *([float("nan")], [object()], [None], {0: 1}.keys(), bytearray(b"a"), memoryview(b"a")),
    *(RECURSIVE, DEEP, np.array([None, 1], dtype=object), torch.empty(2, device="meta")),
]
MAPPINGS: list[Any] = [
    *(
        {},
        {"q_proj": 4},
        {"q_proj": np.int64(4)},
        {0: 1},
        {Word.NAME: 4},
        {"a": object()},
        {None: 1},
    ),
    *(OrderedDict(q_proj=4), MappingProxyType({"q_proj": 4}), {"q_proj": {"a": (1, 2)}}),
    *({np.str_("q_proj"): 4}, {"q_proj": float("nan")}, {("a", "b"): 1}, {True: 1}),
]
VALUES = NUMBERS + TEXTS + LISTS + MAPPINGS

KEYS: dict[str, Any] = {
    "layer": lambda value: rn.ReftConfig(LOREFT | {"layer": value}),
    "low_rank_dimension": lambda value: rn.ReftConfig(LOREFT | {"low_rank_dimension": value}),
    "positions": lambda value: rn.ReftConfig(LOREFT | {"positions": value}),
    "component": lambda value: rn.ReftConfig(LOREFT | {"component": value}),
    "tied": lambda value: rn.ReftConfig(LOREFT | {"tied": value}),
    "embed_dim": lambda value: rn.ReftConfig(LOREFT | {"embed_dim": value}),
    "dropout": lambda value: rn.ReftConfig(LOREFT | {"dropout": value}),
    "act_fn": lambda value: rn.ReftConfig(LOREFT | {"act_fn": value}),
    "dtype": lambda value: rn.ReftConfig(LOREFT | {"dtype": value}),
    "alpha": lambda value: rn.ReftConfig(NEFTUNE | {"alpha": value}),
    "unit_variance": lambda value: rn.ReftConfig(NEFTUNE | {"unit_variance": value}),
    "intervention": lambda value: rn.ReftConfig(LOREFT | {"intervention": value}),
    "modules_to_save": lambda value: rn.ReftConfig(LOREFT, modules_to_save=value),
    "token_rows": lambda value: rn.ReftConfig(LOREFT, token_rows=value),
    "representations": rn.ReftConfig,
    "peft": lambda value: rn.ReftConfig(BIAS, peft=value),
    **{
        f"peft.{key}": lambda value, key=key: rn.ReftConfig(BIAS, peft=LORA | {key: value})
        for key in (
            *("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "bias"),
            *("rank_pattern", "init_lora_weights", "modules_to_save", "use_rslora", "loftq_config"),
            *("trainable_token_indices", "eva_config", "task_type", "peft_type"),
        )
    },
}


def is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str and is_plain(part) for key, part in value.items())
    if type(value) is list:
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


OFTEN = ("layer", "alpha", "positions", "act_fn", "modules_to_save", "peft.layers_to_transform")
"""Keys that every run tries with all values, which takes a second each."""


@pytest.mark.parametrize(
    "key", [key if key in OFTEN else pytest.param(key, marks=pytest.mark.slow) for key in KEYS]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_accepted_is_saved_and_loaded_equal(key: str) -> None:
    for value in VALUES:
        try:
            config = KEYS[key](value)
        except ValueError as error:
            text = str(error)
            assert "\n" not in text.strip()
            assert len(text) < 2000
            continue
        written = config.to_dict()
        assert is_plain(written)
        text = json.dumps(written, allow_nan=False, ensure_ascii=False)
        text.encode()
        for again in (
            rn.ReftConfig.from_dict(json.loads(text)),
            rn.ReftConfig.from_json(config.to_json()),
            rn.ReftConfig.from_yaml(config.to_yaml()),
        ):
            assert again == config
            assert again.to_dict() == written


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("layer", np.int64(2), 2),
        ("layer", torch.tensor(2), 2),
        ("layer", np.arange(2), [0, 1]),
        ("layer", range(2), [0, 1]),
        ("layer", (1, 0), [1, 0]),
        ("layer", {1, 0}, [0, 1]),
        ("low_rank_dimension", np.int32(3), 3),
        ("positions", np.array([0, -1]), [0, -1]),
        ("dropout", np.float32(0.5), 0.5),
        ("dtype", np.dtype("float32"), "float32"),
        ("tied", np.bool_(False), False),
        ("embed_dim", np.int64(32), 32),
        ("alpha", np.float32(5), 5.0),
        ("alpha", torch.tensor(5), 5),
    ],
)
def test_values_of_other_libraries_become_plain(key: str, value: Any, expected: Any) -> None:
    entry = KEYS[key](value).to_dict()["representations"][0]
    assert entry[key] == expected
    assert is_plain(entry)


def test_scales_of_other_libraries_become_plain() -> None:
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(BIAS))
    model.scale = np.float32(0.5)
    assert (model.scale, type(model.scale)) == (0.5, float)
    for scale in (np.float32("nan"), True, "1"):
        with pytest.raises(ValueError, match="expected a finite number"):
            model.scale = scale
    model.set_adapter({"default": np.float64(2)})


def test_values_of_a_section_become_plain() -> None:
    section = LORA | {"layers_to_transform": range(2), "r": np.int64(4), "lora_alpha": Count.TWO}
    config = rn.ReftConfig(BIAS, peft=section | {"target_modules": {"v_proj", "q_proj"}})
    names = ["q_proj", "v_proj"]
    assert config.peft == {
        "peft_type": "lora",
        "r": 4,
        "lora_alpha": 2,
        "target_modules": names,
        "layers_to_transform": [0, 1],
    }
    assert rn.ReftConfig(BIAS, modules_to_save=np.array(names)).modules_to_save == names
    assert rn.ReftConfig(BIAS, token_rows=torch.tensor([5, 3])).token_rows == [5, 3]


@pytest.mark.usefixtures("unchecked_types")
def test_an_argument_of_a_ready_module_is_saved(tmp_path: Path) -> None:
    unit = INTERVENTIONS["neftune"](alpha=np.float32(5))
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig({"intervention": unit}))
    model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.reft_config.representations[0].arguments["alpha"] == 5


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("alpha", float("nan"), "alpha nan: expected a finite number"),
        ("alpha", 2j, "alpha 2j: expected a number, a text, a list or a mapping"),
        ("act_fn", len, "act_fn <built-in function len>: expected a number, a text"),
        ("modules_to_save", {1, "a"}, "modules_to_save .*: expected a list, which has an order"),
        ("token_rows", RECURSIVE, r"token_rows.*: nested more than 32 times"),
        ("peft.rank_pattern", {0: 4}, "peft: rank_pattern: key 0, expected texts as keys"),
        ("component", "\ud800", "component .*: expected characters of Unicode"),
        ("layer", 10**5000, "layer: expected an integer of at most 64 bits"),
    ],
    ids=["nan", "complex", "function", "mixed set", "recursive", "keys", "text", "huge"],
)
def test_what_no_file_holds_is_refused(key: str, value: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        KEYS[key](value)


def test_an_object_of_peft_that_no_file_holds_is_refused() -> None:
    config = peft.LoraConfig(
        target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    for section in (config, LORA | {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()}):
        with pytest.raises(ValueError, match=r"peft: eva_config .*EvaConfig.*: expected a number"):
            rn.ReftConfig(BIAS, peft=section)
