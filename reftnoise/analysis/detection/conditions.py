"""Conditions of prompts: the layer, vector and threshold that separate labelled prompts (CAST)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...data.conversations import Messages
from ...engine.units import PlacedUnit
from ...interventions import ConditionGate
from ...model import ReftModel
from .token_states import token_states, tokens_of


@dataclass(frozen=True, eq=False)
class Condition:
    """A condition of prompts at a unit's site.

    Args:
        unit: unit at whose site it is.
        vector: vector of the gate.
        threshold: threshold of the gate.
        above: whether prompts above the threshold meet it, or those below.
        f1: F1 on the prompts that it was fitted to.
        held_out_f1: F1 on the prompts that were held out.
    """

    unit: PlacedUnit
    vector: Float[Tensor, " hidden"]
    threshold: float
    above: bool
    f1: float
    held_out_f1: float

    @property
    def gate(self) -> dict[str, Any]:
        """The `gate` of an entry; its vector is set once the model is made."""
        return {"type": "condition", "threshold": self.threshold, "above": self.above}


def fit_conditions(
    reft_model: ReftModel,
    tokenizer: Any,
    positive: Sequence[str | Messages],
    negative: Sequence[str | Messages],
    *,
    method: Literal["pca", "mean"] = "pca",
    held_out: float = 0.25,
    batch_size: int = 16,
) -> dict[str, Condition]:
    r"""The condition at each unit's site that separates positive prompts from negative ones best.

    v is fitted to the mean state $\bar h$ of each prompt, as the gate reads it of the bare base:

    - `"pca"`: the first principal component about $(\mu^+ + \mu^-)/2$, the means of both kinds;
    - `"mean"`: $\mu^+ - \mu^-$.

    Threshold and side are those of the largest F1; of several thresholds, the one in the middle of
    the widest gap between similarities. The last prompts of each kind are held out.

    Args:
        reft_model: model whose units say which sites are tried, as by `layer: all`.
        tokenizer: tokenizer of its base.
        positive: prompts whose rows are to be edited: texts, or conversations up to their end.
        negative: prompts whose rows are not; any number.
        method: how v is fitted.
        held_out: share of each kind that is held out, at least one prompt.
        batch_size: number of prompts per forward pass.

    Returns:
        The conditions by unit key, those of the largest F1 first.

    Raises:
        ValueError: no unit, fewer than two prompts of a kind, prompts with equal states, an unknown
            method, or a `held_out` that is no share.

    Paper: CAST (arXiv:2409.05907), section 3 and appendix.
    """
    placed = [unit for unit in reft_model.engine.units if unit.positions is not None]
    if not placed:
        raise ValueError("no unit edits hidden states, so there is no site to try")
    if method not in ("pca", "mean"):
        raise ValueError(f"method {method!r}: expected 'pca' or 'mean'")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out {held_out!r}: expected a share between 0 and 1")
    rows = tokens_of(tokenizer, reft_model, positive, name="positive")
    rows += tokens_of(tokenizer, reft_model, negative, name="negative")
    kept = []
    for name, prompts in (("positive", positive), ("negative", negative)):
        if len(prompts) < 2:
            raise ValueError(f"{name}: expected at least two prompts, one of which is held out")
        count = len(prompts) - max(1, round(held_out * len(prompts)))
        kept += [index < max(1, count) for index in range(len(prompts))]
    means: dict[str, list[Tensor]] = {unit.key: [torch.empty(0)] * len(rows) for unit in placed}
    with torch.no_grad():
        for index, by_unit in token_states(reft_model, rows, placed, batch_size=batch_size):
            for key, states in by_unit.items():
                means[key][index] = states.float().mean(0).cpu()
    is_positive = torch.arange(len(rows)) < len(positive)
    conditions = [
        _condition(unit, torch.stack(means[unit.key]), is_positive, torch.tensor(kept), method)
        for unit in placed
    ]
    return {c.unit.key: c for c in sorted(conditions, key=lambda c: -c.f1)}


def _condition(
    unit: PlacedUnit,
    means: Float[Tensor, "prompts hidden"],
    is_positive: Bool[Tensor, " prompts"],
    is_kept: Bool[Tensor, " prompts"],
    method: str,
) -> Condition:
    with_it, without = (means[is_kept & kind] for kind in (is_positive, ~is_positive))
    centres = with_it.mean(0), without.mean(0)
    vector = centres[0] - centres[1]
    if vector.norm() <= 1e-5 * centres[0].norm():  # which is rounding
        raise ValueError(f"{unit.key}: prompts of both kinds have the same states")
    if method == "pca":
        about = torch.cat([with_it, without]) - (centres[0] + centres[1]) / 2
        vector = torch.linalg.svd(about, full_matrices=False).Vh[0]
    vector = vector / vector.norm()
    gate = ConditionGate(embed_dim=len(vector))
    gate.vector.copy_(vector)
    similarities = gate.similarity(means).double()
    threshold, above = best_threshold(similarities[is_kept], is_positive[is_kept])
    scores = [
        f1_score(_meets(similarities[part], threshold, above=above), is_positive[part])
        for part in (is_kept, ~is_kept)
    ]
    return Condition(unit, vector, threshold, above, *scores)


def best_threshold(values: Float[Tensor, " n"], labels: Bool[Tensor, " n"]) -> tuple[float, bool]:
    """The threshold of the largest F1, and whether values above it are the positive ones.

    Thresholds lie between neighbouring values, or beyond all, within -1 and 1.
    """
    levels = sorted(set(values.tolist()))
    between = list(zip([-1.0, *levels], [*levels, 1.0], strict=True))
    tried = [
        (f1_score(_meets(values, (low + high) / 2, above=above), labels), high - low, above, low)
        for low, high in between
        for above in (True, False)
    ]
    _, gap, above, low = max(tried, key=lambda trial: trial[:2])
    return low + gap / 2, above


def f1_score(predicted: Bool[Tensor, " n"], labels: Bool[Tensor, " n"]) -> float:
    r"""$2\,\mathrm{TP} / (2\,\mathrm{TP} + \mathrm{FP} + \mathrm{FN})$; 0 if TP is 0."""
    right = int((predicted & labels).sum())
    wrong = int((predicted != labels).sum())
    return 2 * right / (2 * right + wrong) if right else 0.0


def _meets(values: Float[Tensor, " n"], threshold: float, *, above: bool) -> Bool[Tensor, " n"]:
    return values > threshold if above else values < threshold
