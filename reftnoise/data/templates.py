"""The text around a prompt that a model reads; nothing heavy is imported here."""

from collections.abc import Mapping
from string import Formatter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversations import Messages

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)


def fill(template: str, prompt: str, row: Mapping[str, Any]) -> "str | Messages":
    """A prompt in its template: a text, or for `chat` a conversation for the tokenizer's own.

    The template is `plain` (the prompt alone), `chat` (a user's turn of the tokenizer's chat
    template), `alpaca` (which has a place for a row's `input`), or a text with `{prompt}` and
    columns of the row in braces.

    Raises:
        ValueError: no such template, or no such column.
    """
    check_template(template)
    if template == "plain":
        return prompt
    if template == "chat":
        return [{"role": "user", "content": prompt}]
    if template == "alpaca":
        extra = row.get("input")
        extra = extra.strip() if isinstance(extra, str) else ""
        prompt = prompt.rstrip()
        has_input = extra != "" and extra not in prompt
        if extra and prompt.endswith(f"\n\n{extra}"):  # as `instruct` joins them
            prompt, has_input = prompt.removesuffix(extra).rstrip(), True
        template = ALPACA_WITH_INPUT if has_input else ALPACA
    values = {**row, "prompt": prompt}
    try:
        return template.format_map(values)
    except KeyError as error:
        known = ", ".join(values)
        raise ValueError(f"template: no column {error} in a row with {known}") from None


def check_template(template: str) -> None:
    """Raise a ValueError unless `fill` knows the template."""
    if template in ("plain", "chat", "alpaca"):
        return
    expected = "expected plain, chat, alpaca, or a text with {prompt} and columns in braces"
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; {expected}") from None
    if "prompt" not in fields:
        raise ValueError(f"template {template!r}: {expected}")
    for field in fields:
        if not field.isidentifier():
            raise ValueError(f"template {template!r}: {{{field}}} is no column; {expected}")
