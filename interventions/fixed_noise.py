r"""Noise of a fixed scale: $x + z$, $z \sim U(-\epsilon, \epsilon)$ or $N(0, \epsilon^2)$.

| class | what it is for | paper |
|---|---|---|
| `R3fIntervention` | predictions without and with z must agree | R3F (arXiv:2008.03156) |
| `SmartIntervention` | the same, with z where they agree least | SMART (arXiv:1911.03437) |
| `HypeIntervention` | z at the input of every layer | HyPe (arXiv:2212.08853) |
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from .arguments import NoiseFields
from .base import NoiseIntervention
from .losses import AddsLoss
from .noise import (
    Where,
    expect_size,
    expect_where,
    gaussian_noise,
    half_of_pairs,
    noise_at,
    uniform_noise,
)

Distribution = Literal["uniform", "normal"]


class _FixedNoise(NoiseIntervention):
    r"""Noise of scale $\epsilon$.

    A hidden state in half precision hardly feels a small z, since x + z is rounded to x. In
    bfloat16, embeddings of size 0.06 need an $\epsilon$ of 5e-4; the default is for float32.

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
        self._has_looked = False

    def lost_in(self, hidden: Float[Tensor, "batch length hidden"]) -> tuple[str, float] | None:
        if self._has_looked or hidden.dtype.itemsize > 2 or self.epsilon == 0.0:
            return None
        self._has_looked = True  # once: it waits for the device
        spacing = torch.finfo(hidden.dtype).eps * hidden.detach().abs().mean(dtype=torch.float32)
        if self.epsilon >= (least := float(spacing)):
            return None
        what = f"epsilon {self.epsilon:g} of {type(self).__name__}"
        return f"{what}: {hidden.dtype} rounds most of x + z back to x", least

    def delta(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        attended: Bool[Tensor, "batch length"] | None = None,
        prompt: Bool[Tensor, "batch length"] | None = None,
        lengths: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        draw = uniform_noise if self.distribution == "uniform" else gaussian_noise
        return self._chosen(draw(hidden, self.epsilon), attended, prompt)

    def _chosen(self, noise: Tensor, attended: Tensor | None, prompt: Tensor | None) -> Tensor:
        """The noise at the tokens that are perturbed."""
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
        order = "all rows without noise first, then all rows with noise"
        noise = self._noise_of(*half_of_pairs("R3F", order, hidden, attended, prompt, lengths))
        return torch.cat([torch.zeros_like(noise), noise])

    def _noise_of(self, hidden: Tensor, *masks: Tensor | None) -> Tensor:
        """The noise of the second half, whose masks are those of the first."""
        return super().delta(hidden, *masks)

    def added_loss(
        self, progress: Float[Tensor, ""], noted: Sequence[Tensor]
    ) -> Float[Tensor, ""] | None:
        return self.weight * noted[0] if noted else None


class SmartIntervention(R3fIntervention):
    r"""SMART's smoothness: as R3F, with z from one step up the divergence.

    $$z = \Pi_{\|z\|_\infty \le \epsilon}\left(z_0 + \eta\, g / \|g\|_\infty\right), \qquad
      g = \nabla_z [\mathrm{KL}(p\|q) + \mathrm{KL}(q\|p)] \text{ at } z_0$$

    $z_0$ is drawn as R3F's z, and the norms are of each row. The step costs a forward and a
    backward pass more. The paper's proximal term, which holds predictions near those of earlier
    weights, is not part of it.

    Args:
        step: $\eta \ge 0$.
        weight: as in `R3fIntervention`.
        epsilon: largest element of z.
        distribution: as in `_FixedNoise`.
        where: as in `_FixedNoise`.
        embed_dim: width of the hidden states; not used.
        pyvene: fields that pyvene passes when it builds the class itself; not used.

    Raises:
        ValueError: an argument out of range.

    Paper: arXiv:1911.03437, section 3.1 and algorithm 1.
    """

    def __init__(
        self,
        *,
        step: float = 1e-3,
        weight: float = 1.0,
        epsilon: float = 1e-5,
        distribution: Distribution = "normal",
        where: Where = "all",
        embed_dim: int | None = None,
        **pyvene: Unpack[NoiseFields],
    ) -> None:
        super().__init__(
            weight=weight,
            epsilon=epsilon,
            distribution=distribution,
            where=where,
            embed_dim=embed_dim,
            **pyvene,
        )
        self.step = expect_size("step", step)
        self._noise: Tensor | None = None
        """z of this pass; None while its start is drawn."""
        self._start: Tensor | None = None
        self._apart: Tensor | None = None

    @contextlib.contextmanager
    def ascending(self) -> Iterator[None]:
        """Within the block, a pass runs with $z_0$; from its end on, passes have this z."""
        self._noise = self._start = self._apart = None
        try:
            yield
            if self._start is None or self._apart is None:
                raise RuntimeError("no predictions were compared in the pass that SMART looks at")
            (slope,) = torch.autograd.grad(self._apart, self._start)
            size = slope.abs().amax(dim=(1, 2), keepdim=True)
            size = size.clamp(min=torch.finfo(size.dtype).tiny)
            noise = self._start.detach() + self.step * slope / size
            self._noise = noise.clamp(-self.epsilon, self.epsilon)
        finally:
            self._start = self._apart = None

    def _noise_of(self, hidden: Tensor, *masks: Tensor | None) -> Tensor:
        if self._noise is not None:
            return self._chosen(self._noise, *masks[:2])
        self._start = super()._noise_of(hidden, *masks).detach().requires_grad_()
        return self._chosen(self._start, *masks[:2])

    def added_loss(
        self, progress: Float[Tensor, ""], noted: Sequence[Tensor]
    ) -> Float[Tensor, ""] | None:
        if self._noise is None and noted:
            self._apart = noted[0]
        return super().added_loss(progress, noted)
