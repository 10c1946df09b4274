r"""One form for every edit: $h \mapsto U^\top(g \odot \phi(Dh + b)) + (g'S) \odot h$.

$D, U \in \mathbb{R}^{k \times d}$, $b, g \in \mathbb{R}^k$. $\phi$ applies an activation to some
of the k rows alone: LoReFT with one is $D = [W; R]$, $U = [R; -R]$ with σ on the first half, and
without one $D = W - R$, $U = R$. $S \in \mathbb{R}^{n \times d}$ is the diagonal part, which most
edits do not have: n is 0. RED's $s \odot h$ is $S = s - 1$, one row. In this form the edits of
several adapters are rows of a single one, and the gates g and $g' \in \mathbb{R}^n$ say which of
them a hidden state gets, and how much of each. Probes are more gates, which a hidden state says
itself: $\sigma(Ph + c)$, one for all rows of an edit that has one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .columns import Columns, spread_columns

Activation: TypeAlias = Callable[[Tensor], Tensor]
Activations: TypeAlias = tuple[tuple[str | Activation | None, int], ...]


class Factors(NamedTuple):
    """D, b, U and S of an edit, and the activations of successive rows of D."""

    down: Float[Tensor, "k hidden"]
    bias: Float[Tensor, " k"]
    up: Float[Tensor, "k hidden"]
    acts: Activations
    """Of each run of rows, the activation or its name, or None, and the number of rows."""
    is_constant: bool = False
    """Whether D is 0 and there is no diagonal part, so that all hidden states get the same edit."""
    diagonal: Float[Tensor, "n hidden"] | None = None
    """S; None where there is no diagonal part."""
    probe: Float[Tensor, "m width"] | None = None
    """P, and c as its last column; None where no edit has a probe."""
    probed: Int[Tensor, " gates"] | None = None
    """Of each of the k + n rows, its probe, m for none; None where all have the only one."""

    @property
    def rows(self) -> int:
        """k + n."""
        return len(self.up) + (0 if self.diagonal is None else len(self.diagonal))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """D, b, U, and of S and P those that there are."""
        return *self[:3], *(t for t in (self.diagonal, self.probe) if t is not None)

    def of(self, down: Tensor, bias: Tensor, up: Tensor, *more: Tensor) -> "Factors":
        """The same form with other tensors."""
        rest = iter(more)
        diagonal, probe = (None if t is None else next(rest) for t in (self.diagonal, self.probe))
        return Factors(down, bias, up, self.acts, self.is_constant, diagonal, probe, self.probed)

    def to(self, like: Tensor) -> "Factors":
        """The factors in the dtype and on the device of a tensor."""
        return self.ready(like.dtype, like.device)

    def ready(self, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> "Factors":
        """The factors in a dtype and on a device, of an edit that is so many times as strong."""
        down, bias, up, *more = (tensor.to(device, dtype) for tensor in self.tensors)
        if scale != 1.0:
            up = scale * up
            if self.diagonal is not None:
                more[0] = scale * more[0]
        return self.of(down, bias, up, *more)

    def detach(self) -> "Factors":
        """The factors outside of autograd."""
        return self.of(*(tensor.detach() for tensor in self.tensors))

    def spread_to(self, columns: Columns, width: int) -> "Factors":
        """The edit of some columns of hidden states as one of all, which leaves the others."""

        def spread(part: Tensor) -> Tensor:
            return spread_columns(part, columns, width)

        diagonal = None if self.diagonal is None else spread(self.diagonal)
        probe = self.probe
        if probe is not None:  # whose last column is c
            probe = torch.cat([spread(probe[:, :-1]), probe[:, -1:]], dim=1)
        more = self.acts, self.is_constant, diagonal, probe, self.probed
        return Factors(spread(self.down), self.bias, spread(self.up), *more)

    def edit(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        gates: Float[Tensor, "*#rows gates"] | None = None,
    ) -> Float[Tensor, "*rows hidden"]:
        """The change to hidden states.

        Args:
            hidden: hidden states.
            gates: g and g′, all ones if None. Fewer than k gates are for the dimensions of a
                subspace, each of which has a row in every block of as many rows.
        """
        inner = F.linear(hidden, self.down, self.bias)
        if any(act for act, _ in self.acts):
            inner = activated(inner, self.acts)
        gates = self.gated(hidden, None if gates is None else self.spread(gates))
        if gates is not None:
            inner = inner * (gates if self.diagonal is None else gates[..., : len(self.up)])
        delta = inner @ self.up
        scaling = self.scaling(gates)
        return delta if scaling is None else delta + scaling * hidden

    def scaling(
        self, gates: Float[Tensor, "*rows gates"] | None
    ) -> Float[Tensor, "*#rows hidden"] | None:
        """g′S, with the gates of all k + n rows; None where there is no diagonal part."""
        if self.diagonal is None:
            return None
        return self.diagonal.sum(0) if gates is None else gates[..., len(self.up) :] @ self.diagonal

    def gated(
        self, hidden: Float[Tensor, "*rows hidden"], gates: Float[Tensor, "*#rows gates"] | None
    ) -> Float[Tensor, "*#rows gates"] | None:
        """The gates of all k + n rows, times what the probes say of hidden states."""
        if self.probe is None:
            return gates
        shares = F.linear(hidden, self.probe[:, :-1], self.probe[:, -1]).sigmoid()
        if self.probed is not None:
            shares = F.pad(shares, (0, 1), value=1.0).index_select(-1, self.probed)
        elif gates is None:
            return shares.expand(*shares.shape[:-1], self.rows)
        return shares if gates is None else gates * shares

    def spread(self, gates: Float[Tensor, "*rows gates"]) -> Float[Tensor, "*rows k"]:
        """Gates of a subspace's dimensions as gates of all rows, block after block.

        A diagonal part is in no dimension of a subspace, and whole.
        """
        if gates.shape[-1] == self.rows:
            return gates
        blocks = [gates] * (len(self.up) // gates.shape[-1])
        whole = gates.new_ones(*gates.shape[:-1], self.rows - len(self.up))
        return torch.cat([*blocks, whole], dim=-1)


def activated(inner: Float[Tensor, "*rows k"], acts: Activations) -> Float[Tensor, "*rows k"]:
    """φ: the activation of each run of rows."""
    parts = inner.split_with_sizes([count for _, count in acts], dim=-1)
    values = [
        _activation(act)(part) if isinstance(act, str) else act(part) if act else part
        for (act, _), part in zip(acts, parts, strict=True)
    ]
    return torch.cat(values, dim=-1)


def side_by_side(parts: Sequence[Factors]) -> tuple[Factors, Int[Tensor, " rows"]]:
    """Several edits as one, and for each of its k + n rows the number of the edit that it is from.

    Rows with the same activation are put together, so that it is called once. An edit has at most
    one probe.
    """
    runs = []
    for number, part in enumerate(parts):
        sizes = [count for _, count in part.acts]
        pieces = zip(*(rows.split_with_sizes(sizes) for rows in part[:3]), strict=True)
        runs += [
            (name or "", number, *piece) for (name, _), piece in zip(part.acts, pieces, strict=True)
        ]
    runs.sort(key=lambda run: run[0] if isinstance(run[0], str) else f"{run[0]} {id(run[0])}")
    names, owners, downs, biases, ups = zip(*runs, strict=True)
    counts = dict.fromkeys(names, 0)
    for name, bias in zip(names, biases, strict=True):
        counts[name] += len(bias)
    of = [torch.full_like(b, o, dtype=torch.long) for o, b in zip(owners, biases, strict=True)]
    acts = tuple((name or None, count) for name, count in counts.items())
    diagonals = {number: p.diagonal for number, p in enumerate(parts) if p.diagonal is not None}
    of += [torch.full_like(s[:, 0], o, dtype=torch.long) for o, s in diagonals.items()]
    owner = torch.cat(of)
    diagonal = torch.cat(list(diagonals.values())) if diagonals else None
    tensors = torch.cat(downs), torch.cat(biases), torch.cat(ups)
    return Factors(*tensors, acts, False, diagonal, *_probes(parts, owner)), owner


def _probes(
    parts: Sequence[Factors], owner: Int[Tensor, " gates"]
) -> tuple[Tensor | None, Tensor | None]:
    """The probes of edits, and of each row that of its edit."""
    probes = {number: p.probe for number, p in enumerate(parts) if p.probe is not None}
    if not probes:
        return None, None
    of_part = torch.full((len(parts),), len(probes), device=owner.device)
    of_part[list(probes)] = torch.arange(len(probes), device=owner.device)
    return torch.cat(list(probes.values())), of_part[owner]


@functools.cache
def _activation(name: str) -> nn.Module:
    activation: nn.Module = ACT2FN[name]
    return activation
