r"""The ReFT family: low-rank edits of hidden states.

| class | formula | rows of the projection |
|---|---|---|
| `LoreftIntervention` | $h + R^\top(\sigma(Wh + b) - Rh)$ | orthonormal |
| `NoreftIntervention` | $h + W_2^\top(\sigma(W_1h + b) - W_2h)$ | free |
| `DireftIntervention` | $h + R^\top\sigma(Wh + b)$ | orthonormal |
| `NodireftIntervention` | $h + W_2^\top\sigma(W_1h + b)$ | free |
| `ConsreftIntervention` | $h + R^\top(b - Rh)$ | orthonormal |
| `LobireftIntervention` | $h + R^\top b$ | orthonormal |

$R, W, W_1, W_2 \in \mathbb{R}^{r \times d}$, $b \in \mathbb{R}^r$, and $\sigma$ is `act_fn`
(the identity by default). Class names are pyreft's.

Paper: ReFT (arXiv:2404.03592), section 3.2 and appendix. What the paper calls DiReFT is
`NodireftIntervention`.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .base import LowRankIntervention, PyveneFields, ReftArguments, reject_unknown
from .factors import Factors
from .rotation import LowRankRotation


class _Rotated(LowRankIntervention):
    """Edits in the span of R with the learned source $Wh + b$."""

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        **arguments: Unpack[ReftArguments],
    ) -> None:
        super().__init__(embed_dim=embed_dim, low_rank_dimension=low_rank_dimension, **arguments)
        self.rotate_layer = LowRankRotation(embed_dim, low_rank_dimension, self.dtype)
        self.learned_source = nn.Linear(embed_dim, low_rank_dimension, dtype=self.dtype)


class LoreftIntervention(_Rotated):
    r"""LoReFT: $h + R^\top(\sigma(Wh + b) - Rh)$, R with orthonormal rows.

    Arguments as in `ReftIntervention`. Parameters: $2rd + r$.
    """

    def factors(self) -> Factors:
        return _difference(self, self.rotate_layer())


class DireftIntervention(_Rotated):
    r"""DiReFT with orthonormal rows: $h + R^\top\sigma(Wh + b)$.

    Arguments as in `ReftIntervention`. Parameters: $2rd + r$.
    """

    def factors(self) -> Factors:
        return _source(self, self.rotate_layer())


class _Projected(LowRankIntervention):
    """Edits in the span of a free projection W₂ with the learned source $W_1h + b$."""

    reads_bias: ClassVar[bool] = True
    """Whether the formula has a place for a bias of W₂h."""

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        add_bias: bool = False,
        **arguments: Unpack[ReftArguments],
    ) -> None:
        super().__init__(embed_dim=embed_dim, low_rank_dimension=low_rank_dimension, **arguments)
        if not isinstance(add_bias, bool):
            raise ValueError(f"add_bias {add_bias!r}: expected true or false")
        if add_bias and not self.reads_bias:
            raise ValueError("add_bias True: NoDiReFT never reads W2's bias; leave it False")
        self.add_bias = add_bias
        self.proj_layer = nn.Linear(embed_dim, low_rank_dimension, bias=add_bias, dtype=self.dtype)
        self.learned_source = nn.Linear(embed_dim, low_rank_dimension, dtype=self.dtype)


class NoreftIntervention(_Projected):
    r"""NoReFT: $h + W_2^\top(\sigma(W_1h + b) - W_2h)$, W₂ unconstrained.

    Arguments as in `ReftIntervention`, and `add_bias`: give W₂h a bias of its own, as pyreft can.
    Parameters: $2rd + r$.
    """

    def factors(self) -> Factors:
        return _difference(self, self.proj_layer.weight, self.proj_layer.bias)


class NodireftIntervention(_Projected):
    r"""NoDiReFT, the DiReFT of the paper: $h + W_2^\top\sigma(W_1h + b)$, W₂ unconstrained.

    Arguments as in `ReftIntervention`. `add_bias` is accepted for pyreft's sake and must be False:
    the formula has no place for a second bias. Parameters: $2rd + r$.
    """

    reads_bias: ClassVar[bool] = False

    def factors(self) -> Factors:
        return _source(self, self.proj_layer.weight)


class _Constant(LowRankIntervention):
    """Edits in the span of R with a constant source b, which starts uniform in [0, 1)."""

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[PyveneFields],
    ) -> None:
        reject_unknown(type(self), pyvene)  # `act_fn`, which the parent would take
        super().__init__(
            embed_dim=embed_dim,
            low_rank_dimension=low_rank_dimension,
            dropout=dropout,
            dtype=dtype,
            **pyvene,
        )
        self.rotate_layer = LowRankRotation(embed_dim, low_rank_dimension, self.dtype)
        self.learned_source = nn.Parameter(torch.rand(low_rank_dimension, dtype=self.dtype))


class ConsreftIntervention(_Constant):
    r"""ConsReFT: $h + R^\top(b - Rh)$, R with orthonormal rows.

    Arguments as in `ReftIntervention`, without `act_fn`. Parameters: $rd + r$.
    """

    def factors(self) -> Factors:
        basis = self.rotate_layer()
        return Factors(-basis, self.learned_source, basis, ((None, len(basis)),))


class LobireftIntervention(_Constant):
    r"""LoBiReFT: $h + R^\top b$, R with orthonormal rows.

    Arguments as in `ReftIntervention`, without `act_fn`. Parameters: $rd + r$.
    """

    def factors(self) -> Factors:
        basis = self.rotate_layer()
        return Factors(torch.zeros_like(basis), self.learned_source, basis, ((None, len(basis)),))


def _source(unit: _Rotated | _Projected, projection: Tensor) -> Factors:
    r"""$P^\top\sigma(Wh + b)$ for a projection P."""
    source = unit.learned_source
    return Factors(source.weight, source.bias, projection, ((unit.act_fn_name, len(projection)),))


def _difference(
    unit: _Rotated | _Projected, projection: Tensor, offset: Tensor | None = None
) -> Factors:
    r"""$P^\top(\sigma(Wh + b) - Ph - c)$ for a projection P and an offset c."""
    weight, bias = unit.learned_source.weight, unit.learned_source.bias
    if offset is None:
        offset = torch.zeros_like(bias)
    rank = len(projection)
    if unit.act_fn is None:  # one product for Wh - Ph
        wide = torch.promote_types(weight.dtype, torch.float32)  # a difference loses digits
        difference = weight.to(wide) - projection.to(wide)
        return Factors(difference, bias.to(wide) - offset.to(wide), projection, ((None, rank),))
    return Factors(
        torch.cat([weight, projection]),
        torch.cat([bias, offset]),
        torch.cat([projection, -projection]),
        ((unit.act_fn_name, rank), (None, rank)),
    )
