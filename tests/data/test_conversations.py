"""The chat template decides the text of a conversation; what it leaves out is an error.

The templates are small ones that behave as those of model families do.
"""

import json
import re
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

import reftnoise as rn
from reftnoise.data.conversations import Rendered, assistant_turns, prompt_text, rendered
from reftnoise.data.tasks.examples import as_examples
from reftnoise.data.tasks.text import TextTask
from reftnoise.data.tokenization import prompt_tokens
from reftnoise.engine.base.tiny import DIRECTORY

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = {
    "llama": TURN + ASK,
    # Reasoning of turns before the last question is not shown.
    "qwen": "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}",
    # No word of the assistant's stands in the prompt.
    "mistral": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "gemma": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<{{ 'model' if m.role == 'assistant' else m.role }}>{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}",
    "hermes": "{% if tools %}<system>{{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>"
    "{% endfor %}" + ASK,
    # An answer begins with a thought that is not shown later.
    "deepseek": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}",
    "rewriting": "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last else m.content[:1] }}</s>{% endfor %}" + ASK,
    "deaf": "{% for m in messages if m.role in ('user', 'assistant') %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}" + ASK,
    "without an end": "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
FUNCTION = {"name": "weather", "arguments": {"city": "Paris", "unit": None}}
CALL = [{"type": "function", "function": FUNCTION}]
CALLED = '<call>{"name": "weather", "arguments": {"city": "Paris", "unit": null}}</call></s>'
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


def turns(tokenizer: Any, template: str, messages: Any, **columns: Any) -> list[tuple[str, str]]:
    tokenizer.chat_template = TEMPLATES[template]
    return [text[:2] for text in assistant_turns(tokenizer, [], messages, columns)]


# -- what the template makes of a turn ------------------------------------------------------------

HI = "<user>hi</s><assistant>"


@pytest.mark.parametrize(
    ("template", "messages", "columns", "expected"),
    [
        ("llama", [user("hi"), assistant(" yo ")], {}, [(HI, "yo</s>")]),
        ("hermes", [user("hi"), assistant(None, tool_calls=CALL)], {}, [(HI, CALLED)]),
        (
            "hermes",
            [
                user("hi"),
                assistant("Wait", tool_calls=CALL),
                {"role": "tool", "content": "sun"},
                assistant("Sunny", tool_calls=[]),
            ],
            {"tools": json.dumps(TOOLS)},
            [
                (f"<system>{json.dumps(TOOLS)}</s>{HI}", f"Wait{CALLED}"),
                (
                    f"<system>{json.dumps(TOOLS)}</s>{HI}Wait{CALLED}<tool>sun</s><assistant>",
                    "Sunny</s>",
                ),
            ],
        ),
        (
            "qwen",
            [
                user("hi"),
                assistant("yo", reasoning_content="A"),
                user("so"),
                assistant("no", reasoning_content="B"),
            ],
            {},
            [
                (HI, "<think>A</think>yo</s>"),
                (f"{HI}yo</s><user>so</s><assistant>", "<think>B</think>no</s>"),
            ],
        ),
        (
            "qwen",
            [user("hi"), assistant("yo")],
            {"chat_template_kwargs": {"enable_thinking": False}},
            [(f"{HI}<think></think>", "yo</s>")],
        ),
        ("hermes", [user("hi"), assistant("yo")], {"tools": ""}, [(HI, "yo</s>")]),
        ("hermes", [user("hi"), assistant("yo")], {"tools": "null"}, [(HI, "yo</s>")]),
        ("mistral", [user("hi"), assistant("yo")], {}, [("[INST] hi [/INST]", " yo</s>")]),
        ("gemma", [user("hi"), assistant("yo")], {}, [("<user>hi<end>\n<model>", "yo<end>\n")]),
        ("llama", [assistant("yo"), user("hi")], {}, [("<assistant>", "yo</s>")]),
        (
            "llama",
            [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)],
            {},
            [("<user>a</s><assistant>b</s><user>c</s><assistant>", "d</s>")],
        ),
        (
            "llama",
            [user([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), assistant("yo")],
            {},
            [(HI, "yo</s>")],
        ),
    ],
)
def test_turns(
    tokenizer: Any, template: str, messages: Any, columns: Any, expected: list[tuple[str, str]]
) -> None:
    assert turns(tokenizer, template, messages, **columns) == expected


