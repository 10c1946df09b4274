"""Texts after prompts, under many choices of adapters: what no choice edits is computed once.

An edit at a token changes nothing before it. Where positions name a prompt's last tokens alone, all
that comes before them is therefore the bare base's under every choice. It is computed once, and
its keys and values are kept: a choice costs the edited tokens and the continuation.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...adapters.library import AdapterChoice
from ...config.positions import Positions
from ...engine.base.peft import inner_model
from ...engine.layout import named_tokens
from ...evaluation.likelihood import TokenPair
from ...model import ReftModel


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of a beginning, whose keys and values are kept, and of what every choice computes."""

    indices: list[int]
    lengths: list[int]
    """Tokens of each row's continuation."""
    ids: Int[Tensor, "rows columns"]
    mask: Int[Tensor, "rows width"]
    """Of the beginning, too."""
    prompt_lengths: Int[Tensor, " rows"]
    end: int
    """Column of `ids` in which prompts end."""
    cache: Any


class Continuations:
    """Prompts with continuations, ready to be predicted under choices of adapters.

    Args:
        reft_model: base with adapters by name, in evaluation mode.
        pairs: tokens of prompts and of what follows them.
        positions: positions that adapters edit; None for any.
        rows: number of prompts per forward pass, over all choices.
    """

    def __init__(
        self,
        reft_model: ReftModel,
        pairs: Sequence[TokenPair],
        *,
        positions: Positions | None,
        rows: int,
    ) -> None:
        self._model, self._pairs, self._positions, self._rows = reft_model, pairs, positions, rows
        base = inner_model(reft_model.model)
        self._known = set(inspect.signature(base.forward).parameters)
        self._batches: dict[int, list[_Batch]] = {}

    def log_probs(
        self, choices: Sequence[AdapterChoice]
    ) -> Iterator[tuple[int, Float[Tensor, "choices tokens vocabulary"]]]:
        """log p of all tokens before each one of a continuation, after the pair's index."""
        size = max(1, self._rows // len(choices))
        if size not in self._batches:
            order = sorted(range(len(self._pairs)), key=lambda i: -len(self._pairs[i][0]))
            parts = [order[start : start + size] for start in range(0, len(order), size)]
            self._batches = {size: [self._prepared(part) for part in parts]}
        for batch in self._batches[size]:
            logits = self._logits(batch, choices)
            for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
                of_row = logits[row * len(choices) : (row + 1) * len(choices)]
                yield index, of_row[:, :length].log_softmax(-1, torch.float32)

    @torch.no_grad()
    def _logits(
        self, batch: _Batch, choices: Sequence[AdapterChoice]
    ) -> Float[Tensor, "choice_rows columns vocabulary"]:
        count, columns = len(choices), batch.ids.shape[1]
        mask, kept = batch.mask.repeat_interleave(count, 0), columns - batch.end + 1
        inputs: dict[str, Any] = {
            "input_ids": batch.ids.repeat_interleave(count, 0),
            "attention_mask": mask,
            **self._those_known(position_ids=_places(mask)[:, -columns:], logits_to_keep=kept),
            "prompt_lengths": batch.prompt_lengths.repeat_interleave(count, 0),
            "adapter_names": [*choices] * len(batch.indices),
            "use_cache": batch.cache is not None,
        }
        if batch.cache is not None:
            inputs["past_key_values"] = copy.deepcopy(batch.cache)
            inputs["past_key_values"].batch_repeat_interleave(count)
        return self._model(**inputs).logits[:, -kept:]

    def _those_known(self, **arguments: Any) -> dict[str, Any]:
        """Arguments that the base takes: some bases count places themselves."""
        return {name: value for name, value in arguments.items() if name in self._known}

    @torch.no_grad()
    def _prepared(self, indices: list[int]) -> _Batch:
        pairs = [self._pairs[index] for index in indices]
        shortest = min(len(prompt) for prompt, _ in pairs)
        end = max(self._edited(len(prompt)) for prompt, _ in pairs)
        has_beginning = end < shortest
        if not has_beginning:
            end = max(len(prompt) for prompt, _ in pairs)
        width = max(len(rest) for _, rest in pairs) - 1  # the last token is predicted, not read
        beginnings = [prompt[:-end] if has_beginning else [] for prompt, _ in pairs]
        most = max(map(len, beginnings))
        device = self._model.device
        ids, mask = [], []
        for (prompt, rest), beginning in zip(pairs, beginnings, strict=True):
            read = prompt[len(beginning) :] + rest[:-1]
            before, after = most - len(beginning), width - len(rest) + 1
            between = end + width - len(read) - after
            pad = prompt[:1]
            ids.append([*pad * before, *beginning, *pad * between, *read, *pad * after])
            is_beginning = [0] * before + [1] * len(beginning)
            mask.append([*is_beginning, *[0] * between, *[1] * len(read), *[0] * after])
        all_ids = torch.tensor(ids, device=device)
        attended = torch.tensor(mask, device=device)
        cache = None
        if has_beginning:
            cache = self._kept(all_ids[:, :most], attended[:, :most])
        return _Batch(
            indices=indices,
            lengths=[len(rest) for _, rest in pairs],
            ids=all_ids[:, most:],
            mask=attended,
            prompt_lengths=torch.tensor([len(prompt) for prompt, _ in pairs], device=device),
            end=end,
            cache=cache,
        )

    def _edited(self, length: int) -> int:
        """How many tokens there are from the first that is edited to the prompt's end."""
        if self._positions is None:
            return length
        named = named_tokens(self._positions, torch.arange(length), torch.tensor(length))
        # The last one always has to be computed: it predicts what follows.
        return max(1, length - int(named.int().argmax())) if named.any() else 1

    def _kept(self, ids: Tensor, mask: Tensor) -> Any:
        """The bare base's keys and values."""
        with self._model.disabled():
            outputs = self._model(
                input_ids=ids,
                attention_mask=mask,
                use_cache=True,
                **self._those_known(position_ids=_places(mask), logits_to_keep=1),
            )
        return outputs.past_key_values


def _places(mask: Int[Tensor, "rows width"]) -> Int[Tensor, "rows width"]:
    return (mask.cumsum(1) - 1).clamp(min=0)
