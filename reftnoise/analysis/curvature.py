"""How sharply the loss bends in the embeddings, which is what noise on them is averaged over."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..adapters.library import OWN
from ..engine.base.threads import hooked
from ..engine.layout import prompt_lengths_from_labels
from ..evaluation.scoring import evaluating
from ..model import ReftModel


def embedding_hessian_trace(
    reft_model: ReftModel, batches: Sequence[Mapping[str, Any]], *, draws: int = 8, seed: int = 0
) -> Float[Tensor, "rows draws"]:
    r"""Estimates of $\mathrm{tr}\,\nabla_X^2 L$ for each row, by Hutchinson's method.

    X are a row's token embeddings, at attended tokens, and L is its mean loss per label, without
    noise or dropout. An estimate is $v^\top \nabla_X^2 L\, v$ with elements of v drawn from ±1; its
    mean over draws is the trace. Where noise of variance σ² per element acts on X, the loss grows
    by $\tfrac12 \sigma^2\, \mathrm{tr}\,\nabla_X^2 L$ to second order, for SymNoise without a term
    of first order: that symmetric noise lowers this trace is what its authors report
    (arXiv:2605.23171).

    torch's random state comes back as it was.

    Args:
        reft_model: model whose own units act.
        batches: collated rows with labels, for a causal language model or a classifier.
        draws: number of estimates of each row.
        seed: seed of v.

    Raises:
        ValueError: no draws, or a row without a label.
    """
    if draws < 1:
        raise ValueError(f"draws {draws}: expected at least 1")
    estimates = []
    # Fused attention has no second gradient.
    with evaluating(reft_model, seed), reft_model.using(adapter=OWN), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            with torch.enable_grad(), _embeddings(reft_model) as seen:
                loss = _row_losses(reft_model, batch).sum()
                (embeddings,) = seen
                (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
                kept = batch["attention_mask"].to(embeddings)[..., None]
                for_row = [_product(gradient, embeddings, kept) for _ in range(draws)]
            estimates.append(torch.stack(for_row, dim=1).cpu())
    return torch.cat(estimates)


def _product(
    gradient: Tensor, embeddings: Tensor, kept: Float[Tensor, "rows tokens 1"]
) -> Float[Tensor, " rows"]:
    """One estimate for each row: rows do not depend on each other."""
    directions = (torch.randint_like(embeddings, 2) * 2 - 1) * kept
    (product,) = torch.autograd.grad(gradient, embeddings, directions, retain_graph=True)
    return (directions * product).double().sum((1, 2))


def _row_losses(reft_model: ReftModel, batch: Mapping[str, Any]) -> Float[Tensor, " rows"]:
    inputs = {
        name: values.to(reft_model.device) if isinstance(values, Tensor) else values
        for name, values in batch.items()
    }
    labels = inputs.pop("labels")  # with them, prompts might run without gradients
    if labels.dim() == 1:
        return F.cross_entropy(reft_model(**inputs).logits.float(), labels, reduction="none")
    if "prompt_lengths" not in inputs:
        attended = inputs["attention_mask"]
        inputs["prompt_lengths"] = prompt_lengths_from_labels(labels, attended)
    counts = (labels[:, 1:] != -100).sum(1)
    if not counts.all():
        raise ValueError(f"row {int(counts.argmin())} of a batch: expected a label, found none")
    logits = reft_model(**inputs).logits[:, -labels.shape[1] :]
    losses = F.cross_entropy(logits[:, :-1].float().mT, labels[:, 1:], reduction="none")
    return losses.sum(1) / counts


@contextlib.contextmanager
def _embeddings(reft_model: ReftModel) -> Iterator[list[Tensor]]:
    """The token embeddings of the calls within the block, as leaves of their graphs."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    with hooked([(reft_model.get_input_embeddings(), keep)]):
        yield seen
