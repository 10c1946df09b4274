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

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .arguments import PyreftFields, ReftArguments, reject_unknown
from .factors import Activation, Factors
from .formed import FormedIntervention
from .pyreft_layers import PyreftRotation, state_of_ours
from .rotation import LowRankRotation, expect_orthonormal


class _Pyreft(FormedIntervention):
    """A class that pyreft has too."""

    unread_arguments: ClassVar[frozenset[str]] = frozenset({"device", "init_orth", "add_bias"})

    @property
    def rotate_layer(self) -> Any:
        """R: called without hidden states it returns R, and with them Rh.

        A class with a `forward` of its own is written for pyreft: its `rotate_layer.weight` is R as
        pyreft has it, [hidden, rank], and not our raw parameter.
        """
        layer = super().__getattr__("rotate_layer")
        if self.has_own_forward and isinstance(layer, LowRankRotation):
            return PyreftRotation(layer)
        return layer

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state, also one that pyreft's class of the same name has written.

        Raises:
            ValueError: a state of pyreft whose R is not orthonormal, or of another shape.
        """
        if "rotate_layer.weight" not in state_dict:
            state_dict = state_of_ours(state_dict)
            if (rotation := state_dict.get("rotate_layer.weight")) is not None:
                expect_orthonormal(rotation * 2)
        return super().load_state_dict(state_dict, *args, **kwargs)


class _Rotated(_Pyreft):
    """Edits in the span of R with the learned source $Wh + b$."""

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        **arguments: Unpack[ReftArguments],
    ) -> None:
        super().__init__(embed_dim=embed_dim, low_rank_dimension=low_rank_dimension, **arguments)
        rotation = LowRankRotation(embed_dim, low_rank_dimension, self.dtype)
        self.register_module("rotate_layer", rotation)
        self.learned_source = nn.Linear(embed_dim, low_rank_dimension, dtype=self.dtype)

    def parts(self) -> tuple[Tensor, ...]:
        return self.rotate_layer(), self.learned_source.weight, self.learned_source.bias


class LoreftIntervention(_Rotated):
    r"""LoReFT: $h + R^\top(\sigma(Wh + b) - Rh)$, R with orthonormal rows.

    Arguments as in `ReftIntervention`. Parameters: $2rd + r$.
    """

    def form(self, *parts: Tensor) -> Factors:
        return difference(self.activation, *parts)


class DireftIntervention(_Rotated):
    r"""DiReFT with orthonormal rows: $h + R^\top\sigma(Wh + b)$.

    Arguments as in `ReftIntervention`. Parameters: $2rd + r$.
    """

    def form(self, *parts: Tensor) -> Factors:
        return source(self.activation, *parts)


class _Projected(_Pyreft):
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
        self.add_bias = add_bias and self.reads_bias
        self.proj_layer = nn.Linear(
            embed_dim, low_rank_dimension, bias=self.add_bias, dtype=self.dtype
        )
        self.learned_source = nn.Linear(embed_dim, low_rank_dimension, dtype=self.dtype)

    def parts(self) -> tuple[Tensor, ...]:
        source, projection = self.learned_source, self.proj_layer
        offset = () if projection.bias is None else (projection.bias,)
        return projection.weight, source.weight, source.bias, *offset


class NoreftIntervention(_Projected):
    r"""NoReFT: $h + W_2^\top(\sigma(W_1h + b) - W_2h)$, W₂ unconstrained.

    Arguments as in `ReftIntervention`, and `add_bias`: give W₂h a bias of its own, as pyreft can.
    Parameters: $2rd + r$.
    """

    def form(self, *parts: Tensor) -> Factors:
        return difference(self.activation, *parts)


class NodireftIntervention(_Projected):
    r"""NoDiReFT, the DiReFT of the paper: $h + W_2^\top\sigma(W_1h + b)$, W₂ unconstrained.

    Arguments as in `ReftIntervention`. `add_bias` is taken for pyreft's sake, whose bias of W₂ has
    no place in the formula either. Parameters: $2rd + r$.
    """

    reads_bias: ClassVar[bool] = False

    def form(self, *parts: Tensor) -> Factors:
        return source(self.activation, *parts)


class ConstantArguments(PyreftFields, total=False):
    """Arguments that classes without an activation do not read."""

    act_fn: Any


class _Constant(_Pyreft):
    """Edits in the span of R with a constant source b, which starts uniform in [0, 1)."""

    unread_arguments = _Pyreft.unread_arguments | {"act_fn"}

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[ConstantArguments],
    ) -> None:
        reject_unknown(type(self), pyvene)
        pyvene.pop("act_fn", None)  # which the parent would take
        super().__init__(
            embed_dim=embed_dim,
            low_rank_dimension=low_rank_dimension,
            dropout=dropout,
            dtype=dtype,
            **pyvene,
        )
        rotation = LowRankRotation(embed_dim, low_rank_dimension, self.dtype)
        self.register_module("rotate_layer", rotation)
        self.learned_source = nn.Parameter(torch.rand(low_rank_dimension, dtype=self.dtype))

    def parts(self) -> tuple[Tensor, ...]:
        return self.rotate_layer(), self.learned_source


class ConsreftIntervention(_Constant):
    r"""ConsReFT: $h + R^\top(b - Rh)$, R with orthonormal rows.

    Arguments as in `ReftIntervention`, without `act_fn`. Parameters: $rd + r$.
    """

    def form(self, *parts: Tensor) -> Factors:
        basis, constant = parts
        return Factors(-basis, constant, basis, ((None, basis.shape[-2]),))


class LobireftIntervention(_Constant):
    r"""LoBiReFT: $h + R^\top b$, R with orthonormal rows.

    Arguments as in `ReftIntervention`, without `act_fn`. Parameters: $rd + r$.
    """

    def form(self, *parts: Tensor) -> Factors:
        basis, constant = parts
        acts = ((None, basis.shape[-2]),)
        return Factors(torch.zeros_like(basis), constant, basis, acts, is_constant=True)


def source(
    act: str | Activation | None, projection: Tensor, weight: Tensor, bias: Tensor
) -> Factors:
    r"""$P^\top\sigma(Wh + b)$ for a projection P."""
    return Factors(weight, bias, projection, ((act, projection.shape[-2]),))


def difference(
    act: str | Activation | None,
    projection: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor | None = None,
) -> Factors:
    r"""$P^\top(\sigma(Wh + b) - Ph - c)$ for a projection P and an offset c."""
    rank = projection.shape[-2]
    if act is None:  # one product for Wh - Ph
        wide = torch.promote_types(weight.dtype, torch.float32)  # a difference loses digits
        bias = bias.to(wide) if offset is None else bias.to(wide) - offset.to(wide)
        return Factors(weight.to(wide) - projection.to(wide), bias, projection, ((None, rank),))
    if offset is None:
        offset = torch.zeros_like(bias)
    return Factors(
        torch.cat([weight, projection], dim=-2),
        torch.cat([bias, offset], dim=-1),
        torch.cat([projection, -projection], dim=-2),
        ((act, rank), (None, rank)),
    )
