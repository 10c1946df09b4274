"""Edits whose factors are a formula of a few tensors, computed at once for all units of one shape.

A model has such a unit at each of its layers. What is computed of weights alone, as W − R or a
cast, is then one operation of a training step instead of one a layer, in both directions.
"""

import contextlib
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .base import LowRankIntervention
from .factors import Factors
from .rotation import LowRankRotation, shared_bases
from .row_edits import outside_autocast


class FormedIntervention(LowRankIntervention):
    """An edit whose factors `form` makes of `parts`."""

    _shared: Factors | None = None

    @abstractmethod
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors of which the factors are made."""

    @abstractmethod
    def form(self, *parts: Tensor) -> Factors:
        """The factors, of parts that may have a dimension of units before their own.

        They depend on the parts and on `activation` alone: one unit makes those of all.
        """

    def factors(self) -> Factors:
        return self.form(*self.parts()) if self._shared is None else self._shared

    def _factors_in(self, dtype: torch.dtype) -> Factors:
        shared = self._shared
        if shared is None or torch.promote_types(dtype, shared.up.dtype) is shared.up.dtype:
            return self.factors()
        return self.form(*self.parts())  # the hidden states are wider than was expected

    def wide_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self._shared is None:
            return super().wide_dtype(dtype)
        return torch.promote_types(dtype, self._shared.up.dtype)


@contextlib.contextmanager
def shared_factors(
    units: Iterable[nn.Module], dtype: torch.dtype, *, is_wide: bool = True
) -> Iterator[None]:
    """Within the block, factors of units that are trained are computed once, side by side.

    Args:
        units: units, none of whose parameters is spread over processes.
        dtype: dtype of the hidden states that they edit.
        is_wide: whether edits are computed in the weights' dtype where it is wider.
    """
    # Of a base with many units, to look at all of them takes longer than one token.
    may_train = torch.is_grad_enabled() or torch.compiler.is_compiling()
    modules = [unit for unit in dict.fromkeys(units) if may_train or unit.training]
    rotations = [m for unit in modules for m in unit.modules() if isinstance(m, LowRankRotation)]
    shared: list[FormedIntervention] = []
    try:
        with shared_bases(rotations):
            for (_, _, chosen, *_), group in _of_one_form(modules, dtype, is_wide).items():
                with outside_autocast(next(iter(group.values()))[0].device.type):
                    stacked = [torch.stack(parts) for parts in zip(*group.values(), strict=True)]
                    factors = next(iter(group)).form(*stacked)
                each = zip(*(tensor.to(chosen).unbind() for tensor in factors.tensors), strict=True)
                for unit, tensors in zip(group, each, strict=True):
                    unit._shared = factors.of(*tensors)
                    shared.append(unit)
            yield
    finally:
        for unit in shared:
            unit._shared = None


def _of_one_form(
    units: Iterable[nn.Module], dtype: torch.dtype, is_wide: bool
) -> dict[tuple[Any, ...], dict[FormedIntervention, tuple[Tensor, ...]]]:
    """Trained units and their parts, by what they have in common."""
    groups: dict[Any, dict[FormedIntervention, tuple[Tensor, ...]]] = defaultdict(dict)
    for unit in units:
        if not isinstance(unit, FormedIntervention) or unit._shared is not None:
            continue
        # A subclass may say in `factors` itself what they are.
        if unit.is_trained and type(unit).factors is FormedIntervention.factors:
            parts = unit.parts()
            kinds = ((part.shape, part.dtype, part.device) for part in parts)
            chosen = unit.wide_dtype(dtype) if is_wide else dtype
            key = type(unit), unit.activation, chosen, *kinds
            groups[key][unit] = parts
    return groups
