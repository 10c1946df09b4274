r"""Noise of a fixed scale: $x + z$, $z \sim U(-\epsilon, \epsilon)$ or $N(0, \epsilon^2)$.

| class | what it is for | paper |
|---|---|---|
| `R3fIntervention` | predictions without and with z must agree | R3F (arXiv:2008.03156) |
| `HypeIntervention` | z at the input of every layer | HyPe (arXiv:2212.08853) |
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from .arguments import NoiseFields
from .base import NoiseIntervention
from .losses import AddsLoss
from .noise import Where, expect_where, gaussian_noise, noise_at, uniform_noise

Distribution = Literal["uniform", "normal"]


class _FixedNoise(NoiseIntervention):
    r"""Noise of scale $\epsilon$.

    Args:
        epsilon: $\epsilon \ge 0$, whatever the length of a row and the width.
        distribution: `"uniform"`, $U(-\epsilon, \epsilon)$, or `"normal"`, $N(0, \epsilon^2)$.
        where: which tokens are perturbed; padding never is.
        embed_dim: width of the hidden states; not used.
        pyvene: fields that pyvene passes when it builds the class itself; not used.

    Raises:
        ValueError: an argument out of range.
        TypeError: an argument that no noise has.
    """

    def __init__(
        self,
        *,
        epsilon: float = 1e-5,
        distribution: Distribution = "uniform",
        where: Where = "all",
        embed_dim: int | None = None,
        **pyvene: Unpack[NoiseFields],
    ) -> None:
        super().__init__(embed_dim=embed_dim, **pyvene)
        self.epsilon = expect_size("epsilon", epsilon)
        if distribution not in ("uniform", "normal"):
            raise ValueError(f"distribution {distribution!r}: expected 'uniform' or 'normal'")
        self.distribution, self.where = distribution, expect_where(where)

    def delta(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        attended: Bool[Tensor, "batch length"] | None = None,
        prompt: Bool[Tensor, "batch length"] | None = None,
        lengths: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        draw = uniform_noise if self.distribution == "uniform" else gaussian_noise
        noise = draw(hidden, self.epsilon)
        if attended is not None:
            noise = noise.masked_fill(~attended[..., None], 0.0)
        return noise_at(noise, self.where, prompt)


class HypeIntervention(_FixedNoise):
    """HyPe: noise at the input of every layer, which the loss of the labels alone sees.

    Arguments as in `_FixedNoise`. The place is `block_input` of all layers unless a config says
    another. Paper: arXiv:2212.08853.
    """

    default_component: ClassVar[str] = "block_input"
    default_layer: ClassVar[str | None] = "all"


class R3fIntervention(AddsLoss, _FixedNoise):
    r"""R3F: $\mathcal{L}(x) + \lambda\,[\mathrm{KL}(p\|q) + \mathrm{KL}(q\|p)]$.

    $p$ and $q$ are the predictions of each label's token for $x$ and $x + z$; the divergence is the
    mean over labels. The model doubles the batch, as for SymNoise.

    Used alone, it expects a batch that holds all examples twice, [rows, rows with noise].

    Args:
        weight: $\lambda \ge 0$.
        epsilon: as in `_FixedNoise`.
        distribution: as in `_FixedNoise`.
        where: as in `_FixedNoise`.
        embed_dim: width of the hidden states; not used.
        pyvene: fields that pyvene passes when it builds the class itself; not used.

    Raises:
        ValueError: an argument out of range.

    Paper: arXiv:2008.03156, section 3.
    """

    paired = True
    compares = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        epsilon: float = 1e-5,
        distribution: Distribution = "uniform",
        where: Where = "all",
        embed_dim: int | None = None,
        **pyvene: Unpack[NoiseFields],
    ) -> None:
        super().__init__(
            epsilon=epsilon, distribution=distribution, where=where, embed_dim=embed_dim, **pyvene
        )
        self.weight = expect_size("weight", weight)

    def delta(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        attended: Bool[Tensor, "batch length"] | None = None,
        prompt: Bool[Tensor, "batch length"] | None = None,
        lengths: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        clean, odd = divmod(hidden.shape[0], 2)
        if odd:
            raise ValueError(
                f"R3F got {hidden.shape[0]} rows: expected every example twice, all rows without "
                "noise first, then all rows with noise"
            )
        masks = (attended, prompt, lengths)
        half = [None if mask is None else mask[clean:] for mask in masks]
        noise = super().delta(hidden[clean:], *half)
        return torch.cat([torch.zeros_like(noise), noise])

    def added_loss(
        self, progress: Float[Tensor, ""], noted: Sequence[Tensor]
    ) -> Float[Tensor, ""] | None:
        return self.weight * noted[0] if noted else None


def expect_size(name: str, value: float) -> float:
    """A finite number of at least 0; a ValueError for another value of the argument `name`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} {value!r}: expected a finite number of at least 0")
    return float(value)
