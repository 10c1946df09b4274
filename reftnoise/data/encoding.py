"""Rows of a dataset → tokenised examples, batch by batch, and what is logged of them."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .conversations import HANDED_ON, Rendered, assistant_turns, rendered
from .tasks.base import RowError, as_written
from .tokenization import tokenize_all, truncate

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
SUBSPACES = "subspaces"
LOCATIONS = "intervention_locations"
"""Keys of an example, as `ReftModel.forward` calls them."""


class _TextPair(NamedTuple):
    row: int
    text: Rendered
    subspaces: list[int] | None


class Example(NamedTuple):
    """Tokens of a prompt and its completion, and how much of them `max_length` took away."""

    prompt_ids: list[int]
    target_ids: list[int]
    is_cut: bool
    is_cut_short: bool
    subspaces: list[int] | None = None
    """Dimensions of the units' subspaces that the example is trained in; None for all."""

    def features(self, num_interventions: int | None = None) -> dict[str, Any]:
        """What a Trainer's dataset holds of an example; with a number, also the edited columns."""
        prompts = len(self.prompt_ids)
        further: dict[str, Any] = {} if self.subspaces is None else {SUBSPACES: self.subspaces}
        if num_interventions is not None:
            further[LOCATIONS] = [[prompts - 1]] * num_interventions
        return {
            "input_ids": self.prompt_ids + self.target_ids,
            "labels": [IGNORED_LABEL] * prompts + self.target_ids,
            "prompt_lengths": prompts,
            "length": prompts + len(self.target_ids),
            **further,
        }


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Makes examples of rows.

    Fields are as in `make_last_position_supervised_data_module`; messages have the dataset's name.
    """

    tokenizer: Any
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    subspaces_column: str = SUBSPACES
    chat_template: bool = False
    nonstop: bool = False
    max_length: int | None = None
    num_interventions: int | None = None
    name: str = "training"
    features: Mapping[str, Any] | None = None
    """Types of the columns, where they are known."""

    def columns(self, names: Sequence[str]) -> list[str]:
        """The columns of a dataset that are read."""
        others = [self.subspaces_column, *HANDED_ON]
        others = [name for name in others if name in names]
        if self.prompt_column in names and self.completion_column in names:
            return [self.prompt_column, self.completion_column, *others]
        if self.messages_column in names:
            return [self.messages_column, *others]
        raise ValueError(
            f"columns {', '.join(names)}: expected {self.prompt_column!r} and "
            f"{self.completion_column!r}, or {self.messages_column!r}; name yours with "
            "prompt_column, completion_column or messages_column"
        )

    def encode(
        self, rows: Iterable[Mapping[str, Any]], batch_size: int, *, first: int = 0
    ) -> Iterator[list[Example]]:
        """Batches of examples: one for each row, or for each assistant's turn of its conversation.

        At least `batch_size` examples are tokenised at once. The first row's index is for errors.

        Raises:
            RowError: a row that is no example.
        """
        batch: list[_TextPair] = []
        for index, row in enumerate(rows, start=first):
            try:
                batch += self._pairs(index, row)
            except ValueError as error:
                raise RowError(error, name=self.name, index=index) from None
            if len(batch) >= batch_size:
                yield self._encode(batch)
                batch = []
        if batch:
            yield self._encode(batch)

    def _pairs(self, index: int, row: Mapping[str, Any]) -> Iterator[_TextPair]:
        columns = self.columns(list(row))
        values = {name: as_written(row[name], (self.features or {}).get(name)) for name in columns}
        subspaces = None
        if self.subspaces_column in columns:
            subspaces = self._subspaces(values[self.subspaces_column])
        for text in self._texts(values):
            yield _TextPair(index, text, subspaces)

    def _texts(self, values: Mapping[str, Any]) -> Iterator[Rendered]:
        """One text of a prompt and its completion, or each assistant's turn of a conversation."""
        tokenizer = self.tokenizer
        variables = {name: values.get(name) for name in HANDED_ON}
        if self.messages_column in values:
            messages = values[self.messages_column]
            yield from assistant_turns(tokenizer, [], messages, variables)
            return
        prompt, completion = values[self.prompt_column], values[self.completion_column]
        if isinstance(prompt, list):
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            turns = list(assistant_turns(tokenizer, prompt, completion, variables))
            if not turns:
                raise ValueError(
                    f"{self.completion_column}: no message of the assistant's to learn"
                )
            yield from turns
            return
        asked = [{"role": "user", "content": prompt}] if self.chat_template else prompt
        yield rendered(tokenizer, asked, completion)

    def _subspaces(self, value: Any) -> list[int]:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or not all(type(i) is int and i >= 0 for i in value):
            raise ValueError(
                f"{self.subspaces_column} {value!r}: expected a list of dimensions, such as [0, 1]"
            )
        return list(value)

    def _encode(self, batch: Sequence[_TextPair]) -> list[Example]:
        try:
            texts = [pair.text for pair in batch]
            tokens = tokenize_all(self.tokenizer, texts, self.nonstop)
        except Exception as error:  # of the tokenizer, too
            if len(batch) == 1:
                raise RowError(error, name=self.name, index=batch[0].row) from error
            return [example for pair in batch for example in self._encode([pair])]
        return [self._fit(*ids, p.subspaces) for ids, p in zip(tokens, batch, strict=True)]

    def _fit(
        self, prompt_ids: list[int], target_ids: list[int], subspaces: list[int] | None
    ) -> Example:
        prompt, target = truncate(self.tokenizer, prompt_ids, target_ids, self.max_length)
        is_cut_short = len(target) < len(target_ids)
        is_cut = is_cut_short or len(prompt) < len(prompt_ids)
        return Example(prompt, target, is_cut, is_cut_short, subspaces)


@dataclass
class Counts:
    """What is logged of a dataset: how many examples and tokens it has, and what it lost."""

    examples: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    longest: int = 0
    cut: int = 0
    cut_short: int = 0

    def add(self, example: Example) -> None:
        """Count one more example."""
        prompts = len(example.prompt_ids)
        length = prompts + len(example.target_ids)
        self.examples += 1
        self.prompt_tokens += prompts
        self.tokens += length
        self.longest = max(self.longest, length)
        self.cut += example.is_cut
        self.cut_short += example.is_cut_short

    def log(self, name: str, max_length: int | None) -> None:
        """Log the counts, and warn of what was lost."""
        if self.cut:
            ends = f", {self.cut_short} of them also the end of their completions"
            logger.warning(
                "%d of %d %s examples were longer than %d tokens and lost the beginning of their "
                "prompts%s",
                self.cut,
                self.examples,
                name,
                max_length,
                ends if self.cut_short else "",
            )
        logger.info(
            "%d %s examples: %d tokens of prompts, %d of completions, the longest example %d",
            self.examples,
            name,
            self.prompt_tokens,
            self.tokens - self.prompt_tokens,
            self.longest,
        )
