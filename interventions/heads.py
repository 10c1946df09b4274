r"""Elementwise edits of the outputs z of attention heads, which are at `head_output`.

| class | formula | paper |
|---|---|---|
| `LofitIntervention` | $(1 + A) \odot z + v$ | LoFiT (arXiv:2406.01563) |
| `JolaIntervention` | $(1 + g_2A) \odot z + g_1v$, gates of each head | JoLA (arXiv:2502.01179) |

$A, v \in \mathbb{R}^d$, where d is the width of all heads that a unit edits. A and v start at 0,
so that both start as the identity. Both edit every token by default, generated ones too.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from .adapters import EveryTokenIntervention, constant_factors
from .arguments import PyveneFields, reject_unknown
from .factors import Factors
from .losses import AddsLoss

_TEMPERATURE, _LOW, _HIGH, _MARGIN = 0.33, -0.1, 1.1, 1e-6
"""Of the hard-concrete distribution; draws of u keep the margin from 0 and 1."""


class HeadIntervention(AddsLoss, EveryTokenIntervention):
    """An elementwise edit of heads, by default of every token's, that adds a loss."""


class LofitIntervention(HeadIntervention):
    r"""LoFiT: $(1 + A) \odot z + v$, of which A or v, or both, are trained.

    LoFiT has two steps. The first trains A at all heads with the L1 norm as a loss
    (`trained="scaling", l1=5e-4`). `select_heads` returns the heads of the largest ‖A‖, where the
    second trains v, the default. The authors draw both from $N(0, 10^{-6})$ at the start.

    Arguments as in `ReftIntervention`, without rank and `act_fn`, and those below. Parameters: d
    for each of A and v that is trained.

    Args:
        trained: A (`"scaling"`), v (`"bias"`) or `"both"`; what is not trained is 0.
        l1: λ in the added loss $\lambda\lVert A\rVert_1$ of each unit.

    Raises:
        ValueError: an argument out of its range.

    Paper: LoFiT (arXiv:2406.01563), section 3.
    """

    scaling: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        *,
        embed_dim: int,
        trained: str = "bias",
        l1: float = 0.0,
        dropout: float = 0.0,
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[PyveneFields],
    ) -> None:
        reject_unknown(type(self), pyvene)
        super().__init__(embed_dim=embed_dim, dropout=dropout, dtype=dtype, **pyvene)
        if trained not in ("scaling", "bias", "both"):
            raise ValueError(f"trained {trained!r}: expected 'scaling', 'bias' or 'both'")
        self.trained, self.l1 = trained, _weight("l1", l1)
        for name in ("scaling", "bias"):
            is_trained = trained in (name, "both")
            part = nn.Parameter(torch.zeros(embed_dim, dtype=self.dtype)) if is_trained else None
            self.register_parameter(name, part)

    def parts(self) -> tuple[Tensor, ...]:
        """A and v, without elements where it is not trained."""
        trained = [part for part in (self.scaling, self.bias) if part is not None]
        nothing = trained[0].new_empty(0)
        return tuple(nothing if part is None else part for part in (self.scaling, self.bias))

    def form(self, *parts: Tensor) -> Factors:
        scaling, bias = parts
        if not scaling.shape[-1]:
            return constant_factors(bias)
        factors = constant_factors(bias if bias.shape[-1] else torch.zeros_like(scaling))
        return Factors(*factors[:4], diagonal=scaling[..., None, :])

    def added_loss(
        self, progress: Float[Tensor, ""], noted: Sequence[Tensor]
    ) -> Float[Tensor, ""] | None:
        if self.scaling is None or self.l1 == 0.0:
            return None
        return self.l1 * self.scaling.abs().sum()


