"""pyreft's forms of a call.

| form | what is edited |
|---|---|
| a mapping of all inputs, with `unit_locations` | these columns; all tokens for a unit whose part \
is None |
| a mapping without them | what the config names; all tokens where it names no positions |
| `intervention_locations` among the inputs of any call | these columns, row by row |

A call with a mapping returns `(base_output or None, intervened_output)`, any other one the base's
output class. `generate` with a mapping edits new tokens alone, unless `intervene_on_prompt=True`.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers.utils import ModelOutput

from ..._util.errors import brief, warn_once
from ...config.positions import Positions
from ...engine.hooks import Engine
from ...engine.layout import Batch, UnitLocations
from ...engine.locations import EditedPlace, EveryColumn
from ...engine.units import PlacedUnit
from ..library import OWN, AdapterLibrary
from .places import by_unit, nested_locations, nested_subspaces, subspaces_by_unit, without_repeats

logger = logging.getLogger(__name__)

_ORDER = {
    "forward": (
        *("base", "sources", "unit_locations", "source_representations", "subspaces", "labels"),
        *("output_original_output", "return_dict", "use_cache", "intervention_additional_kwargs"),
    ),
    "generate": (
        *("base", "sources", "unit_locations", "source_representations", "intervene_on_prompt"),
        *("subspaces", "output_original_output", "intervention_additional_kwargs"),
    ),
}
"""pyvene's arguments, in its order."""
_OF_SOURCES = ("sources", "source_representations", "intervention_additional_kwargs")
_NEW_TOKENS = Positions(decode=True)


class EditedModel(Protocol):
    """A base with units."""

    engine: Engine
    adapters: AdapterLibrary

    def disabled(self) -> AbstractContextManager[Any]:
        """Within the block, the model is its bare base."""


@dataclass
class OutputPair(ModelOutput):
    """What `forward` returns for a mapping and `return_dict=True`."""

    original_outputs: Any = None
    """Those of the bare base, where the call asks for them."""
    intervened_outputs: Any = None
    collected_activations: Any = None
    """None, since no unit collects any."""


def call_in_form(
    method: Callable[..., Any],
    first: str,
    model: EditedModel,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    has_mapping: bool,
) -> Any:
    """Call a model in transformers' form with what a call in one of pyreft's forms means.

    Args:
        method: the model's `forward` or `generate`, which takes calls in transformers' form.
        first: name of its first argument.
        model: the model.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        has_mapping: whether the inputs are a mapping.

    Raises:
        ValueError: sources; locations or subspaces of another form; places in the prompt with
            `intervene_on_prompt=False`.
        TypeError: an argument that comes twice, or too many.
    """
    if has_mapping:
        return _call_with_mapping(method, first, model, args, kwargs)
    kwargs.pop("output_original_output", None)  # of the form that has a place for it
    if not kwargs.pop("intervene_on_prompt", True):
        raise _flag_against_positions()
    leading = dict(zip((first,), args, strict=False))
    return method(model, *args, **_with_columns(model, kwargs, leading))


