r"""How far the predictions of a batch's two halves are apart, at the tokens with a label.

$$D = \frac1n \sum_t \mathrm{KL}(p_t\|q_t) + \mathrm{KL}(q_t\|p_t)
    = \frac1n \sum_t \sum_v (p_{tv} - q_{tv})(\log p_{tv} - \log q_{tv})$$
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .loss import MAX_LOGITS, Head, mean_of, targets_of


def divergence(
    first: Float[Tensor, "*tokens vocabulary"], second: Float[Tensor, "*tokens vocabulary"]
) -> Float[Tensor, "*tokens"]:
    """The symmetric KL divergence of two predictions, given as logits, in fp32 at least."""
    p, q = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        for logits in (first, second)
    )
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def pair_loss(
    head: Head,
    hidden: Float[Tensor, "batch length hidden"],
    targets: Int[Tensor, "batch length"],
    num_items: Tensor | int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss of the first half's targets as `label_loss` has it, and D of both halves.

    Both are of one run of the head over the states that predict a label, in chunks.

    Args:
        head: from hidden states to logits.
        hidden: output of the decoder.
        targets: token that each column predicts, or -100; that of the second half are not read.
        num_items: divisor of the loss, by default the number of targets.
    """
    rows = len(hidden) // 2
    flat = targets[:rows].flatten().to(hidden.device)
    places = (flat != -100).nonzero()[:, 0]
    targets = flat.index_select(0, places)
    first, second = (h.flatten(0, 1).index_select(0, places) for h in hidden.tensor_split(2))
    if head.is_trained:  # autograd needs the logits
        total, apart = _sums(head, first, second, targets)
    else:
        total, apart = _ChunkedPairs.apply(first, second, targets, head)  # type: ignore[no-untyped-call]  # torch's
    count = len(targets)
    return mean_of(total, count, num_items), apart / max(count, 1)


def divergence_of_logits(logits: Tensor, labels: Tensor, *, shifts: bool) -> Float[Tensor, ""]:
    """D, from the logits that a base computed for all tokens or rows of both halves.

    Args:
        logits: of tokens [batch, length, vocabulary] or of rows [batch, classes].
        labels: -100 where nothing is predicted.
        shifts: whether a column's logits predict the label of the next one.
    """
    if logits.dim() == 3:
        logits = logits[:, -labels.shape[1] :]  # without those of PEFT's virtual tokens
    targets = targets_of(labels) if shifts else labels
    first, second = logits.tensor_split(2)
    counts = (targets[: len(first)] != -100).to(logits.device)
    if not torch.compiler.is_compiling():  # whose graph such shapes would break
        first, second, counts = first[counts], second[counts], counts[counts]
    apart = divergence(first, second).masked_fill(~counts, 0.0)
    return apart.sum() / counts.sum().clamp(min=1)


def _sums(head: Head, first: Tensor, second: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits, other = (head.logits(states[None])[0] for states in (first, second))
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, divergence(logits, other).sum()


def _with_slopes(
    first: Float[Tensor, "tokens vocabulary"],
    second: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    r"""The summed loss and divergence of logits, and their derivatives in closed form.

    With $u = \log p - \log q$, these are $p(u - \mathrm{KL}(p\|q) + 1) - q$ and
    $q(1 - u - \mathrm{KL}(q\|p)) - p$ of the divergence, and $p - y$ of the loss.
    """
    log_p = first.to(torch.promote_types(first.dtype, torch.float32)).log_softmax(-1)
    log_q = second.to(log_p.dtype).log_softmax(-1)
    loss = -log_p.gather(-1, targets[:, None]).sum()
    p, q = log_p.exp(), log_q.exp()
    u = log_p.sub_(log_q)
    to_q, to_p = torch.linalg.vecdot(p, u)[:, None], -torch.linalg.vecdot(q, u)[:, None]
    of_first = (u - (to_q - 1)).mul_(p).sub_(q)
    of_second = u.neg_().sub_(to_p - 1).mul_(q).sub_(p)
    p[torch.arange(len(p), device=p.device), targets] -= 1
    slopes = (of_first, of_second, p)
    return loss, (to_q + to_p).sum(), tuple(s.to(first.dtype) for s in slopes)  # type: ignore[return-value]  # three


class _ChunkedPairs(torch.autograd.Function):
    """The summed loss and divergence of a frozen head, with gradients like `_ChunkedLoss`."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Float[Tensor, "tokens hidden"],
        second: Float[Tensor, "tokens hidden"],
        targets: Int[Tensor, " tokens"],
        head: Head,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        size = max(1, MAX_LOGITS // (2 * head.vocabulary))
        wide = torch.promote_types(first.dtype, torch.float32)
        total, apart = (first.new_zeros((), dtype=wide) for _ in range(2))
        needs_gradient = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(first) for _ in range(3 * needs_gradient)]
        for start in range(0, len(first), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(needs_gradient):
                leaves = [s[chunk].detach().requires_grad_(needs_gradient) for s in (first, second)]
                logits = [head.logits(leaf[None])[0] for leaf in leaves]
            p, q = (values.detach() for values in logits)
            loss, distance, slopes = _with_slopes(p, q, targets[chunk])
            for gradient, half, slope in zip(gradients, (0, 1, 0), slopes, strict=False):
                (gradient[chunk],) = torch.autograd.grad(
                    logits[half], leaves[half], slope, retain_graph=True
                )
            total += loss
            apart += distance
        ctx.save_for_backward(*gradients)
        return total, apart

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients of gradients need the base's own loss: call the model with "
                "return_logits=True"
            )
        apart_first, apart_second, loss_first = ctx.saved_tensors
        of_loss, of_apart = (g.to(apart_first.dtype) for g in upstream)
        return apart_first * of_apart + loss_first * of_loss, apart_second * of_apart, None, None
