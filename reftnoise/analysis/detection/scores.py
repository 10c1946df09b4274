"""How well scores separate texts that show a concept from others."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def auroc(
    scores: Float[Tensor, " texts"], labels: Bool[Tensor, " texts"] | Sequence[bool]
) -> float:
    r"""The area under the receiver operating characteristic, by the ranks of scores.

    $P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)$ for a text $s^+$ that shows the concept and another one
    $s^-$: the statistic of Mann and Whitney over the number of such pairs.

    Args:
        scores: scores of texts.
        labels: whether each text shows the concept.

    Raises:
        ValueError: another number of labels, or no text of one kind.
    """
    is_positive = torch.as_tensor(labels, dtype=torch.bool)
    if is_positive.shape != scores.shape:
        raise ValueError(f"labels: expected {len(scores)}, one per text, got {len(is_positive)}")
    positives = int(is_positive.sum())
    negatives = len(scores) - positives
    if not (positives and negatives):
        raise ValueError(
            f"labels: {positives} of {len(scores)} texts show the concept: expected texts of both "
            "kinds"
        )
    _, groups, counts = torch.unique(scores.double().cpu(), return_inverse=True, return_counts=True)
    # Equal scores share the mean of their ranks.
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[groups]
    above = float(ranks[is_positive].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)
