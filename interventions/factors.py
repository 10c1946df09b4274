r"""One form for every low-rank edit: $h \mapsto U^\top(g \odot \phi(Dh + b))$.

$D, U \in \mathbb{R}^{k \times d}$, $b, g \in \mathbb{R}^k$. $\phi$ applies an activation to some
of the k rows alone: LoReFT with one is $D = [W; R]$, $U = [R; -R]$ with σ on the first half, and
without one $D = W - R$, $U = R$. In this form the edits of several adapters are rows of a single
one, and the gates g say which of them a hidden state gets, and how much of each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

Activation: TypeAlias = Callable[[Tensor], Tensor]


class Factors(NamedTuple):
    """D, b and U of an edit, and the activations of successive rows of D."""

    down: Float[Tensor, "k hidden"]
    bias: Float[Tensor, " k"]
    up: Float[Tensor, "k hidden"]
    acts: tuple[tuple[str | Activation | None, int], ...]
    """Of each run of rows, the activation or its name, or None, and the number of rows."""

    def to(self, like: Tensor) -> "Factors":
        """The factors in the dtype and on the device of a tensor."""
        return Factors(self.down.to(like), self.bias.to(like), self.up.to(like), self.acts)

    def edit(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        gates: Float[Tensor, "*#rows gates"] | None = None,
    ) -> Float[Tensor, "*rows hidden"]:
        """The change to hidden states.

        Args:
            hidden: hidden states.
            gates: g, all ones if None. Fewer than k gates are for the dimensions of a subspace,
                each of which has a row in every block of as many rows.
        """
        inner = F.linear(hidden, self.down, self.bias)
        if any(act for act, _ in self.acts):
            parts = inner.split_with_sizes([count for _, count in self.acts], dim=-1)
            activated = [
                _activation(act)(part) if isinstance(act, str) else act(part) if act else part
                for (act, _), part in zip(self.acts, parts, strict=True)
            ]
            inner = torch.cat(activated, dim=-1)
        if gates is not None:
            blocks = inner.shape[-1] // gates.shape[-1]
            inner = inner * (gates if blocks == 1 else torch.cat([gates] * blocks, dim=-1))
        return inner @ self.up


def side_by_side(parts: Sequence[Factors]) -> tuple[Factors, Int[Tensor, " k"]]:
    """Several edits as one, and for each of its rows the number of the edit that it is from.

    Rows with the same activation are put together, so that it is called once.
    """
    runs = []
    for owner, part in enumerate(parts):
        sizes = [count for _, count in part.acts]
        pieces = zip(*(rows.split_with_sizes(sizes) for rows in part[:3]), strict=True)
        runs += [
            (name or "", owner, *piece) for (name, _), piece in zip(part.acts, pieces, strict=True)
        ]
    runs.sort(key=lambda run: run[0] if isinstance(run[0], str) else f"{run[0]} {id(run[0])}")
    names, owners, downs, biases, ups = zip(*runs, strict=True)
    counts = dict.fromkeys(names, 0)
    for name, bias in zip(names, biases, strict=True):
        counts[name] += len(bias)
    of = [torch.full_like(b, o, dtype=torch.long) for o, b in zip(owners, biases, strict=True)]
    acts = tuple((name or None, count) for name, count in counts.items())
    return Factors(torch.cat(downs), torch.cat(biases), torch.cat(ups), acts), torch.cat(of)


class StackedEdit(nn.Module):
    """The edits of several adapters at a site as one: the gates say which of them a row gets.

    Args:
        parts: the edits.
        owners: for each edit, the number of its adapter, which is the column of its gate.
    """

    has_own_forward: ClassVar[bool] = False

    down: Tensor
    bias: Tensor
    up: Tensor
    owner: Tensor

    def __init__(self, parts: Sequence[Factors], owners: Sequence[int]) -> None:
        super().__init__()
        factors, of = side_by_side(parts)
        for name in ("down", "bias", "up"):
            self.register_buffer(name, getattr(factors, name), persistent=False)
        self.register_buffer("owner", torch.tensor(owners, device=of.device)[of], persistent=False)
        self.acts = factors.acts
        self.hidden_size = factors.down.shape[1]

    def delta(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        gates: Float[Tensor, "*#rows adapters"] | None = None,
    ) -> Float[Tensor, "*rows hidden"]:
        """The sum of the edits, each times its adapter's gate."""
        wide = hidden.to(torch.promote_types(hidden.dtype, self.down.dtype))
        if gates is not None:
            gates = gates.to(wide).index_select(-1, self.owner)
        factors = Factors(self.down, self.bias, self.up, self.acts)
        with torch.autocast(hidden.device.type, enabled=False):
            return factors.to(wide).edit(wide, gates)


@functools.cache
def _activation(name: str) -> nn.Module:
    activation: nn.Module = ACT2FN[name]
    return activation
