"""pyreft's datasets of two answers to a prompt, one of them better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ..data.conversations import whole_text
from ..data.encoding import IGNORED_LABEL, LOCATIONS
from .rows import ReftDataset, alpaca_prompt, prompt_and_answer, token_ids


class ReftPreferenceDataset(ReftDataset):
    """Rows of instruction, input and two outputs: read the rejected one, learn the chosen one.

    Prompts have Alpaca's template. `instruction_field`, `input_field`, `chosen_output_field` and
    `rejected_output_field` name the columns. Other splits than "train" have prompts alone.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Read the columns' names."""
        self.input_field = kwargs["input_field"]
        self.instruction_field = kwargs["instruction_field"]
        self.chosen_output_field = kwargs["chosen_output_field"]
        self.rejected_output_field = kwargs["rejected_output_field"]

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Ids of prompt and rejected output, labels of the chosen one, padded to one length."""
        prompt = alpaca_prompt(data_item, self.instruction_field, self.input_field)
        if self.data_split != "train":
            ids = token_ids(self.tokenizer, prompt)
            return {"input_ids": ids}, len(ids)
        end = self.tokenizer.eos_token
        rejected, _ = prompt_and_answer(
            self.tokenizer, prompt, data_item[self.rejected_output_field] + end
        )
        chosen, length = prompt_and_answer(
            self.tokenizer, prompt, data_item[self.chosen_output_field] + end
        )
        ids, labels = rejected["input_ids"], chosen["labels"]
        longer = len(labels) - len(ids)
        return {
            "input_ids": pad(ids, (0, max(longer, 0)), value=self.tokenizer.pad_token_id),
            "labels": pad(labels, (0, max(-longer, 0)), value=IGNORED_LABEL),
        }, length


class ReftRewardDataset(ReftDataset):
    """Rows of two conversations, of which the first, or the one of greater reward, is chosen.

    All tokens that both have at their beginning are counted. `conv_A_field` and `conv_B_field` name
    the columns of conversations, or with `prompt_field` of answers to a prompt;
    `conv_A_reward_field` and `conv_B_reward_field` those of rewards.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Read the columns' names."""
        self.conv_A_field = kwargs["conv_A_field"]
        self.conv_B_field = kwargs["conv_B_field"]
        self.prompt_field: Any = kwargs.get("prompt_field")
        self.conv_A_reward_field: Any = kwargs.get("conv_A_reward_field")
        self.conv_B_reward_field: Any = kwargs.get("conv_B_reward_field")
        self.fields_to_pad = ["chosen_output", "rejected_output"]
        self.fields_to_mask = ["chosen_output", "rejected_output"]

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Ids of the chosen and the rejected conversation, and their rewards."""
        texts = [self._text(data_item, name) for name in (self.conv_A_field, self.conv_B_field)]
        rewards: dict[str, Any] = {}
        fields = self.conv_A_reward_field, self.conv_B_reward_field
        if fields[0] is not None:
            values = [data_item[field] for field in fields]
            if values[0] < values[1]:
                texts.reverse()
                values.reverse()
            rewards = {"chosen_reward": values[0], "rejected_reward": values[1]}
        chosen, rejected = (token_ids(self.tokenizer, text) for text in texts)
        return {
            **rewards,
            "chosen_output": chosen,
            "rejected_output": rejected,
        }, _common_tokens(chosen, rejected)

    def _text(self, row: Mapping[str, Any], field: str) -> str:
        """A conversation in the tokenizer's chat template, without the beginning-of-text token."""
        conversation = row[field]
        if self.prompt_field is not None:
            prompt = {"role": "user", "content": row[self.prompt_field]}
            conversation = [prompt, {"role": "assistant", "content": conversation}]
        text = whole_text(self.tokenizer, conversation)
        return text.replace(self.tokenizer.bos_token or "", "")


def _common_tokens(first: Tensor, second: Tensor) -> int:
    """The number of equal tokens at the beginning; one less where the shorter text has no other."""
    width = min(len(first), len(second))
    differences = (first[:width] != second[:width]).nonzero()
    return int(differences[0]) if len(differences) else width - 1


@dataclass
class ReftRewardCollator:
    """Pads a batch of `ReftRewardDataset`: chosen and rejected conversations take turns.

    Args:
        tokenizer: tokenizer of the base.
        padding: padding, as in the tokenizer's `pad`.
        max_length: length that `padding="max_length"` pads to.
        pad_to_multiple_of: number that padded lengths are multiples of.
        return_tensors: kind of tensors that a batch holds.
    """

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        conversations = [
            {
                "input_ids": feature[f"{side}_output"],
                "attention_mask": feature[f"{side}_output_mask"],
                "reward": feature.get(f"{side}_reward", reward),
                LOCATIONS: feature[LOCATIONS],
            }
            for feature in features
            for side, reward in (("chosen", 1.0), ("rejected", 0.0))
        ]
        padded = self.tokenizer.pad(
            conversations,
            padding=self.padding,
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors=self.return_tensors,
        )
        names = ("input_ids", "attention_mask", "reward", LOCATIONS)
        batch: dict[str, Tensor] = {name: padded[name] for name in names}
        batch[LOCATIONS] = batch[LOCATIONS][..., : batch["input_ids"].shape[-1]]
        return batch
