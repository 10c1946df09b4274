r"""How much each row of a batch gets of its edits, for objectives that draw strengths in training.

$h + f_i\,\mathrm{edit}(h)$ in row i; or, in rows from which an edit's direction v is removed,
$h - \max(h^\top v, 0)\,v / \|v\|^2$.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .base import has_factors
from .factors import Factors, side_by_side
from .losses import EditsRows
from .row_edits import RowEdit


@dataclass(frozen=True, eq=False)
class RowStrengths:
    """A factor of all edits for each row of a batch.

    Args:
        factors: factor of each row.
        removed: mask of rows in which edits take their direction out of hidden states, instead;
            None for no such row.

    Raises:
        ValueError: a mask of another length than the factors.
    """

    factors: Float[Tensor, " batch"]
    removed: Bool[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        if self.removed is not None and len(self.removed) != len(self.factors):
            raise ValueError(
                f"removed: expected {len(self.factors)} entries, one per factor, got "
                f"{len(self.removed)}"
            )

    def __len__(self) -> int:
        return len(self.factors)

    def repeat(self, times: int) -> "RowStrengths":
        """All rows, so many times one after the other."""
        removed = None if self.removed is None else self.removed.repeat(times)
        return RowStrengths(self.factors.repeat(times), removed)

    def repeat_interleave(self, times: int) -> "RowStrengths":
        """Each row so many times in succession."""
        removed = None if self.removed is None else self.removed.repeat_interleave(times)
        return RowStrengths(self.factors.repeat_interleave(times), removed)

    def of(self, edit: RowEdit) -> RowEdit:
        """An edit by factors with these strengths, one for each of its rows of hidden states.

        Raises:
            ValueError: a direction is removed, and the edit has none.
        """
        if self.removed is None:
            gates = self.factors[:, None].to(edit.factors.up).expand(-1, edit.factors.rows)
            if edit.gates is not None:
                gates = gates * edit.gates
            return RowEdit(edit.factors, gates, edit.dropout, edit.keeps_norm)
        if edit.gates is not None and len(edit.factors.up) > 1:  # which choose among directions
            raise ValueError(NO_DIRECTION)
        parts = [edit.factors, removal(edit.factors)]
        by_edit = [self.factors.masked_fill(self.removed, 0), self.removed.to(self.factors)]
        factors, owners = side_by_side(parts)
        by_part = torch.stack(by_edit, -1).to(factors.up)
        by_row = by_part.index_select(-1, owners.to(by_part.device))
        if edit.gates is not None:
            before = by_row.new_ones(by_row.shape)
            before[:, owners == 0] = edit.gates
            by_row = by_row * before
        return RowEdit(factors, by_row, edit.dropout, edit.keeps_norm)

    def of_delta(self, delta: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
        """A change of hidden states with these strengths, one for each of them.

        Raises:
            ValueError: a direction is removed: such an edit has none.
        """
        if self.removed is not None:
            raise ValueError(NO_DIRECTION)
        return delta * self.factors[:, None].to(delta)


NO_DIRECTION = (
    "a direction is removed in some rows, and the unit has none: expected one whose edit is a "
    "vector, such as bias, or has rank 1 and no activation"
)


def has_direction(unit: object) -> bool:
    """Whether a unit's edit has one direction, which can be taken out of hidden states."""
    if not has_factors(unit) or isinstance(unit, EditsRows):  # which edit otherwise in training
        return False
    factors = unit.factors()
    return vector_of(factors) is not None or _has_rank_one(factors)


def edit_vector(unit: object) -> Float[Tensor, " hidden"] | None:
    """The vector that a unit adds to all hidden states, before a gate of tokens has its share.

    None where the unit adds something else, or where prompts decide.
    """
    return vector_of(unit.factors()) if has_factors(unit) else None


def removal(factors: Factors) -> Factors:
    r"""What takes an edit's direction out of hidden states, as an edit of rank 1.

    Of an edit that adds a vector v, it is $-\max(h^\top v, 0)\,v / \|v\|^2$. Another edit of rank 1
    has no sign: $-(h^\top v)\,v / \|v\|^2$ with v its row of U. Where v is 0, nothing is removed.

    Raises:
        ValueError: the edit has no single direction.
    """
    act: str | None = "relu"
    vector = vector_of(factors)
    if vector is None:
        if not _has_rank_one(factors):
            raise ValueError(NO_DIRECTION)
        vector, act = factors.up[0], None
    unit = F.normalize(vector, dim=0)[None]
    return Factors(unit, torch.zeros_like(unit[:, 0]), -unit, ((act, 1),))


def vector_of(factors: Factors) -> Float[Tensor, " hidden"] | None:
    """The vector that an edit adds to all hidden states; None where it adds something else."""
    return (factors.bias[:, None] * factors.up).sum(0) if factors.is_constant else None


def _has_rank_one(factors: Factors) -> bool:
    is_one = len(factors.up) == 1 and factors.diagonal is None
    return is_one and not factors.acts[0][0]
