"""Steering vectors from pairs of prompts that differ in one thing, without training."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...data.conversations import Messages
from ...engine.units import PlacedUnit
from ...interventions import VectorIntervention
from ...model import ReftModel
from .directions import steering_vector
from .options import Method, expect_method
from .states import read_states, tokens_to_read


def fit_steering_vectors(
    reft_model: ReftModel,
    tokenizer: Any,
    positive: Sequence[str | Messages],
    negative: Sequence[str | Messages],
    *,
    method: Method = "mean",
    positions: str | list[int] = "l1",
    batch_size: int = 16,
) -> dict[str, float]:
    r"""Set the vector of every `addition` and `ablate` unit from contrastive pairs of prompts.

    $\delta_i = h(x_i^+) - h(x_i^-)$ is the difference of the bare base's states at the unit's site,
    averaged over `positions`, and $\bar\delta$ is its mean over pairs.

    - `"mean"`: $v = \bar\delta$, the difference of means (CAA, arXiv:2312.06681);
    - `"pca"`: $v = (\bar\delta^\top u)\,u$ with u the first principal component of the δᵢ about
      zero (as in representation engineering, arXiv:2310.01405);
    - `"probe"`: the same with u the unit normal of the plane by which logistic regression parts the
      positive states from the negative ones (as in inference-time intervention, arXiv:2306.03341).

    `positions="differing"` reads the tokens by which the halves of a pair differ: those after their
    common beginning and before their common end. A conversation may then end in the assistant's
    answer.

    Of an `ablate` unit, the direction of v alone counts.

    Args:
        reft_model: model whose units are set; its `scale` and adapters' scales multiply them.
        tokenizer: tokenizer of its base.
        positive: prompts, texts or conversations, that show the wanted behaviour.
        negative: as many prompts that show the opposite, each the other half of a pair.
        method: how v is computed from the differences.
        positions: tokens of the prompts at which states are read, or `differing`.
        batch_size: number of prompts per forward pass.

    Returns:
        ‖v‖ / ‖h‖ by unit key, where ‖h‖ is the mean norm of the states that were read: how large
        the edit is next to them.

    Raises:
        ValueError: no unit that has a vector, unequal numbers of prompts, an unknown method, a
            prompt without a token at `positions`, or states that are not finite.
    """
    placed = [p for p in reft_model.engine.units if isinstance(p.unit, VectorIntervention)]
    if not placed:
        raise ValueError("the config has no unit whose intervention is 'addition' or 'ablate'")
    expect_method(method)
    if isinstance(positive, str) or isinstance(negative, str):
        raise ValueError("positive and negative: expected lists of prompts, got a single text")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    if len(positive) != len(negative) or not positive:
        raise ValueError(
            f"{len(positive)} positive and {len(negative)} negative prompts: expected pairs"
        )
    rows = tokens_to_read(tokenizer, positive, negative, positions)
    states, count = read_states(reft_model, rows, placed, batch_size=batch_size), len(positive)
    ratios = {}
    for unit in placed:
        means, norms = states[unit.key].means, states[unit.key].norms
        vector = steering_vector(method, means[:count], means[count:])
        set_vector(unit, vector)
        ratios[unit.key] = float(vector.norm() / norms.mean())
    return ratios


def set_vector(placed: PlacedUnit, vector: Tensor) -> None:
    """Put a vector into a unit that has one."""
    unit: Any = placed.unit
    unit.vector.copy_(vector)