def _call_with_mapping(
    method: Callable[..., Any],
    first: str,
    model: EditedModel,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    is_generation = method.__name__ == "generate"
    values = _named(_ORDER[method.__name__], args, kwargs)
    inputs = values.pop("base" if "base" in values else first)
    if not isinstance(inputs, Mapping):
        raise ValueError(f"base {brief(inputs)}: expected a mapping of inputs, as of a tokenizer")
    for name in _OF_SOURCES:
        value = values.pop(name, None)
        parts = value if isinstance(value, list | tuple) else [value]
        if any(part is not None and part != {} for part in parts):
            raise ValueError(f"{name} {brief(value)}: no unit reads sources, expected None")
    with_original = values.pop("output_original_output", False)
    as_object = not is_generation and values.pop("return_dict", False)
    on_prompt = values.pop("intervene_on_prompt", None) if is_generation else True
    values = {name: value for name, value in values.items() if value is not None}
    if "use_cache" in values and not hasattr(model.engine.base.config, "use_cache"):
        del values["use_cache"]
    batch = {**inputs, **values}
    if batch.get("intervention_locations") is None:
        batch = _placed(model, batch, on_prompt, is_generation=is_generation)
    batch, original = _with_columns(model, batch, {}), None
    if with_original:
        with model.disabled():
            original = method(model, **batch)
    edited = method(model, **batch)
    return OutputPair(original, edited) if as_object else (original, edited)


def also_for_batches(
    forward: Callable[..., Any], inherited: Callable[..., Any]
) -> Callable[..., Any]:
    """A `forward` of pyreft's form, which then also takes a batch's columns by name.

    Args:
        forward: method whose first argument is a mapping, and which returns a pair.
        inherited: method that it overrides.
    """
    own = inspect.signature(forward).parameters

    @functools.wraps(forward)
    def call(model: EditedModel, *args: Any, **kwargs: Any) -> Any:
        if args or "base" in kwargs:
            return forward(model, *args, **kwargs)
        columns = _with_columns(model, kwargs, {})
        names = ("unit_locations", "subspaces", "labels")
        named = {name: columns.pop(name) for name in names if name in columns and name in own}
        outputs = forward(model, columns, **named)
        return outputs[1] if isinstance(outputs, tuple) else outputs

    call.__signature__ = inspect.signature(inherited)  # type: ignore[attr-defined]  # inspect reads it
    return call


def _named(order: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    values = dict(zip(order, args, strict=False))
    if len(args) > len(order):
        raise TypeError(f"{len(args)} arguments without a name: expected {', '.join(order)}")
    if twice := sorted(values.keys() & kwargs.keys()):
        raise TypeError(f"{twice[0]} comes twice: by its place and by its name")
    return values | kwargs


def _with_columns(
    model: EditedModel, arguments: dict[str, Any], leading: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments with `intervention_locations` as `unit_locations`, and subspaces in order."""
    locations = arguments.pop("intervention_locations", None)
    units = _editing(model)
    if locations is None or not units:
        return arguments
    if arguments.get("unit_locations") is not None:
        raise ValueError("intervention_locations and unit_locations say the same: give one")
    rows = Batch.of({**leading, **arguments}).rows
    placed = {"unit_locations": {"sources->base": (None, by_unit(locations, len(units), rows))}}
    if arguments.get("subspaces") is not None:
        placed["subspaces"] = subspaces_by_unit(arguments["subspaces"])
    return arguments | placed


def _placed(
    model: EditedModel, batch: dict[str, Any], on_prompt: bool | None, *, is_generation: bool
) -> dict[str, Any]:
    """A mapping's batch with `unit_locations` and subspaces as the engine reads them."""
    units, rows = _editing(model), Batch.of(batch).rows
    is_own = batch.get("adapter_names") is None and model.adapters.active == OWN
    if not (is_own and units):
        return batch
    locations = batch.get("unit_locations")
    if locations is None:
        batch["unit_locations"] = _unlocated(units, on_prompt)
    else:
        batch["unit_locations"] = _located(locations, len(units), rows, on_prompt, is_generation)
    if batch.get("subspaces") is not None:
        batch["subspaces"] = nested_subspaces(batch["subspaces"], len(units), rows)
    return batch


def _editing(model: EditedModel) -> list[PlacedUnit]:
    return [placed for placed in model.engine.units if placed.positions is not None]


def _unlocated(units: Sequence[PlacedUnit], on_prompt: bool | None) -> UnitLocations | None:
    """Where units edit in a call that does not say it."""
    named = [placed.positions for placed in units if placed.names_positions]
    if on_prompt is False and any(positions.edits_prompt for positions in named if positions):
        raise _flag_against_positions()
    if len(named) == len(units):
        return None
    place: EditedPlace = EveryColumn()
    what = "all tokens"
    if not on_prompt:
        place, what = _NEW_TOKENS, "new tokens alone (intervene_on_prompt=True: all tokens)"
    warn_once(
        logger,
        f"entries of the config name no positions, so a call with a mapping and no unit_locations "
        f"edits {what}, as in pyreft: name positions such as 'l1', or give unit_locations",
    )
    parts = [placed.positions if placed.names_positions else place for placed in units]
    return {"sources->base": (None, parts)}


def _located(
    locations: Any, interventions: int, rows: int, on_prompt: bool | None, is_generation: bool
) -> UnitLocations:
    """Where units edit in a call that says it, in one of pyvene's forms."""
    nested = nested_locations(locations, interventions, rows)
    if not isinstance(nested, list | tuple):
        return locations  # the engine's error says what it is
    parts: list[Any] = []
    for index, part in enumerate(nested):
        if part is None:
            parts.append(EveryColumn())
            continue
        columns = without_repeats(part, index, rows) if is_generation else part
        if on_prompt or not isinstance(columns, Tensor):
            parts.append(columns)
        elif columns.any():
            raise ValueError(
                f"unit_locations of intervention {index}, {brief(part)}: with "
                "intervene_on_prompt=False they are columns of each new token by itself, so only "
                "0 is possible; set intervene_on_prompt=True to edit the prompt"
            )
        else:
            parts.append(_NEW_TOKENS)
    return {"sources->base": (None, parts)}


def _flag_against_positions() -> ValueError:
    return ValueError(
        "intervene_on_prompt False: to edit generated tokens, give the config positions 'decode' "
        "or 'all+decode'"
    )
