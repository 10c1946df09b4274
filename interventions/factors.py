r"""One form for every low-rank edit: $h \mapsto U^\top(g \odot \phi(Dh + b))$.

$D, U \in \mathbb{R}^{k \times d}$, $b, g \in \mathbb{R}^k$. $\phi$ applies an activation to some
of the k rows alone: LoReFT with one is $D = [W; R]$, $U = [R; -R]$ with σ on the first half, and
without one $D = W - R$, $U = R$. In this form the edits of several adapters stand side by side as a
single one, and the gates g say which of them a hidden state gets, and how much of each.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN


class Factors(NamedTuple):
    """D, b and U of an edit, and the activations of successive rows of D."""

    down: Float[Tensor, "k hidden"]
    bias: Float[Tensor, " k"]
    up: Float[Tensor, "k hidden"]
    acts: tuple[tuple[str | None, int], ...]
    """Of each run of rows, the activation's name, or None, and how many rows it is."""

    def to(self, like: Tensor) -> "Factors":
        """The same in the dtype and on the device of a tensor."""
        return Factors(self.down.to(like), self.bias.to(like), self.up.to(like), self.acts)

    def edit(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        gates: Float[Tensor, "*#rows gates"] | None = None,
    ) -> Float[Tensor, "*rows hidden"]:
        """The change to hidden states.

        Args:
            hidden: the states.
            gates: g, all ones if None. Fewer than k are for the dimensions of a subspace, each of
                which has one row in every block of as many rows.
        """
        inner = F.linear(hidden, self.down, self.bias)
        if any(name for name, _ in self.acts):
            parts = inner.split_with_sizes([count for _, count in self.acts], dim=-1)
            activated = [
                part if name is None else _activation(name)(part)
                for (name, _), part in zip(self.acts, parts, strict=True)
            ]
            inner = torch.cat(activated, dim=-1)
        if gates is not None:
            inner = inner * torch.cat([gates] * (inner.shape[-1] // gates.shape[-1]), dim=-1)
        return inner @ self.up


def side_by_side(parts: Sequence[Factors]) -> tuple[Factors, Int[Tensor, " k"]]:
    """Several edits as one, and which of them each of its rows is of.

    Rows of one activation are put together, so that it is called once.
    """
    runs = []
    for owner, part in enumerate(parts):
        sizes = [count for _, count in part.acts]
        pieces = zip(*(rows.split_with_sizes(sizes) for rows in part[:3]), strict=True)
        runs += [
            (name or "", owner, *piece)
            for (name, _), piece in zip(part.acts, pieces, strict=True)
        ]
    runs.sort(key=lambda run: run[0])
    names, owners, downs, biases, ups = zip(*runs, strict=True)
    counts = {name: 0 for name in names}
    for name, bias in zip(names, biases, strict=True):
        counts[name] += len(bias)
    of = [torch.full_like(b, o, dtype=torch.long) for o, b in zip(owners, biases, strict=True)]
    acts = tuple((name or None, count) for name, count in counts.items())
    return Factors(torch.cat(downs), torch.cat(biases), torch.cat(ups), acts), torch.cat(of)


@functools.cache
def _activation(name: str) -> nn.Module:
    activation: nn.Module = ACT2FN[name]
    return activation
