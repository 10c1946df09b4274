"""What pyvene's config says apart from its entries."""

from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import Any, TypedDict


class PyveneConfig(TypedDict, total=False):
    """Arguments of pyvene's `IntervenableConfig` that are taken here."""

    intervention_types: Any
    """The class of entries that name no intervention, or a list with one for each entry."""
    mode: str
    """`"parallel"`, as units read one input alone."""
    sorted_keys: Any
    model_type: Any
    intervention_dimensions: Any
    intervention_constant_sources: Any


def entries_of_pyvene(representations: Any, arguments: PyveneConfig) -> Any:
    """The entries as ours: pyvene's tuples become mappings, and each has its intervention.

    Args:
        representations: an entry or a list of entries, of pyvene or ours.
        arguments: of pyvene's config. What it writes itself or does not read has no effect.

    Raises:
        TypeError: an argument that pyvene's config has not.
        ValueError: another mode, another number of types, or entries that are to share weights.
    """
    possible = PyveneConfig.__annotations__
    if unknown := [name for name in arguments if name not in possible]:
        raise TypeError(f"ReftConfig got an unknown argument {unknown[0]!r}")
    mode, types = arguments.get("mode", "parallel"), arguments.get("intervention_types")
    if mode != "parallel":
        raise ValueError(f"mode {mode!r}: expected 'parallel', as units read one input alone")
    if hasattr(representations, "_asdict"):
        representations = [representations]
    if not isinstance(representations, Sequence) or isinstance(representations, str):
        if types is None or not isinstance(representations, Mapping):
            return representations
        representations = [representations]
    entries = [_as_mapping(entry) for entry in representations]
    _expect_own_weights(entries)
    if types is None:
        return entries
    if not isinstance(types, Sequence):
        types = [types] * len(entries)
    if len(types) != len(entries):
        raise ValueError(f"intervention_types: expected {len(entries)}, one for each entry")
    return [_with_type(entry, cls) for entry, cls in zip(entries, types, strict=True)]


def _as_mapping(entry: Any) -> Any:
    """pyvene's tuple as a mapping of what it says."""
    if not hasattr(entry, "_asdict"):
        return entry
    return {
        key: value for key, value in methodcaller("_asdict")(entry).items() if value is not None
    }


def _with_type(entry: Any, cls: type) -> Any:
    if not isinstance(entry, Mapping) or {"intervention", "intervention_type"} & set(entry):
        return entry
    return {**entry, "intervention_type": cls}


def _expect_own_weights(entries: Sequence[Any]) -> None:
    first: dict[Any, int] = {}
    for number, entry in enumerate(entries):
        key = entry.get("intervention_link_key") if isinstance(entry, Mapping) else None
        if key is not None and first.setdefault(key, number) != number:
            raise ValueError(
                f"representations[{number}]: intervention_link_key {key!r} is that of "
                f"representations[{first[key]}], too; units share no weights: one edits several "
                "positions, such as 'f1+l1'"
            )