class JolaIntervention(HeadIntervention):
    r"""JoLA: $(1 + g_2A) \odot z + g_1v$, where each head has a gate g₁ and a gate g₂.

    In training, gates are drawn from hard-concrete distributions, once a pass: with u ~ U(0, 1),
    $c = \sigma((\log u - \log(1 - u) + \log\alpha)/0.33)$ is stretched to (−0.1, 1.1) and clipped
    to [0, 1]. In evaluation, $c = \sigma(\log\alpha)$. Each unit adds the loss
    $\lambda\,(\overline{P_1} + \overline{P_2})$, where $P = \sigma(\log\alpha - 0.33\log(0.1/1.1))$
    is the probability that a gate is open, and the means are over the unit's heads.

    The authors' code starts from λ = 0.1, divided by the number of heads of the whole model, which
    of 1024 heads is our default, and multiplies the second mean by 1 − λ instead of λ. Its decay by
    $e^{-0.01}$ a step is `"decay"` for 500 steps.

    Arguments as in `ReftIntervention`, without rank and `act_fn`, and those below. Parameters: 2d,
    and two for each head.

    Args:
        head_width: width of a head; None for one head. In a model it is that of the place.
        l0: λ at its greatest.
        schedule: λ in the course of a training, where p goes from 0 to 1: `"decay"` is
            $\lambda e^{-5p}$, `"linear"` $\lambda p$, and `"constant"` $\lambda$.

    Raises:
        ValueError: a width that is not that of whole heads, or an argument out of its range.

    Paper: JoLA (arXiv:2502.01179), section 3.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        head_width: int | None = None,
        l0: float = 1e-4,
        schedule: str = "decay",
        dropout: float = 0.0,
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[PyveneFields],
    ) -> None:
        reject_unknown(type(self), pyvene)
        super().__init__(embed_dim=embed_dim, dropout=dropout, dtype=dtype, **pyvene)
        self.head_width = embed_dim if head_width is None else head_width
        if type(self.head_width) is not int or self.head_width < 1 or embed_dim % self.head_width:
            raise ValueError(f"head_width {head_width!r}: expected a divisor of {embed_dim}")
        if schedule not in ("decay", "linear", "constant"):
            raise ValueError(f"schedule {schedule!r}: expected 'decay', 'linear' or 'constant'")
        self.l0, self.schedule = _weight("l0", l0), schedule
        heads = embed_dim // self.head_width
        self.scaling = nn.Parameter(torch.zeros(embed_dim, dtype=self.dtype))
        self.bias = nn.Parameter(torch.zeros(embed_dim, dtype=self.dtype))
        self.log_alpha = nn.Parameter(torch.empty(2, heads, dtype=self.dtype))
        bound = math.sqrt(6 / (heads + 1))  # as the authors'
        nn.init.uniform_(self.log_alpha, -bound, bound)

    def gates(self) -> Float[Tensor, "2 heads"]:
        """g₁ and g₂ of each head: drawn in training mode."""
        log_alpha = self.log_alpha.to(torch.promote_types(self.dtype, torch.float32))
        concrete = log_alpha.sigmoid()
        if self.training:
            uniform = torch.rand_like(log_alpha) * (1 - 2 * _MARGIN) + _MARGIN
            concrete = ((uniform.logit() + log_alpha) / _TEMPERATURE).sigmoid()
        return (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def parts(self) -> tuple[Tensor, ...]:
        return self.scaling, self.bias, self.gates()

    def form(self, *parts: Tensor) -> Factors:
        scaling, bias, gates = parts
        width = scaling.shape[-1] // gates.shape[-1]
        of_bias, of_scaling = gates.repeat_interleave(width, -1).unbind(-2)
        factors = constant_factors(of_bias * bias)
        diagonal = (of_scaling * scaling)[..., None, :]
        return Factors(*factors[:4], diagonal=diagonal)

    def added_loss(
        self, progress: Float[Tensor, ""], noted: Sequence[Tensor]
    ) -> Float[Tensor, ""] | None:
        if self.l0 == 0.0:
            return None
        is_open = (self.log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH)).sigmoid()
        factor = {"decay": (-5 * progress).exp(), "linear": progress}.get(self.schedule, 1.0)
        penalty: Tensor = self.l0 * factor * is_open.mean(1).sum()
        return penalty


def _weight(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        raise ValueError(f"{name} {value!r}: expected a number from 0")
    return float(value)
