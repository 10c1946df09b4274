r"""Units that say in `forward` what they do, as pyvene's classes and pyreft's subclasses do.

Ours say it in `edit`, of which `forward` is made. Where a class overrides `forward`, it runs as it
is written, and the edit is $\mathrm{forward}(h) - h$.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn

from .columns import Columns, spread_columns, taken_columns
from .gates import gate_of


class _LastOutputs(threading.local):
    def __init__(self) -> None:
        self.by_unit: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


_last_outputs = _LastOutputs()


def last_outputs(units: Iterable[nn.Module]) -> list[Any]:
    """What units returned last that is more than hidden states: pyvene's `InterventionOutput`.

    Each thread has that of its own passes.
    """
    return [_last_outputs.by_unit[u] for u in units if u in _last_outputs.by_unit]


@dataclass(frozen=True)
class RowSubspaces:
    """What `forward` gets as `subspaces`: a list with an entry for each row, or any other value."""

    values: Any

    def repeat(self, times: int, *_: int) -> "RowSubspaces":
        """All rows, so many times one after the other."""
        return self._of_rows(lambda rows: rows * times)

    def repeat_interleave(self, times: int, _: int = 0) -> "RowSubspaces":
        """Each row so many times in succession."""
        return self._of_rows(lambda rows: [row for row in rows for _ in range(times)])

    def _of_rows(self, change: Any) -> "RowSubspaces":
        return RowSubspaces(change(self.values)) if isinstance(self.values, list) else self


class GatedUnit(nn.Module):
    """An adapter's unit without factors, in a batch with others: one of the gates is its own.

    Args:
        unit: the unit.
        owner: the number of its adapter, which is the column of its gate.
        columns: columns of the hidden states that it edits; None for all.
        width: width of the hidden states, where it edits columns of them.
    """

    has_own_forward: ClassVar[bool] = True

    def __init__(
        self,
        unit: nn.Module,
        owner: int,
        columns: Columns | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.unit, self.owner, self.columns = unit, owner, columns
        self.hidden_size = unit.hidden_size if columns is None else width

    def delta(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        gates: Float[Tensor, "*#rows adapters"] | RowSubspaces | None = None,
        scale: float | Tensor = 1.0,
    ) -> Float[Tensor, "*rows hidden"]:
        """The unit's edit, times its adapter's gate and a scale, before its own gate."""
        unit: Any = self.unit
        strength: Any = scale
        if isinstance(gates, Tensor):
            strength = gates[..., self.owner, None].to(hidden) * scale
        part = hidden if self.columns is None else taken_columns(hidden, self.columns)
        if gate_of(unit) is not None:
            delta: Tensor = unit.delta(part, scale=strength)
        else:
            delta = unit.delta(part)
            delta = delta * (strength.to(delta) if isinstance(strength, Tensor) else strength)
        if self.columns is None:
            return delta
        return spread_columns(delta, self.columns, hidden.shape[-1])


def own_edit(
    unit: nn.Module,
    hidden: Float[Tensor, "*batch positions hidden"],
    gates: Tensor | RowSubspaces | None = None,
) -> Float[Tensor, "*batch positions hidden"]:
    r"""$\mathrm{forward}(h) - h$ of a unit, which gets hidden states as pyvene passes them.

    Args:
        unit: the unit.
        hidden: hidden states.
        gates: the `subspaces` of the rows; None for none.

    Raises:
        ValueError: gates of another kind, or a result of another shape than the hidden states.
    """
    name = type(unit).__name__
    if isinstance(gates, Tensor):
        raise ValueError(f"{name} has a forward of its own, of which no part can be taken")
    states = hidden if hidden.dim() > 2 else hidden[None]
    shape = states.shape
    is_flat = not getattr(unit, "keep_last_dim", True) and getattr(
        unit, "is_repr_distributed", True
    )
    before = states.flatten(1) if is_flat else states
    # A copy, since pyvene's own classes write into the states that they get.
    after = unit.forward(before.clone(), None, None if gates is None else gates.values)
    if not isinstance(after, Tensor) and hasattr(after, "output"):  # of pyvene
        _last_outputs.by_unit[unit] = after
        after = after.output
    if not isinstance(after, Tensor) or after.shape != before.shape:
        result = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
        raise ValueError(f"{name}.forward: expected hidden states {tuple(shape)}, got {result}")
    return (after.view(shape) - states).view(hidden.shape)
