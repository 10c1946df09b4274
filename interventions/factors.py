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
ReadyEdit: TypeAlias = Callable[[Tensor], Tensor]
"""Of all hidden states in evaluation: without masks, indices and copies."""
Activations: TypeAlias = tuple[tuple[str | Activation | None, int], ...]


class Factors(NamedTuple):
    """D, b and U of an edit, and the activations of successive rows of D."""

    down: Float[Tensor, "k hidden"]
    bias: Float[Tensor, " k"]
    up: Float[Tensor, "k hidden"]
    acts: "Activations"
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
            inner = activated(inner, self.acts)
        if gates is not None:
            blocks = inner.shape[-1] // gates.shape[-1]
            inner = inner * (gates if blocks == 1 else torch.cat([gates] * blocks, dim=-1))
        return inner @ self.up

    def ready(
        self,
        like: Float[Tensor, "*rows hidden"],
        scale: float = 1.0,
        gates: Float[Tensor, "*#rows gates"] | None = None,
    ) -> ReadyEdit:
        """The edit of all states of the shape, dtype and device of `like`, in the factors' dtype.

        It takes two products, those of φ, and a cast to that dtype and back.

        Args:
            like: hidden states.
            scale: factor of the edit.
            gates: as of `edit`.
        """
        down, bias, up, acts = self
        dtype, narrow = up.dtype, like.dtype
        transposed, up = down.mT.contiguous(), (up if scale == 1.0 else scale * up).contiguous()
        if gates is not None:
            gates = torch.cat([gates.to(up)] * (len(up) // gates.shape[-1]), dim=-1)
            gates = gates.expand(*like.shape[:-1], len(up)).flatten(0, -2)
        has_acts = any(act for act, _ in acts)

        def edit(hidden: Tensor) -> Tensor:
            flat = hidden.reshape(-1, hidden.shape[-1])
            wide = flat if dtype is narrow else flat.to(dtype)
            inner = torch.addmm(bias, wide, transposed)
            if has_acts:
                inner = activated(inner, acts)
            if gates is not None:
                inner = inner * gates
            edited = torch.addmm(wide, inner, up)
            return (edited if dtype is narrow else edited.to(narrow)).view(hidden.shape)

        return edit


def activated(inner: Float[Tensor, "*rows k"], acts: Activations) -> Float[Tensor, "*rows k"]:
    """φ: the activation of each run of rows."""
    parts = inner.split_with_sizes([count for _, count in acts], dim=-1)
    values = [
        _activation(act)(part) if isinstance(act, str) else act(part) if act else part
        for (act, _), part in zip(acts, parts, strict=True)
    ]
    return torch.cat(values, dim=-1)


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


def ready_constant(vector: Float[Tensor, " hidden"], like: Tensor) -> ReadyEdit:
    """The addition of a vector to states of the dtype and device of `like`."""
    return vector.to(like).add


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
        with torch.autocast(hidden.device.type, enabled=False):
            return self._factors.to(wide).edit(wide, gates)

    def ready(
        self,
        like: Float[Tensor, "*rows hidden"],
        scale: float = 1.0,
        gates: Float[Tensor, "*#rows adapters"] | None = None,
    ) -> ReadyEdit:
        """The edit of all states of the shape, dtype and device of `like`; see `delta`."""
        wide = like.new_empty(0, dtype=torch.promote_types(like.dtype, self.down.dtype))
        if gates is not None:
            gates = gates.to(wide).index_select(-1, self.owner)
        return self._factors.to(wide).ready(like, scale, gates)

    @property
    def _factors(self) -> Factors:
        return Factors(self.down, self.bias, self.up, self.acts)


@functools.cache
def _activation(name: str) -> nn.Module:
    activation: nn.Module = ACT2FN[name]
    return activation
