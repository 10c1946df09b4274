r"""Edits without activation as changes of the matrices next to them, in float64.

Such an edit is $h \mapsto Mh + v$ with $M = I + U^\top D + \mathrm{diag}(s)$. After a linear layer
$y = Wx + c$, it is the layer $W' = MW$, $c' = Mc + v$; before it, $W' = WM$, $c' = c + Wv$. What D
and U change of W has their rank k: $U^\top(DW)$, and $(WU^\top)D$.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...engine.units import PlacedUnit
from ...interventions import Columns, Factors, gate_of, has_factors


def is_foldable(module: nn.Module) -> bool:
    """Whether a module holds a plain matrix: quantised layers are subclasses of these."""
    is_scaled = isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
    return is_scaled or type(module) in (nn.Linear, Conv1D, nn.Embedding)


def _scale(module: Any) -> float:
    """What an embedding multiplies its rows by, as those of Gemma do."""
    scale = getattr(module, "embed_scale", 1.0) if isinstance(module, nn.Embedding) else 1.0
    return float(torch.as_tensor(scale).to(module.weight.dtype))


@dataclass(frozen=True)
class LinearEdit:
    r"""$h \mapsto h + U^\top Dh + s \odot h + v$ in float64, of some features of a layer."""

    down: Float[Tensor, "k hidden"]
    up: Float[Tensor, "k hidden"]
    scaling: Float[Tensor, " hidden"] | None
    """s; None where it is 0."""
    constant: Float[Tensor, " hidden"]
    """v."""
    columns: slice | list[int] = field(default_factory=lambda: slice(None))

    @property
    def is_constant(self) -> bool:
        """Whether all hidden states get the same."""
        return len(self.down) == 0 and self.scaling is None

    @classmethod
    def of(cls, placed: PlacedUnit) -> "LinearEdit":
        """The edit of a unit; a ValueError says why it is none of every token alike."""
        unit, site, positions = placed.unit, placed.site, placed.positions
        name = type(unit).__name__
        if isinstance(unit, nn.Module) and gate_of(unit) is not None:
            raise ValueError(
                "its gate makes the edit depend on states, or on the prompt, otherwise than "
                "linearly; exact is one without gate"
            )
        if not has_factors(unit):
            raise ValueError(f"{name} computes its edit by code of its own, which no weights do")
        factors = unit.factors().detach()
        if acts := [act for act, _ in factors.acts if act]:
            kind = acts[0] if isinstance(acts[0], str) else type(acts[0]).__name__
            raise ValueError(
                f"its activation {kind} makes the edit no linear map; exact is one without act_fn"
            )
        if positions is None or positions.spec() != "all+decode":
            spec = None if positions is None else positions.spec()
            raise ValueError(
                f"positions {spec!r}: weights act on every token; exact is 'all+decode'"
            )
        edit = cls.by_factors(factors, site.columns)
        if site.is_parallel and not edit.is_constant:
            raise ValueError(
                "the edit is computed of the module's input and added to its output, around what "
                "is not linear in between; exact is a constant, such as bias"
            )
        return edit

    @classmethod
    def by_factors(cls, factors: Factors, columns: Columns | None = None) -> "LinearEdit":
        """The edit of factors that have no activation."""
        down, bias, up = (tensor.cpu().double() for tensor in factors[:3])
        used = down.any(1) & up.any(1)
        scaling = factors.scaling(None)
        scaling = None if scaling is None else scaling.cpu().double()
        return cls(
            down=down[used],
            up=up[used],
            scaling=scaling if scaling is not None and scaling.any() else None,
            constant=bias @ up,
            columns=slice(None)
            if columns is None
            else [column for run in columns for column in range(*run)],
        )


@dataclass
class FoldedLayer:
    """A layer's matrix and bias in float64, into which edits are folded.

    An embedding is the linear layer that reads one-hot tokens: its matrix is transposed, and its
    bias part of each of its rows.
    """

    module: Any
    weight: Float[Tensor, "out in"] = field(init=False)
    bias: Float[Tensor, " out"] = field(init=False)
    products: list[tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]] = field(
        init=False, default_factory=list
    )
    """B and A of each edit: what was added to the matrix, but for diagonal parts."""
    has_diagonal: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        weight = self.module.weight.detach().cpu().double() * _scale(self.module)
        self.weight = weight.clone() if isinstance(self.module, nn.Linear) else weight.T.clone()
        own = getattr(self.module, "bias", None)
        self.bias = weight.new_zeros(len(self.weight))
        if own is not None:
            self.bias = own.detach().cpu().double()
        self.before = self.bias.clone()

    @property
    def shift(self) -> Float[Tensor, " out"]:
        """What was added to the bias."""
        return self.bias - self.before

    def fold_before(self, edit: LinearEdit) -> None:
        """Let the layer read edited states."""
        columns = self.weight[:, edit.columns]
        self.bias = self.bias + columns @ edit.constant
        up, down = columns @ edit.up.T, edit.down.new_zeros(len(edit.down), self.weight.shape[1])
        down[:, edit.columns] = edit.down
        scaled = None if edit.scaling is None else columns * edit.scaling
        self._add(up, down)
        if scaled is not None:
            self.weight[:, edit.columns] += scaled
            self.has_diagonal = True

    def fold_after(self, edit: LinearEdit) -> None:
        """Let the layer return edited states."""
        rows, bias = self.weight[edit.columns], self.bias[edit.columns]
        shift = edit.constant + edit.up.T @ (edit.down @ bias)
        up, down = edit.up.new_zeros(len(self.weight), len(edit.up)), edit.down @ rows
        up[edit.columns] = edit.up.T
        scaled = None
        if edit.scaling is not None:
            shift, scaled = shift + edit.scaling * bias, edit.scaling[:, None] * rows
        self._add(up, down)
        if scaled is not None:
            self.weight[edit.columns] += scaled
            self.has_diagonal = True
        self.bias = self.bias.clone()
        self.bias[edit.columns] += shift

    def _add(self, up: Tensor, down: Tensor) -> None:
        if len(down):
            self.weight += up @ down
            self.products.append((up, down))

    def write(self) -> None:
        """Put matrix and bias into the module, in its dtype; a bias that it needs must be there."""
        target = self.module.weight
        if isinstance(self.module, nn.Embedding):
            matrix = (self.weight + self.bias[:, None]).T / _scale(self.module)
        else:
            matrix = self.weight if isinstance(self.module, nn.Linear) else self.weight.T
        target.data.copy_(matrix)
        own = getattr(self.module, "bias", None)
        if own is not None:
            own.data.copy_(self.bias)

    def factors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """B and A of all edits together."""
        ups: Sequence[Tensor] = [up for up, _ in self.products]
        downs: Sequence[Tensor] = [down for _, down in self.products]
        empty = self.weight.new_zeros(len(self.weight), 0), self.weight[:0]
        return torch.cat([empty[0], *ups], dim=1), torch.cat([empty[1], *downs])
