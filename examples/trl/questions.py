"""The examples' data: a JSONL file, or the embedded questions in TRL's forms."""

from datasets import Dataset, load_dataset

import reftnoise as rn


def says(role: str, text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": role, "content": text}]


def supervised(file: str | None) -> Dataset:
    """{"prompt", "completion"}: answers in emoji."""
    if file is not None:
        return load_dataset("json", data_files=file, split="train")
    examples = rn.load_tiny_examples("train")
    return Dataset.from_list(
        [
            {"prompt": says("user", e.prompt), "completion": says("assistant", e.completion)}
            for e in examples
        ]
    )


def preferences(file: str | None) -> Dataset:
    """{"prompt", "chosen", "rejected"}: answers in emoji and in words."""
    if file is not None:
        return load_dataset("json", data_files=file, split="train")
    chosen = supervised(None).rename_column("completion", "chosen")
    words = [says("assistant", example.words) for example in rn.load_tiny_examples("train")]
    return chosen.add_column("rejected", words)


def colours(file: str | None) -> Dataset:
    """{"prompt"}: questions to which the model has several answers."""
    if file is not None:
        return load_dataset("json", data_files=file, split="train")
    texts = ["Name a colour.", "Which colour?", "What colour is it?", "Tell me a colour."]
    return Dataset.from_list([{"prompt": says("user", text)} for text in texts])
