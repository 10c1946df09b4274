"""Rows of a prompt and two answers → tokens, and batches of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
from torch import Tensor

from ..._util.errors import brief
from ...data.collation import ReftDataCollator
from ...data.conversations import Rendered, assistant_turns, rendered
from ...data.encoding import Example
from ...data.sources import Rows, expect_no_subspaces, load_rows, map_rows
from ...data.templates import check_template, fill
from ...data.tokenization import smallest_limit, tokenize_all, truncate
from ...engine.base.peft import inner_model, virtual_tokens
from ...engine.base.sites import takes_position_ids

logger = logging.getLogger(__name__)

PairRows: TypeAlias = Rows | str | Sequence[Mapping[str, Any]]
CHOSEN, REJECTED = "chosen", "rejected"
_TOKENS = datasets.List(datasets.Value("int64"))
_LENGTH = datasets.Value("int64")
_ANSWER = {"input_ids": _TOKENS, "labels": _TOKENS, "prompt_lengths": _LENGTH, "length": _LENGTH}
_FEATURES = datasets.Features({CHOSEN: _ANSWER, REJECTED: _ANSWER, "length": _LENGTH})


def make_preference_data_module(
    tokenizer: Any,
    model: Any,
    rows: PairRows,
    *,
    eval_rows: PairRows | None = None,
    template: str = "plain",
    max_length: int | None = None,
    shuffle_seed: int | None = None,
) -> dict[str, Any]:
    """Datasets and collator of pairs of answers: arguments of `ReftPreferenceTrainer`.

    A row has `prompt`, `chosen` and `rejected`, as for TRL's trainers: texts, or lists of messages,
    which the tokenizer's chat template reads.

    Args:
        tokenizer: tokenizer of the base.
        model: the base or the `ReftModel`; its context length bounds `max_length`.
        rows: list of rows, a dataset, the path of a file, or the name of a hub dataset.
        eval_rows: rows whose loss is measured during training.
        template: text around prompts that are texts: plain, chat, alpaca, or a text with {prompt}.
        max_length: greatest number of tokens of a prompt with an answer, by default what tokenizer
            and model allow. Longer prompts lose their beginning, the same for both answers.
        shuffle_seed: seed of the order of streamed rows, which keep theirs by default.

    Returns:
        `train_dataset`, `eval_dataset` (or None) and `data_collator`.

    Raises:
        RowError: a row that has no such columns, or an empty prompt or answer.
        ValueError: no rows, or an unknown template.
    """
    check_template(template)
    encoder = PairEncoder(tokenizer, template, smallest_limit(tokenizer, model, max_length))
    train_rows = _loaded(rows)
    if isinstance(train_rows, datasets.IterableDataset) and shuffle_seed is not None:
        train_rows = train_rows.shuffle(seed=shuffle_seed, buffer_size=10_000)
    base = model.model if hasattr(model, "reft_config") else model
    counts = takes_position_ids(inner_model(base)) and not virtual_tokens(base)
    eval_dataset = (
        None if eval_rows is None else _encoded(_loaded(eval_rows), encoder, "evaluation")
    )
    return {
        "train_dataset": _encoded(train_rows, encoder, "training"),
        "eval_dataset": eval_dataset,
        "data_collator": PairCollator(ReftDataCollator(tokenizer, position_ids=counts)),
    }


def _loaded(rows: PairRows) -> Rows:
    if isinstance(rows, str | Rows):
        return load_rows(rows)
    if not rows:
        raise ValueError("no pairs: expected at least one row of prompt, chosen and rejected")
    return datasets.Dataset.from_list([dict(row) for row in rows])


def _encoded(rows: Rows, encoder: "PairEncoder", name: str) -> Rows:
    expect_no_subspaces(rows)
    encoded = map_rows(rows, encoder, _FEATURES, name)
    if encoder.cut:
        logger.warning(
            "%d %s pairs were longer than %d tokens and lost the beginning of their prompts or the "
            "end of their answers; %d of them have equal answers now, and teach nothing",
            encoder.cut,
            name,
            encoder.max_length,
            encoder.equal,
        )
        encoder.cut = encoder.equal = 0
    return encoded


@dataclass
class PairEncoder:
    """Makes the tokens of a prompt with each of its two answers.

    Args:
        tokenizer: tokenizer of the base.
        template: text around prompts.
        max_length: greatest number of tokens of a prompt with an answer; None for no limit.
    """

    tokenizer: Any
    template: str = "plain"
    max_length: int | None = None
    cut: int = 0
    """Pairs that were cut."""
    equal: int = 0
    """Those of them whose answers are equal where they were cut."""

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a Trainer's dataset holds of a pair.

        Raises:
            ValueError: a column is missing, is empty or has another type, or the answers are equal.
        """
        for name in ("prompt", CHOSEN, REJECTED):
            if not isinstance(row.get(name), str | list):
                raise ValueError(
                    f"column {name!r}: expected a text or a list of messages, got {row.get(name)!r}"
                )
            if name != "prompt" and not row[name]:
                raise ValueError(f"column {name!r}: expected an answer, got an empty one")
        if row[CHOSEN] == row[REJECTED]:
            raise ValueError(f"chosen and rejected are the same: {brief(row[CHOSEN])}")
        texts = [self._text(row, row[name]) for name in (CHOSEN, REJECTED)]
        pairs = tokenize_all(self.tokenizer, texts, nonstop=False)
        prompt, _ = longest = max(pairs, key=lambda pair: len(pair[1]))
        kept, _ = truncate(self.tokenizer, *longest, self.max_length)
        room = None if self.max_length is None else self.max_length - len(kept)
        is_cut = len(kept) < len(prompt) or any(len(t) > len(t[:room]) for _, t in pairs)
        self.cut += is_cut
        self.equal += is_cut and pairs[0][1][:room] == pairs[1][1][:room]
        answers = [Example(kept, target[:room], False, False).features() for _, target in pairs]
        length = sum(answer["length"] for answer in answers)
        return {CHOSEN: answers[0], REJECTED: answers[1], "length": length}

    def _text(self, row: Mapping[str, Any], answer: Any) -> Rendered:
        prompt = fill(self.template, row["prompt"], row)
        if isinstance(answer, str):
            return rendered(self.tokenizer, prompt, answer)
        if isinstance(prompt, str):
            raise ValueError("the answers are messages: expected a prompt of messages, too")
        turns = list(assistant_turns(self.tokenizer, prompt, answer, {}))
        if len(turns) != 1:
            raise ValueError(f"an answer has {len(turns)} messages of the assistant's: expected 1")
        return turns[0]


@dataclass
class PairCollator:
    """Pads pairs to one batch: all chosen answers, then all rejected ones.

    Args:
        collator: collator of single examples.
    """

    collator: ReftDataCollator

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the collator."""
        return self.collator.tokenizer

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return self.collator([pair[name] for name in (CHOSEN, REJECTED) for pair in pairs])
