"""The plugin in a vLLM that it does not know; without vLLM, by modules that stand for its own."""

import inspect
import logging
import sys
import types
from typing import Any

import pytest

from reftnoise.inference.vllm import plugin

PLACE = "stand_in:Engine.step"


class Engine:
    """What a module of vLLM might hold."""

    kept: int

    def __init__(self) -> None:
        self.set_at_the_start = 1

    def step(self, batch: int, more: int = 0, **others: int) -> int:
        return batch + more


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("stand_in")
    module.Engine = Engine
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setattr(plugin, "WRAPPED", {PLACE: ("twice", "self batch")})
    monkeypatch.setattr(plugin, "READ", {"stand_in:Engine": "kept set_at_the_start step"})
    monkeypatch.delenv(plugin._OFF, raising=False)


def test_what_is_known_has_no_differences() -> None:
    assert list(plugin.differences()) == []


@pytest.mark.parametrize(
    ("place", "parameters", "message"),
    [
        ("stand_in:Engine.run", "self", "stand_in:Engine.run is missing"),
        ("stand_in:Model.run", "self", "stand_in:Model.run is missing"),
        (PLACE, "self tokens", r"step takes \(self, batch, more, others\), not \(self, tokens\)"),
        (PLACE, "self", r"step takes \(self, batch, more, others\), not \(self\)"),
    ],
)
def test_a_name_or_a_parameter_that_differs_is_named(
    monkeypatch: pytest.MonkeyPatch, place: str, parameters: str, message: str
) -> None:
    monkeypatch.setattr(plugin, "WRAPPED", {place: ("twice", parameters)})
    with pytest.raises(AssertionError, match=message):
        assert list(plugin.differences()) == []


def test_attributes_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "READ", {"stand_in:Engine": "kept lost", "stand_in:Model": "kept"})
    assert list(plugin.differences()) == [
        "stand_in:Engine has no lost",
        "stand_in:Model has no kept",
    ]


@pytest.mark.parametrize("fault", ["a name", "a module"])
def test_with_another_version_it_stays_off_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    wrapped = {PLACE: ("twice", "self batch"), "stand_in:Engine.run": ("twice", "self")}
    if fault == "a module":
        wrapped = {PLACE: ("twice", "self batch"), "no_such_module:Engine.run": ("twice", "self")}
    monkeypatch.setattr(plugin, "WRAPPED", wrapped)
    before = Engine.step
    with caplog.at_level(logging.WARNING):
        plugin.register()
        plugin.register()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("reftnoise is off: it does not know this vLLM (")
    assert ("stand_in:Engine.run is missing" in message) == (fault == "a name")
    assert ("no_such_module" in message) == (fault == "a module")
    assert Engine.step is before


def test_what_is_known_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Any = types.ModuleType("reftnoise.inference.vllm.calls")
    calls.twice = lambda original, *args, **kwargs: 2 * original(*args, **kwargs)
    monkeypatch.setitem(sys.modules, calls.__name__, calls)
    monkeypatch.setattr("reftnoise.inference.vllm.calls", calls, raising=False)
    monkeypatch.setattr(Engine, "step", Engine.step)  # restored at the end
    for _ in range(2):
        plugin.register()
    assert Engine().step(3, more=1) == 8
    assert list(inspect.signature(Engine.step).parameters) == ["self", "batch", "more", "others"]