def test_where_a_prompt_ends_otherwise_than_it_is_shown(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert turns(tokenizer, "deepseek", [user("hi"), assistant("yo")]) == [(HI, "yo</s>")]
    assert "'<think>'; training leaves it out" in caplog.text


@pytest.mark.parametrize(
    ("template", "answer", "ends"),
    [
        ("hermes", assistant("", tool_calls=CALL), True),
        ("without an end", assistant("", tool_calls=CALL), False),
        ("without an end", assistant("yo"), False),
        ("llama", assistant(">"), True),
    ],
)
def test_whether_the_template_ends_a_turn(
    tokenizer: Any, template: str, answer: Any, ends: bool
) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    (text,) = assistant_turns(tokenizer, [], [user("hi"), answer], {})
    assert text.ends_itself == ends


# -- errors ------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "columns", "message"),
    [
        ("llama", 3, {}, "messages 3: expected a list of messages"),
        ("llama", ["hi"], {}, "message 0 is 'hi', expected a mapping with 'role' and 'content'"),
        ("llama", [user(None)], {}, "message 0: no content: expected a text from 'user'"),
        ("llama", [user(3)], {}, "message 0: content 3: expected a text"),
        (
            "llama",
            [user([{"type": "image"}])],
            {},
            "message 0: content has a part of type 'image': expected {type: text, text: …}",
        ),
        (
            "llama",
            [user("hi"), assistant("")],
            {},
            "message 1: content '': expected a text, or tool_calls",
        ),
        (
            "llama",
            [user("hi"), assistant("yo", tool_calls=CALL)],
            {},
            "message 1: tool_calls: the chat template leaves it out, so it cannot be learned",
        ),
        (
            "llama",
            [user("hi"), assistant("yo", thinking="hm")],
            {},
            "message 1: thinking: the chat template leaves it out, so it cannot be learned",
        ),
        (
            "deaf",
            [user("hi"), {"role": "tool", "content": "sun"}, assistant("yo")],
            {},
            "message 2: the chat template leaves out messages of role 'tool'",
        ),
        (
            "mistral",
            [{"role": "tool", "content": "sun"}, assistant("yo")],
            {},
            "message 1: chat template: Only user and assistant roles are supported!",
        ),
        (
            "gemma",
            [assistant("yo")],
            {},
            "message 0: chat template: Conversation roles must alternate",
        ),
        (
            "mistral",
            [assistant("yo")],
            {},
            "message 0: the assistant speaks first: the chat template has no prompt for that",
        ),
        ("llama", [assistant("yo", weight=2)], {}, "message 0: weight 2: expected 0 or 1"),
        ("llama", [assistant("yo", train=False)], {}, "message 0: train False: expected weight, 0"),
        (
            "rewriting",
            [user("hi"), assistant("yo")],
            {},
            "message 1: the chat template changes earlier messages when this one is added, so that "
            "its prompt is not the one that generation reads: it shows "
            "'<user>h</s><assistant>yo</s' in place of '<user>hi</s><assistant>'",
        ),
        ("llama", [], {"tools": "{"}, "tools '{': no JSON (Expecting property name"),
        ("llama", [], {"tools": 3}, "tools 3: expected a list of mappings"),
        (
            "llama",
            [],
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs: 'tokenize' is no variable of the template",
        ),
    ],
)
def test_mistaken_conversations(
    tokenizer: Any, template: str, messages: Any, columns: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        turns(tokenizer, template, messages, **columns)


# -- rows ------------------------------------------------------------

TALK = [user("hi"), assistant("", tool_calls=CALL)]


def targets(tokenizer: Any, rows: Any) -> list[str]:
    tokenizer.chat_template = TEMPLATES["hermes"]
    module = rn.make_last_position_supervised_data_module(tokenizer, None, rows)
    return [
        tokenizer.decode(row["input_ids"][row["prompt_lengths"] :])
        for row in module["train_dataset"]
    ]


def test_both_forms_of_rows_agree(tokenizer: Any) -> None:
    rows = [
        {"messages": [*TALK, {"role": "tool", "content": "sun"}, assistant("Sunny")]},
        {"prompt": TALK[:1], "completion": [TALK[1]]},
        {"prompt": [*TALK, {"role": "tool", "content": "sun"}], "completion": "Sunny"},
    ]
    whole, first, second = (targets(tokenizer, datasets.Dataset.from_list([row])) for row in rows)
    assert whole == [*first, *second]
    assert len(first) == len(second) == 1


def test_a_row_has_no_keys_of_other_rows(tokenizer: Any) -> None:
    """A table fills them with nulls."""
    calls = [
        [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        for arguments in ({"city": "Paris"}, {"day": 1})
    ]
    rows = [{"messages": [user("hi"), assistant("", tool_calls=call)]} for call in calls]
    table = datasets.Dataset.from_list(rows)
    for call, target in zip(calls, targets(tokenizer, table), strict=True):
        assert json.loads(target[len("<call>") : -len("</call></s>")]) == call[0]["function"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_task_hands_on_what_the_template_reads(tokenizer: Any, streaming: bool) -> None:
    table: Any = datasets.Dataset.from_list([{"id": 1, "messages": TALK, "tools": TOOLS}])
    rows = table.to_iterable_dataset() if streaming else table
    (row,) = as_examples(rows, TextTask(), "plain", tokenizer)
    assert set(row) == {"messages", "tools"}


def test_an_error_names_the_row(tokenizer: Any) -> None:
    rows = datasets.Dataset.from_list([{"messages": [user("hi"), assistant("")]}])
    with pytest.raises(ValueError, match=r"^training example 0: message 1: content ''"):
        targets(tokenizer, rows)


# -- one function ------------------------------------------------------------


@pytest.mark.parametrize("template", ["llama", "qwen", "mistral", "gemma", "hermes"])
def test_prompts_of_training_and_of_generation_agree(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    text = rendered(tokenizer, [user("hi")], "yo")
    assert isinstance(text, Rendered)
    assert text.prompt == prompt_text(tokenizer, [user("hi")])
    ids = tokenizer(text.prompt, add_special_tokens=False)["input_ids"]
    assert prompt_tokens(tokenizer, [user("hi")]) == ids
