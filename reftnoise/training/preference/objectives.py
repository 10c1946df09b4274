r"""The losses of `PreferenceObjective` from log-probabilities, and the strengths that they draw.

A batch has the chosen answers of all pairs, then the rejected ones; for the mirror image of RePS,
all of them once more.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...config.preference import PreferenceObjective
from ...interventions import RowStrengths


class AnswerLogProbs(NamedTuple):
    """Of each answer, the sum of its tokens' log-probabilities, and their number."""

    sums: Float[Tensor, " answers"]
    lengths: Int[Tensor, " answers"]


class Draw(NamedTuple):
    """What a pass over pairs runs with."""

    strengths: RowStrengths | None
    """One for each row of the pass; None for edits as they are."""
    copies: int = 1
    """How many times the pass has the batch."""
    sign: float = 1.0
    """d of BiPO."""


def reps_logits(
    chosen: AnswerLogProbs,
    rejected: AnswerLogProbs,
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    r"""$\beta^+\log p(y^+)/\|y^+\| - \log p(y^-)/\|y^-\|$, $\|\cdot\|$ the number of tokens.

    $\beta^+ = \max(\log p_\mathrm{ref}(y^-) - \log p_\mathrm{ref}(y^+), 1)$. (RePS,
    arXiv:2505.20809, section 4. The authors' code counts the prompt's tokens, too.)
    """
    weight = (reference_rejected - reference_chosen).clamp(min=1)
    return weight * chosen.sums / chosen.lengths - rejected.sums / rejected.lengths


def dpo_logits(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    *,
    beta: float,
    sign: float = 1.0,
) -> Float[Tensor, " pairs"]:
    r"""$d\beta(\Delta(y^+) - \Delta(y^-))$, where $\Delta(y) = \log p(y) - \log p_\mathrm{ref}(y)$.

    DPO (arXiv:2305.18290) with d = 1; BiPO (arXiv:2406.00045, equation 3) with d = ±1 under d times
    the edits.
    """
    return sign * beta * ((chosen - reference_chosen) - (rejected - reference_rejected))


def draw(objective: PreferenceObjective, pairs: int, *, is_training: bool) -> Draw:
    """The strengths of a pass over so many pairs: drawn in training, and always alike otherwise.

    In evaluation, d is 1 and the factors of RePS take turns.
    """
    if objective.name == "dpo":
        return Draw(None)
    if objective.name == "bipo":
        sign = float(torch.randint(2, ()) * 2 - 1) if is_training else 1.0
        return Draw(RowStrengths(torch.full((2 * pairs,), sign)), sign=sign)
    possible = torch.tensor(objective.factors)
    numbers = torch.arange(pairs) % len(possible)
    if is_training:
        numbers = torch.randint(len(possible), (pairs,))
    factors = possible[numbers].repeat(2)
    if objective.suppression == "none":
        return Draw(RowStrengths(factors))
    if objective.suppression == "negate":
        return Draw(RowStrengths(torch.cat([factors, -factors])), copies=2)
    removed = torch.arange(4 * pairs) >= 2 * pairs
    return Draw(RowStrengths(factors.repeat(2), removed), copies=2)


def preference_logits(
    objective: PreferenceObjective,
    drawn: Draw,
    policy: AnswerLogProbs,
    reference: Float[Tensor, " answers"],
) -> Float[Tensor, " terms"]:
    """What σ is taken of in the loss of each pair, and then of each pair's mirror image.

    Args:
        objective: objective of the training.
        drawn: strengths that the policy's pass had.
        policy: answers of the pass, those of its second copy of the batch last.
        reference: log-probabilities of the batch's answers by the base without edits.
    """
    of_chosen, of_rejected = reference.chunk(2)
    sums, lengths = (tensor.chunk(2 * drawn.copies) for tensor in policy)
    if objective.beta is not None:
        return dpo_logits(
            sums[0], sums[1], of_chosen, of_rejected, beta=objective.beta, sign=drawn.sign
        )
    parts = [AnswerLogProbs(*part) for part in zip(sums, lengths, strict=True)]
    terms = [reps_logits(parts[0], parts[1], of_chosen, of_rejected)]
    if drawn.copies == 2:
        terms.append(reps_logits(parts[3], parts[2], of_rejected, of_chosen))
    return torch.cat(terms)


def preference_loss(logits: Float[Tensor, " terms"]) -> Float[Tensor, ""]:
    r"""The mean of $-\log\sigma$ over all terms."""
    return -F.logsigmoid(logits).mean()
