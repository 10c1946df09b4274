"""What an adapter or a run is, read from its files alone, without its base."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..adapters.directory import AdapterFiles, by_unit
from ..adapters.location import ADAPTER
from ..config.representations import ReftConfig
from ..engine.units import place_name, unit_keys
from ..interventions.rotation import orthonormal_rows
from ..training.run_adapter import adapter_directory
from ..training.run_files import LOCK, SCORES
from ..training.run_scores import print_scores

SHORT = {"learned_source.weight": "W", "learned_source.bias": "b", "scaling": "s"}
"""Tensors' names in formulas."""


@dataclass(frozen=True)
class UnitDescription:
    """One set of weights of an adapter.

    Args:
        key: pyvene's key, under which the weights are stored.
        rank: rank of its edits; None for units that have none.
        norms: Frobenius norm of each tensor; for a rotation that of R itself, which is √rank.
        orthonormality_error: the largest entry of |RRᵀ − I|; None for units without a rotation.
        layer: layer of its site; None where there is none.
        gate: type of its gate; None for units that have none.
    """

    key: str
    intervention: str
    site: str
    positions: str
    rank: int | None
    parameters: int
    norms: dict[str, float]
    orthonormality_error: float | None
    layer: int | None = None
    gate: str | None = None


@dataclass(frozen=True)
class Description:
    """An adapter, and the run that it came from.

    Args:
        base: name, shape and fingerprint of the base, as saved.
        units: units with trained weights.
        noises: entries of the config that have no weights.
        peft: section `peft` of the config.
        peft_parameters: number of parameters of the PEFT method and of trained weights of the base.
        sha256: digest of the weights; the adapter's own identity.
        files: size of each file of the adapter in bytes.
    """

    directory: str
    base: dict[str, Any]
    units: list[UnitDescription]
    noises: list[dict[str, Any]]
    peft: dict[str, Any] | None
    peft_parameters: int
    sha256: str | None
    files: dict[str, int]
    scores: list[dict[str, Any]]


def describe(directory: str | Path) -> Description:
    """Read the directory of a run or of an adapter, or a hub adapter.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: its config or weights are damaged.
    """
    adapter = adapter_directory(directory)
    files = AdapterFiles.read(adapter)
    weights = files.weights()
    by_key = by_unit(weights)
    unit_parameters = sum(t.numel() for state in by_key.values() for t in state.values())
    scores = adapter.parent / SCORES
    has_scores = adapter.name == ADAPTER and scores.is_file()
    return Description(
        directory=str(adapter),
        base=files.base,
        units=_units(files.config, by_key, files.base.get("num_hidden_layers")),
        noises=[entry.to_dict() for entry in files.config.representations if entry.is_noise],
        peft=files.config.peft,
        peft_parameters=sum(t.numel() for t in weights.values()) - unit_parameters,
        sha256=files.sha256,
        files={
            file.name: file.stat().st_size
            for file in sorted(adapter.iterdir())
            if file.is_file() and file.name != LOCK
        },
        scores=json.loads(scores.read_text(encoding="utf-8")) if has_scores else [],
    )


def _units(
    config: ReftConfig, by_key: dict[str, dict[str, Tensor]], layers: int | None
) -> list[UnitDescription]:
    units = []
    for key, entry, layer, positions in unit_keys(config, layers or 0):
        if key not in by_key:  # noise, which has no weights
            continue
        state = by_key[key]
        rotation = "rotate_layer.weight"
        named = {("R" if n == rotation else n): t.float() for n, t in state.items()}
        error = None
        if rotation in state:
            basis = named["R"] = orthonormal_rows(state[rotation].float())
            error = float((basis @ basis.mT - torch.eye(len(basis))).abs().max())
        units.append(
            UnitDescription(
                key=key,
                intervention=str(entry.intervention),
                site=place_name(entry, layer),
                positions=str(positions),
                rank=entry.arguments.get("low_rank_dimension"),
                parameters=sum(tensor.numel() for tensor in state.values()),
                norms={name: round(float(t.norm()), 6) for name, t in named.items()},
                orthonormality_error=error,
                layer=layer,
                gate=None if entry.gate is None else entry.gate["type"],
            )
        )
    return units


def show(description: Description, console: Console) -> None:
    """Print a description as tables."""
    about = Table.grid(padding=(0, 2))
    for name, value in _facts(description).items():
        about.add_row(Text(name, style="dim"), Text(value))
    units = Table(title="Units", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("unit", "site", "positions", "rank", "parameters", "norms", "|RRᵀ − I|")
    numbers = ("rank", "parameters", "|RRᵀ − I|")
    for heading in columns:
        is_number = heading in numbers
        units.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for alike in folded(description.units):
        units.add_row(*_row(alike))
    for noise in description.noises:
        units.add_row(noise["intervention"], noise["component"], "", "", "0", "")
    console.print(Group(about, units))
    print_scores(description.scores, console)


def folded(units: Iterable[UnitDescription]) -> list[list[UnitDescription]]:
    """Units that differ in their layer and weights alone, together."""
    groups: dict[tuple[Any, ...], list[UnitDescription]] = defaultdict(list)
    for unit in units:
        place = unit.site if unit.layer is None else unit.site.removesuffix(str(unit.layer))
        tensors = tuple(unit.norms)
        kind = (unit.intervention, unit.gate, unit.rank, unit.parameters, tensors)
        groups[place, unit.positions, kind].append(unit)
    return list(groups.values())


def _row(units: Sequence[UnitDescription]) -> list[str]:
    """The cells of such units; where they differ, the least and the greatest number."""
    first, count = units[0], len(units)
    site = first.site
    layers = [unit.layer for unit in units if unit.layer is not None]
    if len(layers) > 1:
        site = f"{site.removesuffix(f' {layers[0]}')}s {ranges(layers)}"
    norms = []
    for name in first.norms:
        ends = dict.fromkeys(f"{end(unit.norms[name] for unit in units):.3g}" for end in (min, max))
        norms.append(f"{SHORT.get(name, name)} {' to '.join(ends)}")
    errors = [e for unit in units if (e := unit.orthonormality_error) is not None]
    return [
        first.intervention if first.gate is None else f"{first.intervention}, gate {first.gate}",
        site,
        first.positions,
        "" if first.rank is None else str(first.rank),
        f"{first.parameters:,}" if count == 1 else f"{count} × {first.parameters:,}",
        ", ".join(norms),
        f"{max(errors):.0e}" if errors else "",
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers, with runs of them as `0-29`, in ascending order."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _facts(description: Description) -> dict[str, str]:
    base, peft, outside = description.base, description.peft, description.peft_parameters
    name, kind = base.get("name_or_path") or "without a name", base.get("model_type")
    layers = f"{base.get('num_hidden_layers')} layers of width {base.get('hidden_size')}"
    total = sum(unit.parameters for unit in description.units)
    facts = {
        "adapter": description.directory,
        "base": f"{name} ({kind}, {layers})",
        "peft": "" if peft is None else json.dumps(peft, ensure_ascii=False),
        "not of units": f"{outside:,} parameters" if outside else "",
        "parameters": f"{total + outside:,}",
        "weights": f"sha256 {description.sha256 or 'unknown'}",
        "files": ", ".join(f"{name} {size:,} B" for name, size in description.files.items()),
    }
    return {name: value for name, value in facts.items() if value}
