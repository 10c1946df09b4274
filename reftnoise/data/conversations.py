"""Conversations → the text of a prompt and of an assistant's turn, as the chat template has it.

A turn's target is what the template adds to the rendering of all messages before it, with all that
the message has: content, tool calls, reasoning. So the prompt is what generation reads, and the
target is what the model should write there.
"""

import inspect
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from .._util.errors import brief, one_line, warn_once

logger = logging.getLogger(__name__)

Messages: TypeAlias = Sequence[Mapping[str, Any]]

TOOLS, DOCUMENTS, VARIABLES = "tools", "documents", "chat_template_kwargs"
HANDED_ON = (TOOLS, DOCUMENTS, VARIABLES)
"""Columns that are handed on to the template."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WRITTEN = ("tool_calls", "function_call", *_REASONING)
"""What an assistant's message may hold for the model to write, apart from its content."""
_USUAL_ROLES = ("system", "user", "assistant")
_WEIGHT = "weight"
_OTHER_WEIGHTS = ("loss", "loss_mask", "train", "trainable", "training")
"""Names that other libraries have for it."""
_PROBE = "reftnoise"


class Rendered(NamedTuple):
    """A prompt and its completion as the tokenizer reads them.

    Args:
        prompt: text of the prompt.
        completion: text that follows it.
        is_plain: whether the tokenizer adds special tokens, which a chat template writes itself.
        ends_itself: whether the completion has an end marker.
    """

    prompt: str
    completion: str
    is_plain: bool = True
    ends_itself: bool = False


def rendered(tokenizer: Any, prompt: str | Messages, completion: str) -> Rendered:
    """A prompt, a text or a conversation, and the text that follows it.

    Raises:
        ValueError: one of them is no text, or the chat template cannot render them.
    """
    if not isinstance(completion, str):
        raise ValueError(f"completion {completion!r}: expected a text")
    if isinstance(prompt, str):
        return Rendered(prompt, completion)
    if not isinstance(prompt, list):
        raise ValueError(f"prompt {prompt!r}: expected a text")
    before = readable(prompt)
    return _turn(tokenizer, before, {"role": "assistant", "content": completion}, {})


def prompt_text(tokenizer: Any, messages: Messages) -> str:
    """The text of a conversation, up to where the assistant's next turn begins.

    Raises:
        ValueError: the chat template cannot render the messages.
    """
    return _render(tokenizer, readable(messages), {}, add_generation_prompt=True)


def whole_text(tokenizer: Any, messages: Messages) -> str:
    """The text of a conversation, to its end.

    Raises:
        ValueError: the chat template cannot render the messages.
    """
    return _render(tokenizer, readable(messages), {})


def assistant_turns(
    tokenizer: Any, before: Any, conversation: Any, variables: Mapping[str, Any]
) -> Iterator[Rendered]:
    """Each assistant's turn of a conversation, after all messages before it.

    A message with `weight: 0` is read and not learned.

    Args:
        tokenizer: tokenizer with a chat template.
        before: messages that come first, none of which is learned.
        conversation: the other messages.
        variables: values of the columns `tools`, `documents` and `chat_template_kwargs`; the first
            two are lists, or the text of one as JSON.

    Raises:
        ValueError: a message, one of its keys or a column that the template cannot read.
    """
    before, conversation = readable(before), readable(conversation)
    first, handed_on = len(before), _handed_on(tokenizer, variables)
    messages, weights = [*before, *conversation], []
    for index, message in enumerate(messages):
        if other := next((name for name in _OTHER_WEIGHTS if name in message), None):
            raise ValueError(
                f"message {index}: {other} {message[other]!r}: expected weight, 0 for a message "
                "that is not learned"
            )
        weight = message.pop(_WEIGHT, 1)
        if weight not in (0, 1):
            raise ValueError(f"message {index}: weight {weight!r}: expected 0 or 1")
        weights.append(weight)
    for index in range(first, len(messages)):
        if messages[index]["role"] == "assistant" and weights[index]:
            try:
                yield _turn(tokenizer, messages[:index], messages[index], handed_on)
            except ValueError as error:
                raise ValueError(f"message {index}: {error}") from None


def readable(messages: Any) -> list[dict[str, Any]]:
    """Messages, or the text of a JSON list of them, without nulls and with parts as one text.

    Raises:
        ValueError: these are no messages, or one has no role, no content or parts that are no text.
    """
    messages = _parsed("messages", messages)
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages {brief(messages)}: expected a list of messages")
    return [_readable(index, message) for index, message in enumerate(messages)]


def _readable(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"message {index} is {brief(message)}, expected a mapping with 'role' and 'content'"
        )
    # As transformers does: templates ask whether a key is there. So they do of empty lists.
    values = {
        key: value
        for key, value in message.items()
        if value is not None and not (key in _WRITTEN and not value)
    }
    content = values.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        values["content"] = content = _joined(index, content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"message {index}: content {brief(content)}: expected a text")
    if content is None and message["role"] != "assistant":
        raise ValueError(f"message {index}: no content: expected a text from {message['role']!r}")
    return values


