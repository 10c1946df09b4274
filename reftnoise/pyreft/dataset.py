"""pyreft's `dataset` module: examples whose columns say which positions are edited.

`intervention_locations` of an example are, for each intervention, the columns that it edits. All
columns have pyreft's values. Of a prompt of k tokens, "f3" is the first min(⌊k/2⌋, 3) and "l3" the
last min(⌊k/2⌋, 3), so that a short prompt of odd length has a token in the middle without an edit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import datasets

from ..data.collation import ReftDataCollator
from ..data.encoding import IGNORED_LABEL, LOCATIONS
from ..data.templates import ALPACA, ALPACA_WITH_INPUT
from ..data.tokenization import expect_tokenizer
from .locations import Locations, get_intervention_locations, parse_positions
from .pairs import ReftPreferenceDataset, ReftRewardCollator, ReftRewardDataset
from .reft_trainer import make_data_collator
from .rows import (
    ReftClassificationDataset,
    ReftDataset,
    ReftGenerationDataset,
    ReftRawDataset,
    ReftSupervisedDataset,
    prompt_and_answer,
)

__all__ = [
    "IGNORE_INDEX",
    "ReftClassificationDataset",
    "ReftDataCollator",
    "ReftDataset",
    "ReftGenerationDataset",
    "ReftPreferenceDataset",
    "ReftRawDataset",
    "ReftRewardCollator",
    "ReftRewardDataset",
    "ReftSupervisedDataset",
    "get_intervention_locations",
    "make_last_position_supervised_chat_data_module",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "no_header_prompt_template",
    "parse_positions",
    "prompt_input",
    "prompt_no_input",
]

IGNORE_INDEX = IGNORED_LABEL
prompt_no_input = ALPACA.format(prompt="%s")
prompt_input = ALPACA_WITH_INPUT.format(prompt="%s", input="%s")
no_header_prompt_template = "### Instruction:\n%s\n\n### Response:\n"


def make_last_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    num_interventions: int = 1,
    nonstop: bool = False,
) -> dict[str, Any]:
    """Dataset and collator in which every intervention edits the prompt's last token.

    The function of this name in `reftnoise` has more sources of data, and a prompt's tokens do not
    depend on its completion there.

    Args:
        tokenizer: tokenizer of the base.
        model: the base or the `ReftModel`.
        inputs: prompts.
        outputs: their completions, which are tokenised together with them.
        num_interventions: number of interventions.
        nonstop: whether completions end without the end-of-text token.
    """

    def last_column(length: int) -> Locations:
        return [[length - 1]] * num_interventions

    return _data_module(tokenizer, model, inputs, outputs, nonstop, last_column)


make_last_position_supervised_chat_data_module = make_last_position_supervised_data_module
"""pyreft's other name for the same."""


def make_multiple_position_supervised_data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    positions: str = "f1+l1",
    num_interventions: int = 1,
    nonstop: bool = False,
    share_weights: bool = False,
) -> dict[str, Any]:
    """Dataset and collator in which interventions edit the prompt's first and last tokens.

    Positions that a short prompt lacks are the first token after it.

    Args:
        tokenizer: tokenizer of the base.
        model: the base or the `ReftModel`.
        inputs: prompts.
        outputs: their completions, which are tokenised together with them.
        positions: positions such as `"f3+l3"`.
        num_interventions: number of interventions, as in `get_intervention_locations`.
        nonstop: whether completions end without the end-of-text token.
        share_weights: whether the interventions edit both sides, as there.
    """
    first_n, last_n = parse_positions(positions)

    def columns(length: int) -> Locations:
        return get_intervention_locations(
            last_position=length,
            first_n=first_n,
            last_n=last_n,
            pad_mode="last",
            num_interventions=num_interventions,
            share_weights=share_weights,
        )

    return _data_module(tokenizer, model, inputs, outputs, nonstop, columns)


def _data_module(
    tokenizer: Any,
    model: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    nonstop: bool,
    locations: Callable[[int], Locations],
) -> dict[str, Any]:
    expect_tokenizer(tokenizer)
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    end = "" if nonstop else tokenizer.eos_token
    rows = []
    for prompt, answer in zip(inputs, outputs, strict=True):
        columns, length = prompt_and_answer(tokenizer, prompt, answer + end)
        ids, labels = columns["input_ids"].tolist(), columns["labels"].tolist()
        rows.append({"input_ids": ids, LOCATIONS: locations(length), "labels": labels})
    return {
        "train_dataset": datasets.Dataset.from_list(rows),
        "eval_dataset": None,
        "data_collator": make_data_collator(tokenizer, model),
    }
