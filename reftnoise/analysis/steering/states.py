"""The states of a bare base at sites, averaged over chosen tokens of each prompt."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..._util.errors import brief
from ...config.positions import Positions
from ...data.conversations import Messages, whole_text
from ...data.tokenization import prompt_tokens
from ...engine.base.threads import hooked
from ...engine.layout import named_tokens
from ...engine.units import PlacedUnit
from ...evaluation.likelihood import Progress
from ...evaluation.scoring import evaluating
from ...model import ReftModel
from .pairs import differing

DIFFERING = "differing"
"""Instead of positions: the tokens by which the two halves of a pair differ."""


@dataclass(frozen=True)
class ReadTokens:
    """The tokens of a prompt, and which of them are read."""

    tokens: list[int]
    are_read: list[bool]


@dataclass(frozen=True, eq=False)
class ReadStates:
    """What was read at one site.

    Args:
        means: mean state of each prompt's read tokens.
        norms: mean ‖h‖ of each prompt's read tokens.
    """

    means: Float[Tensor, "prompts hidden"]
    norms: Float[Tensor, " prompts"]


def tokens_to_read(
    tokenizer: Any,
    positive: Sequence[str | Messages],
    negative: Sequence[str | Messages],
    positions: str | list[int],
) -> list[ReadTokens]:
    """The tokens of all positive, then of all negative prompts.

    Raises:
        ValueError: a prompt has no token at the positions, or a pair no differing part.
    """
    prompts = [*positive, *negative]
    if positions == DIFFERING:
        tokens = [whole_tokens(tokenizer, prompt) for prompt in prompts]
        count = len(positive)
        pairs = zip(tokens[:count], tokens[count:], strict=True)
        ranges: list[tuple[range, range]] = []
        for index, pair in enumerate(pairs):
            try:
                ranges.append(differing(*pair))
            except ValueError as error:
                raise ValueError(f"pair {index}, {brief(positive[index])}: {error}") from None
        read = [first for first, _ in ranges] + [second for _, second in ranges]
        return [
            ReadTokens(row, [index in part for index in range(len(row))])
            for row, part in zip(tokens, read, strict=True)
        ]
    where, rows = Positions.parse(positions), []
    for prompt in prompts:
        row = prompt_tokens(tokenizer, prompt)
        named = named_tokens(where, torch.arange(len(row)), torch.tensor(len(row)))
        if not named.any():
            raise ValueError(f"positions {where.spec()!r}: prompt {prompt!r} has no such token")
        rows.append(ReadTokens(row, named.tolist()))
    return rows


def whole_tokens(tokenizer: Any, prompt: str | Messages) -> list[int]:
    """The tokens of a prompt, or of a conversation with the answer in which it ends."""
    ends_in_answer = not isinstance(prompt, str) and [*prompt][-1].get("role") == "assistant"
    if not ends_in_answer:
        return prompt_tokens(tokenizer, prompt)
    text = whole_text(tokenizer, prompt)  # type: ignore[arg-type]  # no text, as asked above
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def read_states(
    reft_model: ReftModel,
    rows: Sequence[ReadTokens],
    units: Sequence[PlacedUnit],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, ReadStates]:
    """The bare base's states at the units' sites, by unit key, in one pass over the rows."""
    means: dict[str, list[Tensor]] = {unit.key: [] for unit in units}
    norms: dict[str, list[Tensor]] = {unit.key: [] for unit in units}
    device = reft_model.model.device
    with evaluating(reft_model), reft_model.disabled():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            width = max(len(row.tokens) for row in batch)
            missing = [width - len(row.tokens) for row in batch]
            padded = zip(batch, missing, strict=True)
            ids = torch.tensor([row.tokens + row.tokens[:1] * n for row, n in padded])
            mask = torch.arange(width) < width - torch.tensor(missing)[:, None]
            padded = zip(batch, missing, strict=True)
            weights = torch.tensor([row.are_read + [False] * n for row, n in padded]).double()
            weights /= weights.sum(1, keepdim=True)
            with recorded(units) as seen:
                reft_model(input_ids=ids.to(device), attention_mask=mask.long().to(device))
            for key, hidden in seen.items():
                states, shares = hidden.double(), weights.to(hidden.device)
                mean = torch.einsum("bt,btd->bd", shares, states)
                if not mean.isfinite().all():
                    raise ValueError(f"{key}: the base's states there are not finite")
                means[key].append(mean)
                norms[key].append((shares * states.norm(dim=-1)).sum(1))
            if progress is not None:
                progress(min(start + batch_size, len(rows)), len(rows))
    return {key: ReadStates(torch.cat(means[key]), torch.cat(norms[key])) for key in means}


@contextlib.contextmanager
def recorded(units: Sequence[PlacedUnit]) -> Iterator[dict[str, Tensor]]:
    """The states that reach each unit's site within the block, by unit key."""
    seen: dict[str, Tensor] = {}

    def record(unit: PlacedUnit, args: Any, kwargs: Any, output: Any) -> None:
        if unit.site.is_input:
            output = args[0] if args else kwargs["hidden_states"]
        hidden = output[0] if isinstance(output, tuple) else output
        if (columns := unit.site.columns) is not None:
            hidden = torch.cat([hidden[..., start:end] for start, end in columns], -1)
        seen[unit.key] = hidden

    with hooked([(unit.site.module, partial(record, unit)) for unit in units]):
        yield seen
