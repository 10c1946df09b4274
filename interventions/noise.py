r"""Noise on embeddings (or any hidden states) while training: $x + \alpha/\sqrt{Ld}\,\varepsilon$.

| class | $\varepsilon$, per element | paper |
|---|---|---|
| `NeftuneIntervention` | $U(-1, 1)$ | NEFTune (arXiv:2310.05914) |
| `GaussianNoiseIntervention` | $N(0, 1)$ | NEFTune, ablation |
| `BernoulliNoiseIntervention` | $\pm 1$, p = ½ | SymNoise (arXiv:2312.01523), ablation |
| `SymNoiseIntervention` | $\pm 1$, each example at $x + \delta$ and $x - \delta$ | SymNoise |

$L$ is a row's number of attended tokens (`length="attended"`, as in NEFTune's own training code,
with no noise on padding) or the padded width (`length="padded"`, as in transformers, bit for bit
under the same generator state). Every draw comes from torch's global generator.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from .arguments import NoiseFields
from .base import NoiseIntervention

Length = Literal["attended", "padded"]
Where = Literal["all", "prompt", "completion"]


def uniform_noise(like: Tensor, bound: float) -> Tensor:
    """Independent draws from U(-bound, bound), with the shape, dtype and device of `like`."""
    return torch.zeros_like(like).uniform_(-bound, bound)


def gaussian_noise(like: Tensor, bound: float) -> Tensor:
    """Independent draws from N(0, bound²), with the shape, dtype and device of `like`."""
    return torch.zeros_like(like).normal_(0.0, bound)


def bernoulli_noise(like: Tensor, bound: float) -> Tensor:
    """Independent draws of ±bound with equal probability, shaped and typed as `like`."""
    return torch.zeros_like(like).bernoulli_(0.5).mul_(2).sub_(1).mul_(bound)


def noise_at(
    noise: Float[Tensor, "batch length hidden"],
    where: Where,
    prompt: Bool[Tensor, "batch length"] | None,
) -> Float[Tensor, "batch length hidden"]:
    """The noise at the tokens that `where` says; a ValueError without a prompt that it needs."""
    if where == "all":
        return noise
    if prompt is None:
        raise ValueError(f"where {where!r} needs to know which tokens are the prompt")
    chosen = prompt if where == "prompt" else ~prompt
    return noise.masked_fill(~chosen[..., None], 0.0)


def expect_where(where: Where) -> Where:
    """A name of tokens; a ValueError for another value."""
    if where not in ("all", "prompt", "completion"):
        raise ValueError(f"where {where!r}: expected 'all', 'prompt' or 'completion'")
    return where


class _ScaledNoise(NoiseIntervention):
    r"""Noise of scale $\alpha/\sqrt{Ld}$.

    Args:
        alpha: $\alpha \ge 0$; the papers use 5, 10 and 15.
        length: whether $L$ counts a row's attended tokens or the padded width.
        unit_variance: whether an element of $\varepsilon$ has variance 1 or, like U(-1, 1), 1/3;
            None for the distribution's own. Set it alike to compare distributions at equal norm.
        where: which tokens are perturbed; $L$ does not depend on it.
        embed_dim: width of the hidden states; not used.
        pyvene: fields that pyvene passes when it builds the class itself; not used.

    Raises:
        ValueError: an alpha, length or where out of range.
        TypeError: an argument that no noise has.
    """

    natural_unit_variance: ClassVar[bool] = True

    def __init__(
        self,
        *,
        alpha: float = 5.0,
        length: Length = "attended",
        unit_variance: bool | None = None,
        where: Where = "all",
        embed_dim: int | None = None,
        **pyvene: Unpack[NoiseFields],
    ) -> None:
        super().__init__(embed_dim=embed_dim, **pyvene)
        self.alpha = expect_size("alpha", alpha)
        if length not in ("attended", "padded"):
            raise ValueError(f"length {length!r}: expected 'attended' or 'padded'")
        if unit_variance is None:
            unit_variance = self.natural_unit_variance
        if not isinstance(unit_variance, bool):
            raise ValueError(f"unit_variance {unit_variance!r}: expected true, false or null")
        self.length = length
        self.unit_variance = unit_variance
        self.where = expect_where(where)

    @abstractmethod
    def sample(self, like: Tensor, bound: float) -> Tensor:
        r"""Draw $\varepsilon \cdot$ bound."""

    def delta(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        attended: Bool[Tensor, "batch length"] | None = None,
        prompt: Bool[Tensor, "batch length"] | None = None,
        lengths: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        r"""Draw $\alpha/\sqrt{Ld}\,\varepsilon$; `prompt` is needed unless `where` is "all"."""
        match = 1.0
        if self.unit_variance != self.natural_unit_variance:
            match = math.sqrt(3) if self.unit_variance else 1 / math.sqrt(3)
        width, size = hidden.shape[-2:]
        if self.length == "padded":
            # The scale is rounded to fp32 as transformers rounds it: the draws are then the same.
            bound = float(self.alpha * match / torch.sqrt(torch.tensor(width * size)))
            noise = self.sample(hidden, bound)
        else:
            noise = self.sample(hidden, match)
            if attended is None:
                attended = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            if lengths is None:
                lengths = attended.sum(dim=1, keepdim=True)
            noise = noise.masked_fill(~attended[..., None], 0.0)
            scale = self.alpha / torch.sqrt(lengths.clamp(min=1) * size)
            noise = noise * scale[..., None].to(noise)
        return noise_at(noise, self.where, prompt)


class NeftuneIntervention(_ScaledNoise):
    r"""NEFTune: $x + \alpha/\sqrt{Ld}\,\varepsilon$, $\varepsilon \sim U(-1, 1)$.

    Paper: arXiv:2310.05914, algorithm 1.
    """

    natural_unit_variance = False

    def sample(self, like: Tensor, bound: float) -> Tensor:
        return uniform_noise(like, bound)


class GaussianNoiseIntervention(_ScaledNoise):
    r"""$x + \alpha/\sqrt{Ld}\,\varepsilon$, $\varepsilon \sim N(0, 1)$ (NEFTune's ablation)."""

    def sample(self, like: Tensor, bound: float) -> Tensor:
        return gaussian_noise(like, bound)


class BernoulliNoiseIntervention(_ScaledNoise):
    r"""$x + \alpha/\sqrt{Ld}\,\varepsilon$, $\varepsilon = \pm 1$ with equal probability.

    One-sided: unlike `SymNoiseIntervention`, each example is seen at one of the two signs.
    """

    def sample(self, like: Tensor, bound: float) -> Tensor:
        return bernoulli_noise(like, bound)


class SymNoiseIntervention(BernoulliNoiseIntervention):
    r"""SymNoise: every example at $x \pm \delta$, with $\delta = \alpha/\sqrt{Ld}\,(\pm 1)$.

    The model doubles the batch and returns the mean loss over each pair, in which odd orders of
    $\delta$ cancel: for a quadratic f it is exactly $f + \tfrac12\sigma^2\,\mathrm{tr}\nabla^2 f$.

    Used alone, it expects a batch that holds all examples twice, [+δ rows, -δ rows].

    Paper: arXiv:2312.01523; arXiv:2605.23171 uses ±1/√3, which is `unit_variance=False`. Which of
    the two the first paper used could not be confirmed.
    """

    paired = True

    def delta(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        attended: Bool[Tensor, "batch length"] | None = None,
        prompt: Bool[Tensor, "batch length"] | None = None,
        lengths: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        order = "all +δ rows first, then all -δ rows"
        noise = super().delta(*half_of_pairs("SymNoise", order, hidden, attended, prompt, lengths))
        return torch.cat([noise, -noise])


def half_of_pairs(
    name: str, order: str, hidden: Float[Tensor, "batch length hidden"], *masks: Tensor | None
) -> Sequence[Any]:
    """The first half of a batch that holds every example twice, and of its masks.

    Raises:
        ValueError: an odd number of rows; the message says the order for the noise of a name.
    """
    pairs, odd = divmod(hidden.shape[0], 2)
    if odd:
        raise ValueError(
            f"{name} got {hidden.shape[0]} rows: expected every example twice, {order}"
        )
    return [None if values is None else values[:pairs] for values in (hidden, *masks)]


def expect_size(name: str, value: float) -> float:
    """A finite number of at least 0; a ValueError for another value of the argument `name`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} {value!r}: expected a finite number of at least 0")
    return float(value)
