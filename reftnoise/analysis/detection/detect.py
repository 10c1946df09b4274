"""Activations of units' directions on texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...data.conversations import Messages
from ...engine.units import PlacedUnit
from ...interventions import edit_vector
from ...model import ReftModel
from .scores import auroc
from .token_states import beginning_of, expect_longer, pieces_of, token_states, tokens_of


@dataclass(frozen=True, eq=False)
class Detection:
    """What a unit detects in texts, a column for each of its concepts.

    Args:
        tokens: tokens of each text, as texts; a letter of several tokens is at the last of them.
        activations: activation of each token of each text.
        scores: score of each text, the largest activation of its tokens but the first `skip`.
        skip: number of tokens at the beginning of a text that do not count.
    """

    tokens: list[list[str]]
    activations: list[Float[Tensor, "tokens concepts"]]
    scores: Float[Tensor, "texts concepts"]
    skip: int

    @property
    def largest(self) -> Float[Tensor, " concepts"]:
        """The largest score of all texts: edits by a factor times it are of AxBench's sizes."""
        return self.scores.amax(0)

    def auroc(self, labels: Bool[Tensor, " texts"] | Sequence[bool]) -> list[float]:
        """The area under the curve of each concept's scores; arguments as of `scores.auroc`.

        Raises:
            ValueError: another number of labels than texts, or no text of one kind.
        """
        return [auroc(column, labels) for column in self.scores.unbind(1)]

    def write(
        self,
        directory: str | Path,
        *,
        concept: int = 0,
        texts: Sequence[int] = (0,),
        title: str = "Activations",
        name: str = "detection",
    ) -> Path:
        """Write `detection.html` and `detection.png`: texts, coloured by activation.

        Args:
            directory: directory that gets the files.
            concept: number of the concept.
            texts: numbers of the texts.
            title: heading of the page.
            name: name of the two files, which replace those of that name: another one for each
                concept or unit.

        Returns:
            The path of the page.

        Raises:
            ValueError: no text, or a text or concept that does not exist.
        """
        count, concepts = self.scores.shape
        if not 0 <= concept < concepts:
            raise ValueError(f"concept {concept}: expected one from 0 to {concepts - 1}")
        if not texts or not all(0 <= index < count for index in texts):
            raise ValueError(f"texts {list(texts)}: expected numbers from 0 to {count - 1}")
        from ..report import write_detection

        shown = [(self.tokens[i], self.activations[i][:, concept].tolist()) for i in texts]
        return write_detection(directory, title, shown, skip=self.skip, name=name)


def detect(
    reft_model: ReftModel,
    tokenizer: Any,
    texts: Sequence[str | Messages],
    *,
    skip: int | None = None,
    batch_size: int = 16,
) -> dict[str, Detection]:
    r"""Activations of each unit's directions on texts, all units in one pass of the bare base.

    A `reftr1` unit has $\mathrm{ReLU}(h_t \cdot w + b)$. A unit whose edit is a vector v, such as
    `addition`, has $h_t \cdot v / \|v\|$: with vectors of `fit_concept_vectors`, these are the
    baselines of AxBench. A text's score is the largest activation of its tokens.

    Args:
        reft_model: model with such units.
        tokenizer: tokenizer of its base.
        texts: texts, or conversations, which are read to their end.
        skip: number of tokens at the beginning of each text that do not count, whose activations
            are large whatever the text; by default that of a `reftr1` unit, or else those with
            which the tokenizer, or its chat template, begins all texts.
        batch_size: number of texts per forward pass.

    Returns:
        What each unit detects, by its key.

    Raises:
        ValueError: no unit that detects, no text, or one without a token that counts.
    """
    placed = [unit for unit in reft_model.engine.units if detects(unit)]
    if not placed:
        raise ValueError(
            "no unit detects: expected reftr1, or one whose edit is a vector, such as addition"
        )
    rows = tokens_of(tokenizer, reft_model, texts)
    beginning = beginning_of(tokenizer, texts)
    skips = {
        unit.key: int(getattr(unit.unit, "skip", beginning)) if skip is None else skip
        for unit in placed
    }
    expect_longer(rows, max(skips.values()))
    acts: dict[str, list[Tensor]] = {u.key: [torch.empty(0)] * len(rows) for u in placed}
    with torch.no_grad():
        for index, by_unit in token_states(reft_model, rows, placed, batch_size=batch_size):
            for unit in placed:
                acts[unit.key][index] = _activations(unit, by_unit[unit.key]).cpu()
    pieces = [pieces_of(tokenizer, row) for row in rows]
    return {
        key: Detection(
            pieces, of_texts, torch.stack([a[skips[key] :].amax(0) for a in of_texts]), skips[key]
        )
        for key, of_texts in acts.items()
    }


def detects(placed: PlacedUnit) -> bool:
    """Whether a unit has directions that detect."""
    unit: Any = placed.unit
    return hasattr(unit, "activations") or edit_vector(unit) is not None


def _activations(
    placed: PlacedUnit, hidden: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens concepts"]:
    unit: Any = placed.unit
    if hasattr(unit, "activations"):
        activations: Tensor = unit.activations(hidden).float()
        return activations
    vector = edit_vector(unit)
    if vector is None or not vector.any():
        raise ValueError(
            f"{placed.key}: its vector is 0: expected one that was set, as by fit_concept_vectors, "
            "or trained"
        )
    return (hidden.float() @ (vector / vector.norm()).to(hidden.device, torch.float32))[:, None]
