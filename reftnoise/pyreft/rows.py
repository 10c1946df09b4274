"""pyreft's datasets of prompts and answers."""

import copy
from collections.abc import Mapping
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .._util.files import local_path
from ..data.encoding import IGNORED_LABEL, LOCATIONS, SUBSPACES
from ..data.templates import ALPACA, ALPACA_WITH_INPUT
from .locations import Locations, get_intervention_locations, parse_positions


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text, cut to the tokenizer's length."""
    length = tokenizer.model_max_length
    encoded = tokenizer(text, max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = encoded["input_ids"][0].long()
    return ids


def prompt_and_answer(tokenizer: Any, prompt: str, answer: str) -> tuple[dict[str, Any], int]:
    """Ids and labels of a text whose labels begin after the prompt's tokens, and their number."""
    length = len(token_ids(tokenizer, prompt))
    ids = token_ids(tokenizer, prompt + answer)
    labels = ids.clone()
    labels[:length] = IGNORED_LABEL
    return {"input_ids": ids, "labels": labels}, length


def alpaca_prompt(row: Mapping[str, Any], instruction_field: str, input_field: str | None) -> str:
    """A row's instruction, and its input where it has one, in Alpaca's template."""
    instruction = row[instruction_field]
    if input_field is None or row.get(input_field, "") == "":
        return ALPACA.format(prompt=instruction)
    return ALPACA_WITH_INPUT.format(prompt=instruction, input=row[input_field])


class ReftDataset(Dataset[dict[str, Any]]):
    """Tokenised examples with the columns that are edited.

    A subclass overrides `tokenize`, and where needed the other methods. An example has what
    `tokenize` returns, then `intervention_locations`, its number `id`, one padding token that
    positions which a short prompt lacks point to, the attention mask and `subspaces`.

    Args:
        task: name of a hub dataset.
        data_path: its configuration, or the path of a JSON file.
        tokenizer: tokenizer with a padding token.
        data_split: split of the dataset.
        dataset: rows, instead of a name or path.
        seed: seed for the choice of examples.
        max_n_example: number of rows to choose.
        kwargs: `position`, such as `"f3+l3"`, `num_interventions`, `share_weights`, and what a
            subclass reads in `preprocess`.
    """

    def __init__(
        self,
        task: str,
        data_path: str | None,
        tokenizer: Any,
        data_split: str = "train",
        dataset: Any = None,
        seed: int = 42,
        max_n_example: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer has no pad_token: expected one, such as its unk_token")
        self.tokenizer = tokenizer
        if "position" not in kwargs:
            raise ValueError("position is missing: expected one such as 'f3+l3'")
        self.first_n, self.last_n = parse_positions(kwargs["position"])
        self.task = task
        self.data_path = data_path
        self.data_split = data_split
        self.dataset = dataset
        self.seed = seed
        self.max_n_example = max_n_example
        self.pad_mode = "first"
        self.fields_to_pad = ["input_ids", "labels"]
        self.fields_to_mask = ["input_ids"]
        self.preprocess(kwargs)
        self.task_dataset = self.load_dataset()
        self.postprocess(kwargs)
        self.result: list[dict[str, Any]] = []
        for index, item in enumerate(self.task_dataset):
            tokens, last_position = self.tokenize(item)
            self.result.append(
                self.compute_intervention_and_subspaces(
                    index, item, tokens, last_position, **kwargs
                )
            )

    def __len__(self) -> int:
        return len(self.result)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return copy.deepcopy(self.result[index])

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """The columns of a row, and the number of tokens that positions count."""
        raise NotImplementedError(f"{type(self).__name__} has no tokenize")

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Read the settings, before rows are loaded."""

    def postprocess(self, kwargs: dict[str, Any]) -> None:
        """Change the rows, after they are loaded."""

    def load_dataset(self) -> Any:
        """The rows; `raw_dataset` keeps those of other splits than "train"."""
        rows = self._all_rows() if self.dataset is None else self.dataset
        if self.max_n_example is not None:
            if not hasattr(rows, "shuffle"):
                rows = datasets.Dataset.from_list(list(rows))
            rows = rows.shuffle(seed=self.seed).select(range(self.max_n_example))
        self.raw_dataset = rows if self.data_split != "train" else None
        return rows

    def _all_rows(self) -> Any:
        if self.data_path is None:
            return datasets.load_dataset(self.task, split=self.data_split)
        if self.data_path.endswith(".json"):
            file = str(local_path(self.data_path, "data_path"))
            return datasets.load_dataset("json", data_files=file, split="train")
        return datasets.load_dataset(self.task, self.data_path, split=self.data_split)

    def get_intervention_locations(self, **kwargs: Any) -> Locations:
        """The columns that are edited, as the function of this name has them."""
        return get_intervention_locations(**kwargs)

    def compute_intervention_and_subspaces(
        self,
        id: int,  # noqa: A002  # pyreft's name
        data_item: Mapping[str, Any],
        result: dict[str, Any],
        last_position: int,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Complete the columns of an example.

        Args:
            id: number of the row.
            data_item: the row.
            result: columns that `tokenize` made.
            last_position: number of tokens that positions count.
            kwargs: settings of the dataset.
        """
        locations = self.get_intervention_locations(
            last_position=last_position,
            first_n=self.first_n,
            last_n=self.last_n,
            pad_mode=self.pad_mode,
            **kwargs,
        )
        if self.pad_mode == "first":
            locations = [[column + 1 for column in columns] for columns in locations]
        result |= {LOCATIONS: locations, "id": id}
        for name in self.fields_to_pad:
            if name in result:
                fill = IGNORED_LABEL if name == "labels" else self.tokenizer.pad_token_id
                result[name] = self._with_padding(result[name], fill)
        for name in self.fields_to_mask:
            mask = "attention_mask" if len(self.fields_to_mask) == 1 else f"{name}_mask"
            result[mask] = (result[name] != self.tokenizer.pad_token_id).int()
        if SUBSPACES in data_item:
            halves = 2 if kwargs.get("share_weights") else 1
            result[SUBSPACES] = [data_item[SUBSPACES]] * (kwargs["num_interventions"] // halves)
        return result

    def _with_padding(self, values: Tensor, fill: int) -> Tensor:
        padding = torch.tensor([fill])
        match self.pad_mode:
            case "first":
                return torch.cat((padding, values))
            case "last":
                return torch.cat((values, padding))
        return values


class ReftRawDataset(ReftDataset):
    """Rows of `instruction` and `output`, which stand as they are.

    Other splits than "train" have prompts alone. Columns are attributes, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.input_ids = self._column("input_ids")
        self.attention_mask = self._column("attention_mask")
        self.intervention_locations = self._column(LOCATIONS)
        self.labels = self._column("labels")
        self.subspaces = self._column(SUBSPACES)
        self.id = self._column("id")

    def _column(self, name: str) -> list[Any] | None:
        return [row[name] for row in self.result if name in row] or None

    def _all_rows(self) -> Any:
        path = str(self.data_path)
        files = {"data_files": str(local_path(path, "data_path"))} if path.endswith(".json") else {}
        return datasets.load_dataset("json" if files else path, **files)[self.data_split]

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Tokens of the prompt and, in training, its answer."""
        prompt, end = data_item["instruction"], self.tokenizer.eos_token
        answer = data_item["output"] + end
        columns, length = prompt_and_answer(self.tokenizer, prompt, answer)
        if self.data_split != "train":
            columns = {"input_ids": token_ids(self.tokenizer, prompt)}
        return columns, length


class ReftClassificationDataset(ReftDataset):
    """Rows of a text and its label's text; all of the text's tokens but the last are counted.

    `input_field` and `label_field` name the columns; the second may be None.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Read the columns' names."""
        self.input_field = kwargs["input_field"]
        self.label_field = kwargs["label_field"]

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Tokens of the text, and of its label."""
        ids = token_ids(self.tokenizer, data_item[self.input_field])
        columns = {"input_ids": ids}
        if self.label_field == self.input_field:
            columns["labels"] = ids.clone()
        elif self.label_field is not None:
            columns["labels"] = token_ids(self.tokenizer, data_item[self.label_field])
        return columns, len(ids) - 1


class ReftGenerationDataset(ReftDataset):
    """Rows of a prompt and a completion; all of the prompt's tokens but the last are counted.

    `prompt_field` and `completion_field` name the columns.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Read the columns' names."""
        self.prompt_field = kwargs["prompt_field"]
        self.completion_field = kwargs["completion_field"]

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Tokens of prompt and completion."""
        prompt, end = data_item[self.prompt_field], self.tokenizer.eos_token
        answer = data_item[self.completion_field] + end
        columns, length = prompt_and_answer(self.tokenizer, prompt, answer)
        return columns, length - 1


class ReftSupervisedDataset(ReftDataset):
    """Rows of instruction, input and output in Alpaca's template.

    All of the prompt's tokens but the last are counted. `instruction_field`, `input_field` and
    `output_field` name the columns; with `no_stop=True`, outputs end without the end-of-text token.
    """

    def preprocess(self, kwargs: dict[str, Any]) -> None:
        """Read the columns' names."""
        self.input_field = kwargs["input_field"]
        self.output_field = kwargs["output_field"]
        self.instruction_field = kwargs["instruction_field"]
        self.no_stop = kwargs.get("no_stop", False)

    def tokenize(self, data_item: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Tokens of prompt and output."""
        prompt = alpaca_prompt(data_item, self.instruction_field, self.input_field)
        answer = data_item[self.output_field]
        answer += "" if self.no_stop else self.tokenizer.eos_token
        columns, length = prompt_and_answer(self.tokenizer, prompt, answer)
        return columns, length - 1
