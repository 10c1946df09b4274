"""Real data and models, where there are any, and rows as a model reads them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reftnoise.data.templates import fill

REAL = Path(os.environ.get("REFTNOISE_REAL", "nowhere"))
"""A folder with `data` and `models`."""


def rendered(tokenizer: Any, template: str, row: Mapping[str, Any]) -> tuple[str, bool]:
    """A row's prompt in a template, and whether a tokenizer adds special tokens to it."""
    filled = fill(template, row["prompt"], row)
    if isinstance(filled, str):
        return filled, True
    text = tokenizer.apply_chat_template(filled, add_generation_prompt=True, tokenize=False)
    return text, False
