r"""Edits by factors of rows of hidden states: gather → edit → scatter of a site in one function.

Training, evaluation, adapters by name and servers all call `edit_rows`. Of few rows, an edit costs
a GPU what starting its operations costs. So each operation here has a reason, and the gradient has
a closed form instead of a node for each of them.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .factors import Factors, activated, side_by_side
from .gates import with_norm_of


@dataclass(eq=False)
class RowEdit:
    """An edit by factors, ready for use: in the dtype of its arithmetic, with its scale."""

    factors: Factors
    gates: Float[Tensor, "rows gates"] | None = None
    """g and g′ of each row; all ones if None."""
    dropout: float = 0.0
    """Probability that an element of the edit is zeroed."""
    keeps_norm: bool = False
    """Whether edited states are made as long as they were, by the gate `norm`."""

    def __post_init__(self) -> None:
        self._transposed = self.factors.down.mT
        self._has_acts = any(act for act, _ in self.factors.acts)
        self._scaling_kept: Tensor | None = None

    def times_gates(
        self, inner: Float[Tensor, "rows k"], states: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows k"]:
        """The values between D and U, times g."""
        gates = self.factors.gated(states, self.gates)
        if gates is None:
            return inner
        has_more = self.factors.diagonal is not None
        return inner * (gates[:, : len(self.factors.up)] if has_more else gates)

    def _scaling(
        self, states: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "*rows hidden"] | None:
        """g′S; None where there is no diagonal part."""
        if self.factors.diagonal is None:
            return None
        if self.factors.probe is not None:
            return self.factors.scaling(self.factors.gated(states, self.gates))
        if self._scaling_kept is None:
            self._scaling_kept = self.factors.scaling(self.gates)
        return self._scaling_kept

    @property
    def has_closed_form(self) -> bool:
        """Whether its gradient has: it is linear in h, nothing is random, and gates are numbers."""
        has_numbers = self.gates is None or not self.gates.requires_grad
        is_linear = not (self._has_acts or self.keeps_norm) and self.factors.probe is None
        return is_linear and has_numbers and not self.dropout

    def vector(self, dtype: torch.dtype) -> Float[Tensor, " hidden"] | None:
        """What it adds to all hidden states, if that is one vector."""
        is_one = self.factors.is_constant and self.factors.probe is None and not self.keeps_norm
        if not is_one or self.gates is not None or self.dropout:
            return None
        return (self.factors.bias[:, None] * self.factors.up).sum(0).to(dtype)

    def inner(self, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows k"]:
        r"""$g \odot \phi(Dh + b)$."""
        inner = torch.addmm(self.factors.bias, states, self._transposed)
        if self._has_acts:
            inner = activated(inner, self.factors.acts)
        return self.times_gates(inner, states)

    def outer(
        self, inner: Float[Tensor, "rows k"], states: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows hidden"]:
        r"""The change, $U^\top$ times what `inner` returns, and what the diagonal part adds."""
        delta = self.with_scaled(inner @ self.factors.up, states)
        if self.dropout:
            delta = F.dropout(delta, self.dropout)
        return with_norm_of(states, states + delta) - states if self.keeps_norm else delta

    def added(
        self,
        base: Float[Tensor, "rows hidden"],
        inner: Float[Tensor, "rows k"],
        states: Float[Tensor, "rows hidden"],
    ) -> Float[Tensor, "rows hidden"]:
        """The base and the change of states, in one operation or two, without dropout and norm."""
        return self.with_scaled(torch.addmm(base, inner, self.factors.up), states)

    def with_scaled(
        self, values: Float[Tensor, "rows hidden"], states: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows hidden"]:
        r"""$\mathrm{values} + (g'S) \odot \mathrm{states}$: the values, without a diagonal part."""
        scaling = self._scaling(states)
        return values if scaling is None else torch.addcmul(values, scaling, states)

    def of_diagonal(self, products: Float[Tensor, "rows hidden"]) -> Float[Tensor, "n hidden"]:
        r"""The gradient of S, $g'^\top(H \odot G)$, from $H \odot G$."""
        diagonal = self.factors.diagonal
        assert diagonal is not None
        if self.gates is None:
            return products.sum(0).expand_as(diagonal)
        return self.gates[:, len(self.factors.up) :].mT @ products

    def of_all(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """`edit_rows` of all rows outside autograd, in the least time."""
        with outside_autocast(hidden.device.type):
            wide = hidden.reshape(-1, hidden.shape[-1]).to(self.factors.up.dtype)
            edited = self.added(wide, self.inner(wide), wide)
            if self.keeps_norm:
                edited = with_norm_of(wide, edited)
        return edited.to(hidden.dtype).view(hidden.shape)


class EditedRows(NamedTuple):
    """Which rows of hidden states the edits of a site change, edit after edit."""

    indices: Int[Tensor, " n"] | None = None
    """None for all rows, which a single edit changes."""
    skipped: Bool[Tensor, "n 1"] | None = None
    """Which of them stay as they are; None for none."""
    counts: tuple[int, ...] = ()
    """The number of rows of each edit, where there are several."""

    def gather(self, flat: Float[Tensor, "rows hidden"]) -> Float[Tensor, "n hidden"]:
        """The rows."""
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def split(self, values: Tensor | None) -> Sequence[Any]:
        """Of values of all rows, those of each edit."""
        if not self.counts:
            return (values,)
        parts: tuple[Tensor, ...] | None
        parts = None if values is None else values.split_with_sizes(self.counts)
        return parts or [None] * len(self.counts)


ALL_ROWS = EditedRows()


def edit_rows(
    hidden: Float[Tensor, "rows hidden"],
    edits: Sequence[RowEdit],
    rows: EditedRows = ALL_ROWS,
    *,
    states: Sequence[Float[Tensor, "rows hidden"]] = (),
    in_place: bool = False,
    is_transformed: bool = False,
) -> Float[Tensor, "rows hidden"]:
    r"""$h_i \mapsto h_i + \sum U^\top(g \odot \phi(Dh_i + b)) + (g'S) \odot h_i$ in rows i.

    All edits read the states as they are before any of them. The arithmetic has the dtype of the
    factors, the result that of the hidden states. A skipped row adds nothing to a gradient, even if
    it holds NaN.

    Args:
        hidden: hidden states that are edited.
        edits: edits, all in one dtype.
        rows: the rows that they change.
        states: tensors whose sum the edits read instead of `hidden`.
        in_place: whether `hidden` is overwritten, in indexed rows, outside autograd.
        is_transformed: whether a transform of torch.func or forward mode runs, which asks for other
            derivatives than a gradient.

    Returns:
        The edited hidden states, a fresh tensor unless it is in place.
    """
    is_closed = not (in_place or states or is_transformed or torch.compiler.is_compiling())
    with outside_autocast(hidden.device.type):
        if torch.is_grad_enabled() and is_closed and all(edit.has_closed_form for edit in edits):
            gates = [edit.gates for edit in edits]
            tensors = [t for edit in edits for t in (*edit.factors[:3], edit.factors.diagonal)]
            edited: Tensor = _EditRows.apply(hidden, rows, gates, *tensors)[0]  # type: ignore[no-untyped-call]  # torch's
            return edited
        return _edited(hidden, edits, rows, states, in_place=in_place)[0]


def outside_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Within the block there is no autocast; where there is none anyway, this takes no time."""
    is_within = torch.compiler.is_compiling() or torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_within else contextlib.nullcontext()


def _edited(
    hidden: Float[Tensor, "rows hidden"],
    edits: Sequence[RowEdit],
    rows: EditedRows,
    states: Sequence[Float[Tensor, "rows hidden"]] = (),
    *,
    in_place: bool = False,
) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "n hidden"], list[Float[Tensor, "count k"]]]:
    """The edited hidden states; the states that the edits read; and what is between D and U."""
    parts = [rows.gather(state) for state in states or (hidden,)]
    whole = wide = sum(parts[1:], parts[0]).to(edits[0].factors.up.dtype)
    if rows.skipped is not None:
        wide = wide.masked_fill(rows.skipped, 0)
    inners = [
        edit.inner(part) if off is None else edit.inner(part).masked_fill(off, 0)
        for edit, part, off in zip(edits, rows.split(wide), rows.split(rows.skipped), strict=True)
    ]
    # What autograd records would multiply a NaN among skipped rows' gradients by zero.
    is_masked = rows.skipped is not None and torch.is_grad_enabled()
    is_one = not (edits[0].dropout or edits[0].keeps_norm)
    if rows.indices is None and is_one and not (states or is_masked):
        return edits[0].added(whole, inners[0], wide).to(hidden.dtype), wide, inners
    deltas = [
        edit.outer(inner, part)
        for edit, inner, part in zip(edits, inners, rows.split(wide), strict=True)
    ]
    delta = (deltas[0] if len(deltas) == 1 else torch.cat(deltas)).to(hidden.dtype)
    if rows.skipped is not None and is_masked:
        delta = delta.masked_fill(rows.skipped, 0)
    if in_place and rows.indices is not None:
        hidden.index_add_(0, rows.indices, delta)
        return hidden, wide, inners
    if rows.indices is None:
        return hidden + delta, wide, inners
    return hidden.index_add(0, rows.indices, delta), wide, inners


class _EditRows(torch.autograd.Function):
    r"""`edit_rows` with its gradient in closed form.

    With H the states that are read, $Q = g \odot (HD^\top + b)$, and G the gradient of the edited
    rows, $P = g \odot GU^\top$: the gradient of U is $Q^\top G$, that of D is $P^\top H$, that of b
    is the sum of P's rows, that of S is $g'^\top(H \odot G)$, and that of H is
    $G + PD + (g'S) \odot G$. H and Q are outputs, too, so that gradients of gradients reach what
    they were computed from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        rows: EditedRows,
        gates: Sequence[Tensor | None],
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        edits = _edits(tensors, gates)
        edited, wide, inners = _edited(hidden, edits, rows)
        ctx.rows, ctx.gates, ctx.shape = rows, gates, hidden.shape
        ctx.set_materialize_grads(False)
        if rows.indices is None:  # hidden states take less memory in their own dtype
            ctx.save_for_backward(hidden, *inners, *tensors)
            return edited, None, *inners
        ctx.save_for_backward(wide, *inners, *tensors)
        return edited, wide, *inners

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, of_states: Tensor | None, *of_inners: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if gradient is None:
            gradient = ctx.saved_tensors[0].new_zeros(ctx.shape)
        with outside_autocast(gradient.device.type):
            of_hidden, of_tensors = _gradients(ctx, gradient, of_states, of_inners)
        return of_hidden, None, None, *of_tensors


def _gradients(
    ctx: Any,
    gradient: Tensor,
    of_states: Tensor | None,
    of_inners: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of hidden states, and of D, b, U and S of each edit."""
    rows, count, needed = ctx.rows, len(ctx.gates), ctx.needs_input_grad
    states, *rest = ctx.saved_tensors
    inners, edits = rest[:count], _edits(rest[count:], ctx.gates)
    dtype, skipped = edits[0].factors.up.dtype, rows.skipped
    states, whole = states.to(dtype), rows.gather(gradient).to(dtype)
    wide = whole
    if skipped is not None:
        wide = wide.masked_fill(skipped, 0)
        if rows.indices is None:
            states = states.masked_fill(skipped, 0)
    between, of_tensors = [], []
    parts = zip(edits, rows.split(wide), rows.split(states), rows.split(skipped), strict=True)
    for index, (edit, part, read, off) in enumerate(parts):
        product = part @ edit.factors.up.mT
        if (extra := of_inners[index]) is not None:
            product = product + (extra if off is None else extra.masked_fill(off, 0))
        product = edit.times_gates(product, part)
        of_down, of_bias, of_up, of_diagonal = needed[4 * index + 3 : 4 * index + 7]
        of_tensors += [
            product.mT @ read if of_down else None,
            product.sum(0) if of_bias else None,
            inners[index].mT @ part if of_up else None,
            edit.of_diagonal(read * part) if of_diagonal else None,
        ]
        between.append((edit, product, part))
    if not needed[0]:
        return None, of_tensors
    if rows.indices is None:
        edit, product, part = between[0]
        of_all = edit.with_scaled(torch.addmm(whole, product, edit.factors.down), part)
        return of_all.to(gradient.dtype), of_tensors
    of_read = [
        edit.with_scaled(product @ edit.factors.down, part) for edit, product, part in between
    ]
    change = of_read[0] if count == 1 else torch.cat(of_read)
    if of_states is not None:
        change = change + (of_states if skipped is None else of_states.masked_fill(skipped, 0))
    return gradient.index_add(0, rows.indices, change.to(gradient.dtype)), of_tensors


def _edits(tensors: Sequence[Any], gates: Sequence[Tensor | None]) -> list[RowEdit]:
    """Edits without activations, from the tensors of all of them."""
    each = zip(*(tensors[i::4] for i in range(4)), gates, strict=True)
    return [
        RowEdit(Factors(down, bias, up, (), diagonal=diagonal), gate)
        for down, bias, up, diagonal, gate in each
    ]


class StackedEdit(nn.Module):
    """The edits of several adapters at a site as one: the gates say which of them a row gets.

    Args:
        parts: the edits.
        owners: for each edit, the number of its adapter, which is the column of its gate.
        keeps_norm: whether the sum of a row's edits keeps the norm of its states.
    """

    down: Tensor
    bias: Tensor
    up: Tensor
    diagonal: Tensor | None
    probe: Tensor | None
    probed: Tensor | None
    owner: Tensor

    def __init__(
        self, parts: Sequence[Factors], owners: Sequence[int], keeps_norm: bool = False
    ) -> None:
        super().__init__()
        self.keeps_norm = keeps_norm
        factors, of = side_by_side(parts)
        for name in ("down", "bias", "up", "diagonal", "probe", "probed"):
            self.register_buffer(name, getattr(factors, name), persistent=False)
        self.register_buffer("owner", torch.tensor(owners, device=of.device)[of], persistent=False)
        self.acts = factors.acts
        self.hidden_size = factors.down.shape[1]

    def wide_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The wider of a dtype and the weights'."""
        return torch.promote_types(dtype, self.down.dtype)

    def row_edit(
        self,
        dtype: torch.dtype,
        device: torch.device,
        scale: float = 1.0,
        gates: Float[Tensor, "rows adapters"] | None = None,
    ) -> RowEdit:
        """The sum of the edits, each times its adapter's gate; arguments as of an intervention."""
        tensors = self.down, self.bias, self.up
        more = self.diagonal, self.probe, self.probed
        factors = Factors(*tensors, self.acts, False, *more).ready(dtype, device, scale)
        if gates is not None:
            gates = gates.to(factors.up).index_select(-1, self.owner)
        return RowEdit(factors, gates, keeps_norm=self.keeps_norm)
