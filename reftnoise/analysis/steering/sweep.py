r"""Which layer, method and strength: the largest shift within a budget of divergence.

The shift of a vector is the mean change of $P(\text{matching}) / (P(\text{matching}) +
P(\text{not matching}))$ over questions, each answer's probability being the product over its
tokens. Its cost is the mean KL(base ‖ steered) per token on the base's own greedy answers to
neutral prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...adapters.library import AdapterChoice
from ...config.positions import Positions
from ...engine.base.sites import layer_of
from ...evaluation.forgetting import token_kl
from ...evaluation.likelihood import Progress, TokenPair, grouped
from ...evaluation.scoring import evaluating
from ...model import ReftModel
from .continuations import Continuations
from .directions import steering_vector
from .fit import set_vector
from .options import Method, SteerOptions
from .pairs import Contrast
from .states import ReadStates, ReadTokens, read_states


@dataclass(frozen=True)
class Candidate:
    """A vector of a method at a layer, as an adapter by name.

    Args:
        method: method of the vector.
        layer: layer that it edits.
        ratio: ‖v‖ / ‖h‖.
        scales: factors of the vector that are tried.
    """

    method: Method
    layer: int
    ratio: float
    scales: tuple[float, ...]

    @property
    def name(self) -> str:
        """Its name as an adapter."""
        return f"{self.method}-{self.layer}"

    def choices(self) -> list[AdapterChoice]:
        """The vector times each factor, as choices of adapters."""
        return [{self.name: scale} for scale in self.scales]


def fitted_candidates(
    reft_model: ReftModel,
    pairs: Sequence[Contrast],
    options: SteerOptions,
    *,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Vectors of all methods at all units, from one pass over pairs, loaded by their names.

    Args:
        reft_model: model with an `addition` unit at each layer.
        pairs: pairs, whose differing parts are read.
        options: methods of the vectors, and their sizes or factors.
        progress: function that is called with the numbers of halves done and of all halves.

    Raises:
        ValueError: all vectors are zero.
    """
    rows = differing_tokens(pairs)
    units = reft_model.engine.units
    states = read_states(reft_model, rows, units, batch_size=options.batch_size, progress=progress)
    candidates = []
    for method in options.methods:
        layers = {}
        for unit in units:
            vector = _vector(method, states[unit.key], len(pairs))
            set_vector(unit, vector)
            layer = layer_of(reft_model.model, unit.site)
            assert layer is not None
            layers[layer] = float(vector.norm() / states[unit.key].norms.mean())
        for layer, ratio in layers.items():
            if ratio:
                scales = options.scales or [size / ratio for size in options.sizes]
                candidate = Candidate(method, layer, ratio, tuple(scales))
                reft_model.adapters.derive(candidate.name, "default", layers=[layer])
                candidates.append(candidate)
    if not candidates:
        raise ValueError("the halves of the pairs have the same states: no vector parts them")
    return candidates


def differing_tokens(pairs: Sequence[Contrast]) -> list[ReadTokens]:
    """The tokens of all matching, then of all other halves, whose differing parts are read."""
    return [
        ReadTokens(pair.prompt + part, [False] * len(pair.prompt) + [True] * len(part))
        for parts in ([(p, p.matching) for p in pairs], [(p, p.other) for p in pairs])
        for pair, part in parts
    ]


def _vector(method: Method, states: ReadStates, count: int) -> Float[Tensor, " hidden"]:
    return steering_vector(method, states.means[:count], states.means[count:])


class Questions:
    """Questions with a matching and another answer, asked under choices of adapters.

    Arguments are those of `Continuations`.
    """

    def __init__(
        self,
        reft_model: ReftModel,
        pairs: Sequence[Contrast],
        *,
        positions: Positions | None,
        rows: int,
    ) -> None:
        self._model = reft_model
        self._pairs: list[TokenPair] = [
            (pair.prompt, answer) for pair in pairs for answer in (pair.matching, pair.other)
        ]
        self._groups = grouped(self._pairs)  # answers of a token need one pass
        firsts = [self._pairs[group[0]] for group in self._groups]
        self._asked = Continuations(reft_model, firsts, positions=positions, rows=rows)

    def matching(self, choices: Sequence[AdapterChoice]) -> Float[Tensor, "choices questions"]:
        """The probability of the matching answer, of the two, under each choice."""
        sums = torch.empty(len(choices), len(self._pairs))
        with evaluating(self._model):
            for number, log_probs in self._asked.log_probs(choices):
                for index in self._groups[number]:
                    tokens = torch.tensor(self._pairs[index][1], device=log_probs.device)
                    each = log_probs.gather(2, tokens.expand(len(choices), -1)[..., None])
                    sums[:, index] = each.sum((1, 2)).cpu()
        return sums.view(len(choices), -1, 2).softmax(-1)[..., 0]


