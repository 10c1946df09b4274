"""Directions of concepts without training: differences of means, principal components, probes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...data.conversations import Messages
from ...interventions import AdditionIntervention
from ...model import ReftModel
from ..steering.directions import probe_direction
from ..steering.fit import set_vector
from ..steering.options import Method, expect_method
from .token_states import beginning_of, expect_longer, token_states, tokens_of


def concept_direction(
    method: Method,
    positive: Float[Tensor, "positives hidden"],
    negative: Float[Tensor, "negatives hidden"],
) -> Float[Tensor, " hidden"]:
    r"""The unit vector of a method from states of tokens, as `fit_concept_vectors` says.

    Raises:
        ValueError: the states of the two kinds do not differ.
    """
    mean = positive.mean(0) - negative.mean(0)
    if method == "mean":
        direction = mean
    elif method == "probe":
        direction = probe_direction(positive, negative)
    else:
        if len(positive) < 2:
            raise ValueError("pca: expected at least 2 tokens with the concept, got 1")
        centred = positive - positive.mean(0)
        if centred.norm() <= 1e-5 * positive.norm():  # which is rounding
            raise ValueError(
                "pca: all tokens with the concept have the same state, about which there is no "
                "component: expected texts that differ, or another method"
            )
        # The eigenvectors of a small matrix: there are many more tokens than dimensions.
        direction = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -1]
        direction = direction * torch.where(direction @ mean < 0, -1.0, 1.0)
    if not direction.any():
        raise ValueError("texts of both kinds have the same states: no direction parts them")
    return direction / direction.norm()


def fit_concept_vectors(
    reft_model: ReftModel,
    tokenizer: Any,
    positive: Sequence[str | Messages],
    negative: Sequence[str | Messages],
    *,
    method: Method = "mean",
    skip: int | None = None,
    batch_size: int = 16,
) -> dict[str, float]:
    r"""Set the vector of every `addition` unit to $a_{\max} w$, from texts with a concept or not.

    w is a unit vector from the bare base's states of all tokens, and $a_{\max}$ the largest
    $h \cdot w$ over tokens of the positive texts: `reft_model.scale` is then the factor of AxBench
    (arXiv:2501.17148, section 3). The methods are its baselines:

    - `"mean"`: w is along mean⁺ − mean⁻ (DiffMean);
    - `"pca"`: w is the first principal component of the positive tokens about their mean, with the
      sign that mean⁺ − mean⁻ has along it;
    - `"probe"`: w is the normal of the plane with which logistic regression separates the tokens.

    All layers are read in one pass; the tokens of all units are held at once.

    Args:
        reft_model: model whose units are set.
        tokenizer: tokenizer of its base.
        positive: texts or conversations that show the concept.
        negative: texts or conversations that do not; any number.
        method: how w is computed.
        skip: as in `detect`.
        batch_size: number of texts per forward pass.

    Returns:
        $a_{\max}$ by unit key.

    Raises:
        ValueError: no `addition` unit, no texts of a kind, a text without a token that counts, an
            unknown method, or equal states.
    """
    placed = [p for p in reft_model.engine.units if isinstance(p.unit, AdditionIntervention)]
    if not placed:
        raise ValueError("the config has no unit whose intervention is 'addition'")
    expect_method(method)
    rows = tokens_of(tokenizer, reft_model, positive, name="positive")
    rows += tokens_of(tokenizer, reft_model, negative, name="negative")
    skipped = beginning_of(tokenizer, positive) if skip is None else skip
    expect_longer(rows, skipped)
    states: dict[str, tuple[list[Tensor], list[Tensor]]] = {p.key: ([], []) for p in placed}
    for index, by_unit in token_states(reft_model, rows, placed, batch_size=batch_size):
        for key, hidden in by_unit.items():
            states[key][index >= len(positive)].append(hidden[skipped:].float())
    largest = {}
    for unit in placed:
        with_concept, without = (torch.cat(part) for part in states.pop(unit.key))
        direction = concept_direction(method, with_concept, without)
        largest[unit.key] = float((with_concept @ direction).max())
        # Where all tokens lie on the other side, the direction alone is kept.
        size = largest[unit.key] if largest[unit.key] > 0 else 1.0
        set_vector(unit, size * direction)
    return largest