def _joined(index: int, parts: Sequence[Any]) -> str:
    """A content in parts as one text, which templates for texts alone read, too."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"type {kind!r}" if kind not in (None, "text") else brief(part)
            raise ValueError(
                f"message {index}: content has a part of {what}: expected {{type: text, text: …}}"
            )
        texts.append(part["text"])
    return "".join(texts)


def _handed_on(tokenizer: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What a row hands on to the template, by the argument's name."""
    # An empty cell of a CSV file, and a null in JSON, say that a row has none.
    values = {name: _parsed(name, value) for name, value in columns.items() if value != ""}
    values = {name: value for name, value in values.items() if value is not None}
    for name in (TOOLS, DOCUMENTS):
        entries = values.get(name, [])
        is_list = isinstance(entries, list)
        if not is_list or not all(isinstance(entry, Mapping) for entry in entries):
            raise ValueError(f"{name} {brief(entries)}: expected a list of mappings")
    further = values.pop(VARIABLES, {})
    if not isinstance(further, Mapping):
        raise ValueError(f"{VARIABLES} {brief(further)}: expected a mapping")
    if further:
        arguments = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
        if taken := [name for name in further if name in arguments]:
            raise ValueError(f"{VARIABLES}: {taken[0]!r} is no variable of the template")
    # Templates ask whether there are tools; an empty list would say so.
    return {**further, **{name: value for name, value in values.items() if value}}


def _parsed(name: str, value: Any) -> Any:
    """A value, or what it is as the text of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} {brief(value)}: no JSON ({error})") from None


def _turn(
    tokenizer: Any,
    before: list[dict[str, Any]],
    answer: Mapping[str, Any],
    variables: Mapping[str, Any],
) -> Rendered:
    content = answer.get("content", "")
    if not content.strip() and not any(key in answer for key in _WRITTEN):
        raise ValueError(f"content {content!r}: expected a text, or tool_calls")
    whole = _render(tokenizer, [*before, answer], variables)
    if before:
        prompt = _render(tokenizer, before, variables, add_generation_prompt=True)
    else:
        prompt = _opening(tokenizer, whole, variables)
    if not whole.startswith(prompt):
        prompt = _diverging(tokenizer, before, variables, prompt, whole)
    target = whole.removeprefix(prompt)
    _expect_read(tokenizer, before, answer, variables, whole, target)
    end = _end_of(tokenizer, before, answer, variables, target)
    if not target.strip() or target.strip() == end.strip() != "":
        raise ValueError("the chat template renders nothing of it, so there is nothing to learn")
    return Rendered(prompt, target, is_plain=False, ends_itself=bool(end.strip()))


def _opening(tokenizer: Any, whole: str, variables: Mapping[str, Any]) -> str:
    """What stands before the content of a conversation's first message, the assistant's."""
    question = [{"role": "user", "content": _PROBE}]
    shown = _render(tokenizer, question, variables)
    asked = _render(tokenizer, question, variables, add_generation_prompt=True)
    header = asked.removeprefix(shown)
    before, header, _ = whole.partition(header) if header else (whole, "", "")
    if not header or not asked.startswith(shown):
        raise ValueError("the assistant speaks first: the chat template has no prompt for that")
    return before + header


def _diverging(
    tokenizer: Any,
    before: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    prompt: str,
    whole: str,
) -> str:
    """The part of a prompt that the whole text begins with, where they part at the answer.

    Some templates begin an answer otherwise than they show it, such as with `<think>`.
    """
    shown = _render(tokenizer, before, variables) if before else ""
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    shared = "".join(letter for letter, _ in equal)
    if not shared.startswith(shown.rstrip()):
        raise ValueError(
            "the chat template changes earlier messages when this one is added, so that its "
            "prompt is not the one that generation reads: it shows "
            f"{_around(whole, len(shared))} in place of {_around(prompt, len(shared))}"
        )
    warn_once(
        logger,
        "the chat template ends prompts with text that it does not show before an answer: "
        f"{prompt[len(shared) :]!r}; training leaves it out, and generation reads it. Where the "
        "template has a variable for it, such as enable_thinking, set that in the column "
        f"{VARIABLES}",
    )
    return shared


def _around(text: str, index: int) -> str:
    return repr(text[max(0, index - 10) : index + 20])


def _expect_read(
    tokenizer: Any,
    before: Sequence[Mapping[str, Any]],
    answer: Mapping[str, Any],
    variables: Mapping[str, Any],
    whole: str,
    target: str,
) -> None:
    """Raise a ValueError for what the model should write or read and the template leaves out."""
    for keys in (("content",), ("tool_calls",), ("function_call",), _REASONING):
        values = [answer[key] for key in keys if answer.get(key)]
        if all(isinstance(value, str) and value.strip() in target for value in values):
            continue
        # transformers gives reasoning all of its names, so that the others tell of it, too.
        without = {name: value for name, value in answer.items() if name not in keys}
        if _same(tokenizer, [*before, without], variables, whole):
            key = next(key for key in keys if answer.get(key))
            raise ValueError(f"{key}: the chat template leaves it out, so it cannot be learned")
    for index, message in enumerate(before):
        others = [*before[:index], *before[index + 1 :], answer]
        if message["role"] not in _USUAL_ROLES and _same(tokenizer, others, variables, whole):
            raise ValueError(f"the chat template leaves out messages of role {message['role']!r}")


def _same(tokenizer: Any, messages: Any, variables: Mapping[str, Any], whole: str) -> bool:
    try:
        return _render(tokenizer, messages, variables) == whole
    except ValueError:  # what is gone is needed
        return False


def _end_of(
    tokenizer: Any,
    before: list[dict[str, Any]],
    answer: Mapping[str, Any],
    variables: Mapping[str, Any],
    target: str,
) -> str:
    """What the template writes after an answer: its end marker, or whitespace alone."""
    content = str(answer.get("content", "")).strip()
    if content and content in target and not any(key in answer for key in _WRITTEN):
        return target.partition(content)[2]
    plain = {"role": "assistant", "content": _PROBE}
    return _render(tokenizer, [*before, plain], variables).rpartition(_PROBE)[2]


def _render(tokenizer: Any, messages: Any, variables: Mapping[str, Any], **options: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **variables, **options)
    except Exception as error:  # of the template, which is a program of its own
        raise ValueError(f"chat template: {one_line(error)}") from None
    return text
