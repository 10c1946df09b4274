"""The text that a model is to read of a row, by the tokenizer's own chat template."""

from collections.abc import Mapping
from typing import Any

from reftnoise.data.templates import fill


def rendered(tokenizer: Any, template: str, row: Mapping[str, Any]) -> tuple[str, bool]:
    """A row's prompt in a template, and whether a tokenizer adds special tokens to it."""
    filled = fill(template, row["prompt"], row)
    if isinstance(filled, str):
        return filled, True
    text = tokenizer.apply_chat_template(filled, add_generation_prompt=True, tokenize=False)
    return text, False
