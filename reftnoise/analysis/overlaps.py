"""How alike the subspaces are that adapters edit, two by two.

Adapters are compared as they are loaded on a base, or from their files alone.
"""

import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .._util.errors import one_line
from ..adapters.directory import AdapterFiles, by_unit
from ..adapters.fingerprint import other_values
from ..engine.units import place_name, unit_keys
from ..interventions import has_factors
from ..interventions.arguments import constructor_arguments
from ..training.run_adapter import adapter_directory

Spaces: TypeAlias = Mapping[str, Float[Tensor, "rank hidden"]]
"""Orthonormal rows by site."""


def row_space(matrix: Float[Tensor, "k hidden"]) -> Float[Tensor, "rank hidden"]:
    """An orthonormal basis of what the rows span."""
    _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    return rows[values > values[0] * 1e-6]


def row_spaces(rows: Iterable[tuple[str, Float[Tensor, "k hidden"]]]) -> Spaces:
    """What an adapter's edits span at each site, from the site's name and U of each unit."""
    at_site: dict[str, list[Tensor]] = defaultdict(list)
    for site, up in rows:
        at_site[site].append(up.double())
    return {site: row_space(torch.cat(ups)) for site, ups in at_site.items()}


def overlap_matrix(adapters: Sequence[Spaces]) -> Float[Tensor, "n n"]:
    r"""The mean over common sites of $\|Q_a Q_b^\top\|_F^2 / \min(r_a, r_b)$, for all a and b.

    Q are the adapters' orthonormal rows at a site. NaN where two adapters have no common site.
    """
    at_site: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for number, spaces in enumerate(adapters):
        for site, rows in spaces.items():
            at_site[site][number] = rows
    total, sites = torch.zeros(2, len(adapters), len(adapters), dtype=torch.float64)
    for by_number in at_site.values():
        numbers, bases = torch.tensor(list(by_number)), list(by_number.values())
        ranks = torch.tensor([len(basis) for basis in bases])
        owner = torch.repeat_interleave(ranks)
        joint = torch.cat(bases).cpu()
        blocks = torch.zeros(len(joint), len(ranks), dtype=torch.float64)
        blocks[torch.arange(len(joint)), owner] = 1
        squares = blocks.T @ (joint @ joint.T) ** 2 @ blocks
        index = numbers[:, None], numbers[None]
        total[index] += squares / torch.minimum(ranks[:, None], ranks[None]).clamp(min=1)
        sites[index] += 1
    return (total / sites).float()


def saved_overlaps(adapters: Mapping[str, str | Path]) -> tuple[list[str], Float[Tensor, "n n"]]:
    """`inspection.library_overlaps`, but from files alone, without the base.

    Sites are compared by their names in the config: only the base could tell that a component and a
    dotted path are one module. A PEFT method and trained weights of the base do not count.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: an adapter is damaged, or for another base than the first.
    """
    files = {name: AdapterFiles.read(adapter_directory(path)) for name, path in adapters.items()}
    _expect_one_base(files)
    return list(files), overlap_matrix([row_spaces(_rows(adapter)) for adapter in files.values()])


def _expect_one_base(files: Mapping[str, AdapterFiles]) -> None:
    (name, first), *others = files.items()
    for _, other in others:
        other.expect_base(first.shape, first.base.get("name_or_path"), whose=f"that of {name}")
        differing = other_values(other.base.get("sample", {}), first.base.get("sample", {}))
        if differing:
            raise ValueError(
                f"{other.config_path}: the adapter's base ({other.base_name}) and that of {name} "
                f"({first.base_name}) have different weights, as in {differing}"
            )


def _rows(files: AdapterFiles) -> Iterator[tuple[str, Tensor]]:
    """Site and U of each unit. The unit is built as for a base, since its class knows U."""
    weights = by_unit(files.weights())
    for key, entry, layer, _ in unit_keys(files.config, files.base.get("num_hidden_layers") or 0):
        # What is elementwise in each head has no U, and no width of a head in its file.
        if entry.is_noise or "head_width" in constructor_arguments(entry.unit_class):
            continue
        state = weights.get(key, {})
        # No rank exceeds the width, so the width is the largest of all dimensions.
        width = max((size for tensor in state.values() for size in tensor.shape), default=1)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                unit = entry.build(None, width)  # draws weights
                if not has_factors(unit):
                    continue
                unit.load_state_dict(state)
                factors = unit.factors()
                if not all(tensor.isfinite().all() for tensor in factors.tensors):
                    raise ValueError("holds numbers that are not finite")
                if factors.diagonal is None:
                    yield place_name(entry, layer), factors.up
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{files.weights_path}: {key}: {one_line(error)}") from None


def overlaps_by_name(
    names: Sequence[str], matrix: Float[Tensor, "n n"]
) -> dict[str, dict[str, float | None]]:
    """The matrix by the names of its rows and columns; None in place of NaN."""
    rows = [[None if math.isnan(v) else round(v, 6) for v in row] for row in matrix.tolist()]
    return {name: dict(zip(names, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def show_overlaps(names: Sequence[str], matrix: Float[Tensor, "n n"], console: Console) -> None:
    """Print the matrix as a table, which is never cut; a terminal may wrap it."""
    console.print(
        "Mean cos² of the angles between the subspaces that two adapters edit, over their common "
        "sites: 1 where one holds the other, 0 where they are orthogonal, – without a common site."
    )
    table = Table(title="Overlaps", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(Text(textwrap.fill(name, 10)), justify="right", no_wrap=True)
    for name, row in overlaps_by_name(names, matrix).items():
        table.add_row(Text(name), *("–" if v is None else f"{v:.2f}" for v in row.values()))
    unbound = console.options.update(max_width=sys.maxsize)
    console.width = max(console.width, console.measure(table, options=unbound).maximum)
    console.print(table)