class NeutralPrompts:
    """Prompts with the base's own answers, and how far from it choices of adapters are there.

    Arguments are those of `Continuations`.
    """

    def __init__(
        self,
        reft_model: ReftModel,
        pairs: Sequence[TokenPair],
        *,
        positions: Positions | None,
        rows: int,
    ) -> None:
        self._model = reft_model
        self._answered = Continuations(reft_model, pairs, positions=positions, rows=rows)
        self._count = len(pairs)

    def divergence(self, choices: Sequence[AdapterChoice]) -> Float[Tensor, "choices prompts"]:
        """The mean KL(base ‖ steered) per token of each prompt's answer, in nats."""
        kl = torch.empty(len(choices), self._count)
        with evaluating(self._model):
            for index, log_probs in self._answered.log_probs([None, *choices]):
                base = log_probs[0]
                for row, steered in enumerate(log_probs[1:]):
                    kl[row, index] = float(token_kl(base, steered).mean())
        return kl


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a search measured on the questions and neutral prompts to choose by.

    Args:
        base: probability of the matching answer of each question, by the bare base.
        matching: the same with each vector, by its name, [scales, questions].
        divergence: of the vectors for which it was needed, [scales, prompts].
        chosen: vector and factor with the largest shift within the budget.
    """

    base: Float[Tensor, " questions"]
    matching: dict[str, Float[Tensor, "scales questions"]]
    divergence: dict[str, Float[Tensor, "scales prompts"]]
    chosen: tuple[Candidate, float]

    def shifts(self, name: str) -> Float[Tensor, "scales questions"]:
        """The change of each question's probability with a vector."""
        return self.matching[name] - self.base


def sweep(
    candidates: Sequence[Candidate],
    questions: Questions,
    neutral: NeutralPrompts,
    *,
    budget: float,
    sized_by: Literal["sizes", "scales"] = "sizes",
    progress: Progress | None = None,
) -> Sweep:
    """The vector and factor with the largest mean shift of those within the budget.

    The divergence is measured in the order of shifts, until the first that is within: no other can
    be chosen.

    Args:
        candidates: vectors, and the factors of each.
        questions: questions that the shift is measured on.
        neutral: prompts that the divergence is measured on.
        budget: greatest mean divergence, in nats per token.
        sized_by: option that says the factors, which an error names.
        progress: function that is called with the numbers of vectors done and of all vectors.

    Raises:
        ValueError: none is within the budget.
    """
    (base,) = questions.matching([None])
    matching: dict[str, Tensor] = {}
    for done, candidate in enumerate(candidates, start=1):
        matching[candidate.name] = questions.matching(candidate.choices())
        if progress is not None:
            progress(done, len(candidates))
    divergence: dict[str, Tensor] = {}
    for candidate, number in _by_shift(candidates, base, matching):
        if candidate.name not in divergence:
            divergence[candidate.name] = neutral.divergence(candidate.choices())
        if float(divergence[candidate.name][number].mean()) <= budget:
            chosen = candidate, candidate.scales[number]
            return Sweep(base, matching, divergence, chosen)
    least = min(float(kl.mean(1).min()) for kl in divergence.values())
    raise ValueError(
        f"budget {budget}: no vector is within it, the least divergence is {least:.2g} nats per "
        f"token: try smaller {sized_by}"
    )


def _by_shift(
    candidates: Sequence[Candidate], base: Tensor, matching: Mapping[str, Tensor]
) -> Iterator[tuple[Candidate, int]]:
    """All vectors and factors, as the numbers of the latter, the largest mean shift first."""
    means: dict[tuple[Any, int], float] = {
        (candidate, number): float(mean)
        for candidate in candidates
        for number, mean in enumerate((matching[candidate.name] - base).mean(1))
    }
    yield from sorted(means, key=lambda key: -means[key])
