"""Answers to prompts, by an adapted model alone or with those of its base."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._util.errors import nearest
from .._util.files import json_lines, local_path, replace_all
from .._util.progress import progress_of
from ..config.decoding import GREEDY, Decoding
from ..data.conversations import Messages
from ..data.files import json_lines_of
from ..data.templates import fill
from ..data.tokenization import smallest_limit
from ..evaluation.forgetting import NEUTRAL
from ..evaluation.generation import ending_arguments, generated
from ..evaluation.likelihood import Progress
from ..evaluation.scoring import evaluating
from ..model import ReftModel
from ..training.run_adapter import template_of
from .loading import load_adapted

BUILT_IN = 16
"""The number of prompts that an adapter is compared on where none are given."""


def generate_texts(
    reft_model: ReftModel,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    decoding: Decoding = GREEDY,
    rows: Sequence[Mapping[str, Any]] = (),
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """What the model writes after each prompt, in the prompts' order.

    `rows`, one for each prompt, have the template's columns. The template is by default that of
    `default_template`. Within `reft_model.disabled()`, the base alone answers. `progress` is called
    with the numbers of prompts done and of all prompts.

    Raises:
        ValueError: an empty prompt, a template that does not fit, or more new tokens than the
            model's context has.
    """
    template = decoding.template_or(default_template(tokenizer))
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompt {index}: expected a text, got {prompt!r}")
    asked = [
        fill(template, prompt, row)
        for prompt, row in zip(prompts, rows or repeat({}), strict=False)
    ]
    if decoding.system is not None:
        before = {"role": "system", "content": decoding.system}
        asked = [[before, *messages] for messages in asked if not isinstance(messages, str)]
    with evaluating(reft_model, decoding.seed):
        return generated(
            reft_model,
            tokenizer,
            asked,
            max_new_tokens=new_tokens(decoding, tokenizer, reft_model),
            batch_size=batch_size,
            generation=decoding.arguments(),
            progress=progress,
        )


def default_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, or nothing around prompts where it has none."""
    return "plain" if tokenizer.chat_template is None else "chat"


def asked_prompts(
    adapter: Path, tokenizer: Any, prompts: Sequence[str] | None
) -> list[str | Messages]:
    """Prompts, or built-in ones, in the template of the adapter's run, or else the tokenizer's.

    Raises:
        ValueError: an entry of `prompts` is no text.
    """
    if prompts is None:
        rows = [row for _, row in json_lines_of(NEUTRAL) if "prompt" in row]
        prompts = [str(row["prompt"]) for row in rows[:BUILT_IN]]
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ValueError(f"prompts {prompts!r}: expected texts")
    template = template_of(adapter.parent) or default_template(tokenizer)
    try:
        return [fill(template, prompt, {}) for prompt in prompts]
    except ValueError:  # a template of columns that these prompts do not have
        return [fill(default_template(tokenizer), prompt, {}) for prompt in prompts]


def prompts_of(path: str | None) -> list[str] | None:
    """The prompts of a file of JSON lines; None for none."""
    return None if path is None else [row["prompt"] for row in read_jsonl(path, "prompt")]


def new_tokens(decoding: Decoding, tokenizer: Any, model: Any) -> int:
    """The number of new tokens; by default 256, or half of a smaller context."""
    limit = smallest_limit(tokenizer, model, None)
    return decoding.max_new_tokens or (256 if limit is None else min(256, limit // 2))


def generate_arguments(decoding: Decoding, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Arguments of `generate`: sampling, the number of new tokens, and how answers end."""
    count = {"max_new_tokens": new_tokens(decoding, tokenizer, model)}
    return decoding.arguments() | ending_arguments(model, tokenizer) | count


def answer_prompts(
    adapter: str | Path,
    *,
    prompts: Sequence[str] = (),
    input: str | Path | None = None,  # noqa: A002  # the command line's name
    output: str | Path | None = None,
    column: str = "prompt",
    compare: bool = False,
    model: str | None = None,
    device: str = "auto",
    decoding: Decoding = GREEDY,
    batch_size: int = 16,
    console: Console | None = None,
    progress_console: Console | None = None,
) -> list[dict[str, Any]]:
    """Load an adapter, answer prompts, and print the answers or write them to a file.

    Each row is one of `input`, or `{"prompt": …}`, with the answer as `text`, and with `compare`
    that of the base alone as `base`. Adapter, model and device are as in `load_adapted`; the
    template is by default that of the run. Where there are several batches, progress is shown on a
    console of its own.

    Raises:
        OSError: there is no such adapter, base or file.
        ValueError: there are no prompts, a line has none, or a template does not fit.
    """
    read = [] if input is None else read_jsonl(input, column)
    rows = [*({"prompt": prompt} for prompt in prompts), *read]
    texts = [*prompts, *(row[column] for row in read)]
    if not rows:
        raise ValueError("no prompts: expected a prompt, or an input file")
    columns = ("base", "text") if compare else ("text",)
    for name in columns:
        if any(name in row for row in rows):
            raise ValueError(f"column {name!r}: the answer goes there; rename it in the input")
    if output is not None and local_path(output, "output").is_dir():
        raise ValueError(f"output {output}: expected a file, found a directory")
    decoding = replace(decoding, template=decoding.template or template_of(adapter))
    reft_model, tokenizer = load_adapted(adapter, model, device=device)
    answered = rows
    shown = progress_console if len(texts) > batch_size else None
    for name in columns:
        is_base = name == "base"
        with (
            reft_model.disabled() if is_base else contextlib.nullcontext(),
            progress_of(
                shown, "answers of the base" if is_base else "answers", len(texts)
            ) as progress,
        ):
            answers = generate_texts(
                reft_model,
                tokenizer,
                texts,
                decoding=decoding,
                rows=rows,
                batch_size=batch_size,
                progress=progress,
            )
        answered = [row | {name: text} for row, text in zip(answered, answers, strict=True)]
    if output is not None:
        path = local_path(output, "output").absolute()
        replace_all(path.parent, {path.name: json_lines(answered)})
    elif console is not None:
        show(answered, texts, console)
    return answered


def show(rows: Sequence[Mapping[str, Any]], prompts: Sequence[str], console: Console) -> None:
    """Print the text alone for one prompt, else a table, with the base's answers if any."""
    if len(rows) == 1 and "base" not in rows[0]:
        console.print(rows[0]["text"], markup=False, soft_wrap=True)
        return
    columns = {"base": "base", "text": "adapted"} if "base" in rows[0] else {"text": "answer"}
    table = Table()
    for heading in ("prompt", *columns.values()):
        table.add_column(heading)
    for row, prompt in zip(rows, prompts, strict=True):
        table.add_row(*(Text(text) for text in (prompt, *(row[name] for name in columns))))
    console.print(table)


def read_jsonl(path: str | Path, column: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, each with a text in `column`."""
    rows, place = [], local_path(path)
    try:
        for line, row in json_lines_of(place):
            if column not in row:
                raise ValueError(f"{line}: no {column!r}; {nearest(column, row)}")
            if not isinstance(row[column], str) or not row[column]:
                raise ValueError(f"{line}: {column} {row[column]!r}, expected a text")
            rows.append(row)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    return rows
