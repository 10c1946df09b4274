"""Matrices with orthonormal rows, cheap to differentiate and computed once per step.

pyreft orthonormalises with torch's Householder parametrisation, evaluated three times per call,
whose backward pass dominates a training step from rank 8 on. Here R comes from a raw matrix X by
Cholesky-QR, batched over all interventions of one shape; in evaluation it is computed once.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .kept import KeepsForEvaluation

SMALLEST_PIVOT = 1e-6
"""Of rows of length 1. What rounding to fp32 leaves of a dependent row is below it."""

LARGEST_ROUNDING = 1e-5
"""Of an element of RRᵀ − I: fp32 stays below 1e-6, bf16 and what pyreft distorts are above 1e-3."""


def distance_from_orthonormal(basis: Float[Tensor, "rank hidden"]) -> float:
    """The largest element of $|RR^T - I|$."""
    wide = basis.double()
    gram = wide @ wide.mT
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def expect_orthonormal(basis: Float[Tensor, "rank hidden"]) -> None:
    """Raise a ValueError for rows that are not orthonormal."""
    if not (error := distance_from_orthonormal(basis)) <= LARGEST_ROUNDING:
        raise ValueError(
            f"R: expected orthonormal rows, but RRᵀ − I reaches {error:.1g}; the matrix of "
            "NoreftIntervention has no such constraint"
        )


def orthonormal_rows(
    raw: Float[Tensor, "*batch rank hidden"],
) -> Float[Tensor, "*batch rank hidden"]:
    r"""$R = L^{-1}X$ with $XX^\top = LL^\top$: orthonormal rows with the span of X's rows.

    This is QR with a positive diagonal, so it is unique, smooth, and unchanged when a row of X is
    scaled: weight decay cannot pull R to zero. Rows are normalised first and the arithmetic is
    fp64 where the device has it, so that $\|RR^\top - I\|$ stays at fp32's rounding level for
    every X whose rows are linearly independent in fp32.

    Args:
        raw: X, any floating dtype.

    Returns:
        R in the dtype of X, at least fp32. All NaN where X has linearly dependent rows: a loud
        result that needs no synchronisation with the device, unlike an exception.
    """
    matrices = raw.reshape(-1, *raw.shape[-2:])
    # torch.compile traces no function that has a derivative in forward mode.
    function = _CholeskyQR if torch.compiler.is_compiling() else _CholeskyQRBothWays
    with torch.autocast(raw.device.type, enabled=False):
        basis: Tensor = function.apply(matrices)[0]  # type: ignore[no-untyped-call]  # torch's
    return basis.view(raw.shape)


class _CholeskyQR(torch.autograd.Function):
    r"""R and $L^{-1}$, with the gradient in closed form, in a third of the time of autograd's.

    With $G$ the gradient of R and $M = \mathrm{tril}(GR^\top)$, that of X is
    $L^{-\top}(G - (M + \mathrm{tril}(M, -1)^\top)R)$.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(raw: Float[Tensor, "batch rank hidden"]) -> tuple[Tensor, Tensor]:
        rows = raw.to(torch.float32 if raw.device.type == "mps" else torch.float64)
        gram = rows @ rows.mT
        lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        gram = gram / lengths[..., :, None] / lengths[..., None, :]
        lower, info = torch.linalg.cholesky_ex(gram)
        # A row's pivot is its distance from the span of the rows before it.
        pivot = lower.diagonal(dim1=-2, dim2=-1).amin(-1)
        dependent = (info != 0) | ~(pivot >= SMALLEST_PIVOT)
        lower = lower.masked_fill(dependent[..., None, None], float("nan")) * lengths[..., None]
        inverse = _inverse(lower)
        basis = (inverse @ rows).to(torch.promote_types(raw.dtype, torch.float32))
        return basis, inverse.to(basis.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        basis, inverse = output
        ctx.mark_non_differentiable(inverse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, inverse, basis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> Tensor | None:
        if gradient is None:
            return None
        raw, inverse, basis = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second gradients, L as a function of X
            inverse = _inverse(raw @ basis.mT)
        below = (gradient @ basis.mT).tril()
        symmetric = below + below.tril(-1).mT
        return inverse.mT @ torch.baddbmm(gradient, symmetric, basis, alpha=-1)


class _CholeskyQRBothWays(_CholeskyQR):
    r"""The same, also in forward mode: with $S = L^{-1}\dot X R^\top$ and $T = S + S^\top$,
    $\dot R = L^{-1}\dot X - (\mathrm{tril}(T) - \tfrac12\mathrm{diag}(T))R$.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        _CholeskyQR.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output[1], output[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, None]:
        inverse, basis = ctx.saved_tensors
        step = inverse @ tangent
        below = step @ basis.mT
        below = below + below.mT
        below = below.tril() - torch.diag_embed(below.diagonal(dim1=-2, dim2=-1) / 2)
        return step - below @ basis, None


def _inverse(lower: Tensor) -> Tensor:
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)


class LowRankRotation(KeepsForEvaluation):
    r"""$R \in \mathbb{R}^{r \times d}$ with orthonormal rows; call the module to get it.

    The parameter `weight` is the raw X of `orthonormal_rows`, fp32 or wider. It starts at half an
    orthonormal matrix: R moves then under Adam exactly as fast as pyreft's, whose coordinates
    receive twice the gradient.

    In evaluation, R is computed at the first call and kept, see `KeepsForEvaluation`.
    """

    def __init__(self, hidden_size: int, rank: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(rank, hidden_size, dtype=wide))
        self._shared: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new random R."""
        nn.init.orthogonal_(self.weight)
        with torch.no_grad():
            self.weight.mul_(0.5)

    @torch.no_grad()
    def set_basis(self, basis: Float[Tensor, "rank hidden"]) -> None:
        """Set R.

        Raises:
            ValueError: a matrix of another shape, or whose rows are not orthonormal.
        """
        if basis.shape != self.weight.shape:
            raise ValueError(f"R {tuple(basis.shape)}: expected {tuple(self.weight.shape)}")
        expect_orthonormal(basis)
        self.weight.copy_(basis / 2)

    def forward(
        self, hidden: Float[Tensor, "*rows hidden"] | None = None
    ) -> Float[Tensor, "rank hidden"] | Float[Tensor, "*rows rank"]:
        """R, or with hidden states $Rh$, in the dtype of R."""
        basis = self._basis()
        return basis if hidden is None else hidden.to(basis.dtype) @ basis.mT

    def _basis(self) -> Float[Tensor, "rank hidden"]:
        if self._shared is not None:
            return self._shared
        basis: Tensor = self.kept("basis", lambda: orthonormal_rows(self.weight))
        return basis

    def extra_repr(self) -> str:
        rank, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, rank={rank}"


@contextlib.contextmanager
def shared_bases(rotations: Iterable[LowRankRotation]) -> Iterator[None]:
    """Compute R of all trained rotations in one batched call per shape, for the block's duration.

    A rotation that several sites share, or that is read several times, is computed once.
    """
    groups: dict[tuple[object, ...], list[LowRankRotation]] = defaultdict(list)
    trained = [r for r in dict.fromkeys(rotations) if r.is_trained and r._shared is None]
    for rotation in trained:
        weight = rotation.weight
        groups[weight.shape, weight.dtype, weight.device].append(rotation)
    try:
        for group in groups.values():
            with torch.autocast(group[0].weight.device.type, enabled=False):
                bases = orthonormal_rows(torch.stack([rotation.weight for rotation in group]))
            for rotation, basis in zip(group, bases.unbind(), strict=True):
                rotation._shared = basis
        yield
    finally:
        for rotation in trained:
            rotation._shared = None
