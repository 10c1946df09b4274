"""The text around a prompt that a model reads; nothing heavy is imported here."""

import re
from collections.abc import Iterator, Mapping
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
_PART = re.compile(r"(?P<brace>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<text>[^{}]+)|(?P<lone>[{}])")
_EXPECTED = "expected plain, chat, alpaca, or a text with {prompt} and columns in braces"


def fill(template: str, prompt: "str | Messages", row: Mapping[str, Any]) -> "str | Messages":
    """A prompt in its template: a text, or for `chat` a conversation for the tokenizer's own.

    The template is `plain` (the prompt alone), `chat` (a user's turn of the tokenizer's chat
    template), `alpaca` (which has a place for a row's `input`), or a text with `{prompt}` and
    columns of the row in braces. A prompt that is a conversation has its turns already.

    Raises:
        ValueError: no such template, or no such column.
    """
    check_template(template)
    if template == "plain" or not isinstance(prompt, str):
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
    parts = _parts(template)
    return "".join(text if name is None else _value(values, name) for text, name in parts)


def check_template(template: str) -> None:
    """Raise a ValueError unless `fill` knows the template."""
    if template in ("plain", "chat", "alpaca"):
        return
    if "prompt" not in [name for _, name in _parts(template)]:
        raise ValueError(f"template {template!r}: {_EXPECTED}")


def _parts(template: str) -> Iterator[tuple[str, str | None]]:
    """Texts, and names of columns, one of the two each time.

    `str.format` would also evaluate attributes and widths.
    """
    for match in _PART.finditer(template):
        if match["lone"]:
            raise ValueError(
                f"template {template!r}: a single {match['lone']!r} at column {match.start() + 1}; "
                f"{_EXPECTED}, and {match['lone'] * 2} for a brace"
            )
        name = match["name"]
        if name is not None and not name.isidentifier():
            raise ValueError(f"template {template!r}: {{{name}}} is no column; {_EXPECTED}")
        text = match["text"] or ""
        yield match["brace"][0] if match["brace"] else text, name


def _value(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        raise ValueError(f"template: no column {name!r} in a row with {', '.join(values)}")
    value = values[name]
    if not isinstance(value, str | int | float):
        raise ValueError(f"template: column {name!r} is {value!r}: expected a text or a number")
    return str(value)
