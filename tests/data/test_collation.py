"""Examples become the tokens that generation will see, with real tokenizers.

Three kinds are made here from a few sentences, each with and without a beginning-of-text token.
"""

import json
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import reftnoise as rn
from reftnoise.config.positions import Positions
from reftnoise.data.collation import ReftDataCollator, make_last_position_supervised_data_module
from reftnoise.data.tasks.registry import get_task
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.engine.layout import PromptLayout
from reftnoise.evaluation.generation import generated
from reftnoise.evaluation.scoring import evaluate

SENTENCES = [
    "Once upon a time there was a little girl who liked to ask questions.",
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Who are you? I am a helper. What is 2 + 2? It is 4.",
    "hello world, hello there, tell me more about the world",
]
BOS, EOS, UNK = "<s>", "</s>", "<unk>"

KINDS = ["bpe", "byte_bpe", "metaspace"]
OURS = [f"{kind}{bos}" for kind in KINDS for bos in ("", "+bos")]
STORED = ["tiny-chat"]


@cache
def _made(kind: str, bos: bool) -> Tokenizer:
    special = [UNK, BOS, EOS]
    if kind == "metaspace":  # as in sentencepiece models: a space in front of every text
        letters = sorted({letter for text in SENTENCES for letter in text.replace(" ", "▁")})
        words = sorted({f"▁{word}" for text in SENTENCES for word in text.split()})
        pieces = [(s, 0.0) for s in special] + [(x, -8.0) for x in letters]
        tokenizer = Tokenizer(models.Unigram(pieces + [(x, -4.0) for x in words], unk_id=0))
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        )
    else:
        is_bytes = kind == "byte_bpe"
        tokenizer = Tokenizer(models.BPE(unk_token=None if is_bytes else UNK))
        tokenizer.pre_tokenizer = (
            pre_tokenizers.ByteLevel(add_prefix_space=False)
            if is_bytes
            else pre_tokenizers.Whitespace()
        )
        if is_bytes:
            tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=350,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if is_bytes else [],
            show_progress=False,
        )
        tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return tokenizer


def tokenizer_named(name: str, **changes: Any) -> Any:
    """A tokenizer of ours, such as `"byte_bpe+bos"`, or the embedded one."""
    if name in STORED:
        return AutoTokenizer.from_pretrained(DIRECTORY)
    kind, _, bos = name.partition("+")
    return PreTrainedTokenizerFast(
        tokenizer_object=_made(kind, bool(bos)),
        **{"bos_token": BOS, "eos_token": EOS, "unk_token": UNK} | changes,
    )


@pytest.fixture(params=[*OURS, *STORED])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_named(request.param)


@pytest.fixture
def byte_bpe() -> Any:
    return tokenizer_named("byte_bpe+bos")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def module(tokenizer: Any, *sources: Any, model: Any = None, **options: Any) -> dict[str, Any]:
    return make_last_position_supervised_data_module(tokenizer, model, *sources, **options)


def examples(tokenizer: Any, *sources: Any, **options: Any) -> list[dict[str, Any]]:
    return list(module(tokenizer, *sources, **options)["train_dataset"])


def split(example: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens of prompt and completion."""
    n = example["prompt_lengths"]
    return example["input_ids"][:n], example["input_ids"][n:]


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


# -- tokens, labels, positions -------------------------------------------------------------------

PAIRS = [
    ("Who are you?", " I am a helper."),
    ("tell me more about the world", " hello there"),
    ("hel", "lo world"),  # in the middle of a word
    ("Who are you? ", "I am"),  # a space that belongs to the next token
    ("What is 2 + 2?\n", "It is 4."),
]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
@pytest.mark.parametrize("nonstop", [False, True])
def test_prompt_tokens_are_the_tokenizers(
    tokenizer: Any, prompt: str, completion: str, nonstop: bool
) -> None:
    (example,) = examples(tokenizer, [prompt], [completion], nonstop=nonstop)
    prompt_ids, target = split(example)
    assert prompt_ids == tokenizer(prompt)["input_ids"]
    assert example["labels"] == [-100] * len(prompt_ids) + target
    assert target.count(tokenizer.eos_token_id) == (not nonstop)
    if not nonstop:
        assert target[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("prompt", "completion"), PAIRS[:2])
def test_a_clean_boundary_gives_the_tokens_of_the_whole_text(
    tokenizer: Any, prompt: str, completion: str
) -> None:
    (example,) = examples(tokenizer, [prompt], [completion], nonstop=True)
    assert example["input_ids"] == tokenizer(prompt + completion)["input_ids"]


def pair_with_a_token_across(tokenizer: Any) -> tuple[str, str]:
    """A prompt and a completion that together hold a token which neither ends nor begins."""
    candidates = [("Once upon a tim", "e there"), ("The quick brown fo", "x jumps"), PAIRS[3]]
    return next(
        (prompt, completion)
        for prompt, completion in candidates
        if (alone := tokenizer(prompt)["input_ids"])
        != tokenizer(prompt + completion)["input_ids"][: len(alone)]
    )


def test_a_token_across_the_boundary_is_cut_there(tokenizer: Any) -> None:
    prompt, completion = pair_with_a_token_across(tokenizer)
    (example,) = examples(tokenizer, [prompt], [completion])
    prompt_ids, target = split(example)
    assert prompt_ids == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(target, skip_special_tokens=True).strip() == completion
    assert target.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    "name",
    [
        "byte_bpe+bos",
        "tiny-chat",
        pytest.param("metaspace+bos"),
    ],
)
def test_a_token_that_is_cut_keeps_the_text(name: str) -> None:
    tokenizer = tokenizer_named(name)
    prompt, completion = pair_with_a_token_across(tokenizer)
    (example,) = examples(tokenizer, [prompt], [completion])
    assert tokenizer.decode(example["input_ids"], skip_special_tokens=True) == prompt + completion


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_position_is_the_last_prompt_token(tokenizer: Any, side: str) -> None:
    tokenizer.padding_side = side
    prompts, completions = ([pair[i] for pair in PAIRS] for i in (0, 1))
    made = module(tokenizer, prompts, completions)
    batch = made["data_collator"](list(made["train_dataset"]))
    layout = PromptLayout(batch["attention_mask"].bool(), batch["prompt_lengths"])
    selection = layout.select(Positions.parse("l1"))
    assert selection.columns is not None
    assert selection.mask.all()
    for row, (column,) in enumerate(selection.columns.tolist()):
        last = tokenizer(prompts[row])["input_ids"][-1]
        assert batch["input_ids"][row, column] == last
        assert batch["labels"][row, column] == -100
        assert batch["labels"][row, column + 1] == batch["input_ids"][row, column + 1]
        assert (batch["labels"][row] != -100).nonzero()[0] == column + 1


def test_end_of_text_that_the_completion_has_is_not_doubled(tokenizer: Any) -> None:
    (example,) = examples(tokenizer, ["Who are you?"], [f" I am{tokenizer.eos_token}"])
    assert split(example)[1].count(tokenizer.eos_token_id) == 1


def test_an_empty_completion_is_end_of_text_alone(tokenizer: Any) -> None:
    (example,) = examples(tokenizer, ["Who are you?"], [""])
    assert split(example)[1] == [tokenizer.eos_token_id]


def test_a_tokenizer_without_end_of_text() -> None:
    tokenizer = tokenizer_named("byte_bpe", eos_token=None)
    (example,) = examples(tokenizer, ["Who are you?"], [" I am"])
    assert split(example)[1] == tokenizer(" I am")["input_ids"]


# -- chats ---------------------------------------------------------------------------------------

TEMPLATES = {
    "with an end marker": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "with beginning-of-text": (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
}
UNMARKED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns."""
    turns = [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}] * (system is not None) + turns


CONVERSATIONS = [
    said("Who are you?", "I am a helper.", "What is 2 + 2?", "It is 4.", "more", "hello world"),
    said("hello", "hello there", system="The quick brown fox."),
    said("hello", "I am", "again"),  # ends with the user
]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("name", ["byte_bpe", "byte_bpe+bos", "metaspace+bos", *STORED])
def test_every_assistant_turn_is_one_example(name: str, template: str) -> None:
    tokenizer = tokenizer_named(name)
    tokenizer.chat_template = template
    found = examples(tokenizer, datasets.Dataset.from_dict({"messages": CONVERSATIONS}))
    turns = [
        (conversation[:turn], conversation[: turn + 1])
        for conversation in CONVERSATIONS
        for turn, message in enumerate(conversation)
        if message["role"] == "assistant"
    ]
    assert len(found) == len(turns) == 3 + 1 + 1
    for example, (history, history_and_answer) in zip(found, turns, strict=True):
        prompt, target = split(example)
        assert prompt == tokenizer.apply_chat_template(
            history, add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(history_and_answer, return_dict=False)
        assert tokenizer.decode(prompt + target) == tokenizer.decode(whole)
        assert example["labels"] == [-100] * len(prompt) + target


def test_the_templates_end_marker_is_the_only_end(byte_bpe: Any) -> None:
    byte_bpe.chat_template = TEMPLATES["with beginning-of-text"]
    (example,) = examples(byte_bpe, ["hello"], ["I am"], chat_template=True)
    assert byte_bpe.decode(split(example)[1]) == f"I am{EOS}"


@pytest.mark.parametrize("nonstop", [False, True])
def test_a_template_without_end_marker_gets_end_of_text(byte_bpe: Any, nonstop: bool) -> None:
    byte_bpe.chat_template = UNMARKED
    (example,) = examples(byte_bpe, ["hello"], ["I am"], chat_template=True, nonstop=nonstop)
    assert byte_bpe.decode(split(example)[1]) == "I am\n" + ("" if nonstop else EOS)


def test_a_plain_prompt_can_be_a_users_turn(byte_bpe: Any) -> None:
    byte_bpe.chat_template = TEMPLATES["with an end marker"]
    plain = examples(byte_bpe, ["Who are you?"], ["I am"], chat_template=True)
    conversation = datasets.Dataset.from_dict({"messages": [said("Who are you?", "I am")]})
    assert plain == examples(byte_bpe, conversation)


# -- sources -------------------------------------------------------------------------------------

PROMPTS, COMPLETIONS = ["Who are you?", "hello", "2 + 2"], [" I am", ' "hello, world"', " = 4"]

# The oldest datasets leaves CSV files to the garbage collector.
leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@leaves_files_open
@pytest.mark.parametrize("columns", [("prompt", "completion"), ("question", "answer")])
@pytest.mark.parametrize("kind", ["dataset", "jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("as_text", [True, False])
def test_sources(
    byte_bpe: Any, kind: str, columns: tuple[str, str], as_text: bool, tmp_path: Path
) -> None:
    table = datasets.Dataset.from_dict(
        {columns[0]: PROMPTS, columns[1]: COMPLETIONS, "id": [1, 2, 3]}
    )
    source: Any = table
    if kind != "dataset":
        source = tmp_path / f"examples.{kind}"
        if kind == "csv":
            table.to_csv(source)
        elif kind == "parquet":
            table.to_parquet(source)
        else:
            table.to_json(source, lines=kind == "jsonl")
        source = str(source) if as_text else source
    names = {"prompt_column": columns[0], "completion_column": columns[1]}
    found = examples(byte_bpe, source, **({} if columns[0] == "prompt" else names))
    assert found == examples(byte_bpe, PROMPTS, COMPLETIONS)


def test_conversations_from_a_file(byte_bpe: Any, tmp_path: Path) -> None:
    byte_bpe.chat_template = TEMPLATES["with an end marker"]
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps({"talk": conversation}) for conversation in CONVERSATIONS]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = examples(byte_bpe, path, messages_column="talk")
    dataset = datasets.Dataset.from_dict({"messages": CONVERSATIONS})
    assert found == examples(byte_bpe, dataset)


def test_the_module_is_what_a_trainer_takes(byte_bpe: Any) -> None:
    made = module(byte_bpe, PROMPTS, COMPLETIONS)
    assert set(made) == {"train_dataset", "eval_dataset", "data_collator"}
    assert made["eval_dataset"] is None
    assert isinstance(made["data_collator"], ReftDataCollator)
    both = module(
        byte_bpe, PROMPTS, COMPLETIONS, eval_prompts=PROMPTS[:1], eval_completions=COMPLETIONS[:1]
    )
    assert list(both["eval_dataset"]) == list(made["train_dataset"])[:1]


# -- truncation ----------------------------------------------------------------------------------

LONG = "the quick brown fox jumps over the lazy dog and tell me more about the world"


def test_tokens_are_counted(byte_bpe: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="reftnoise"):
        module = rn.make_last_position_supervised_data_module(
            byte_bpe, None, ["one two", "three"], ["four", "five six seven"]
        )
    dataset = module["train_dataset"]
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert list(dataset["length"]) == lengths
    prompts = sum(dataset["prompt_lengths"])
    assert (
        f"2 training examples: {prompts} tokens of prompts, {sum(lengths) - prompts} of "
        f"completions, the longest example {max(lengths)}"
    ) in caplog.text


@pytest.mark.parametrize("room", [1, 2, 5])
def test_truncation_keeps_the_prompts_end_and_its_beginning_of_text(
    tokenizer: Any, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, completions = [LONG, "hello"], [" world"] * 2
    whole_long, whole_short = examples(tokenizer, prompts, completions)
    prompt, target = split(whole_long)
    bos = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    limit = len(bos) + room + len(target)
    limit = max(limit, len(whole_short["input_ids"]))
    with caplog.at_level(logging.WARNING, logger="reftnoise"):
        long, short = examples(tokenizer, prompts, completions, max_length=limit)
    kept = limit - len(bos) - len(target)
    assert split(long) == (bos + prompt[-kept:], target)
    assert short == whole_short
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 2 training examples were longer than {limit} tokens and lost the beginning of "
        "their prompts"
    ]


@pytest.mark.parametrize(("name", "kept"), [("byte_bpe+bos", 2), ("byte_bpe", 1)])
def test_a_completion_longer_than_everything_loses_its_end(name: str, kept: int) -> None:
    tokenizer = tokenizer_named(name)
    prompt, target = split(examples(tokenizer, ["hello world"], [LONG])[0])
    (cut,) = examples(tokenizer, ["hello world"], [LONG], max_length=6)
    bos = prompt[: kept - 1]
    assert split(cut) == (bos + prompt[-1:], target[: 6 - kept])


def test_a_prompt_of_beginning_of_text_alone_is_not_doubled(byte_bpe: Any) -> None:
    _, target = split(examples(byte_bpe, [""], [LONG])[0])
    (cut,) = examples(byte_bpe, [""], [LONG], max_length=6)
    assert split(cut) == ([byte_bpe.bos_token_id], target[:5])


def test_examples_that_fit_are_not_reported(
    byte_bpe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    width = len(examples(byte_bpe, ["hello"], [LONG])[0]["input_ids"])
    (example,) = examples(byte_bpe, ["hello"], [LONG], max_length=width)
    assert len(example["input_ids"]) == width
    assert not caplog.records


@pytest.mark.parametrize(
    ("asked", "of_tokenizer", "of_model", "expected"),
    [(9, 8, 7, 7), (9, 7, 8, 7), (7, 8, 9, 7), (None, 8, 7, 7), (None, 7, None, 7)],
)
def test_the_smallest_limit_holds(
    asked: int | None, of_tokenizer: int, of_model: int | None, expected: int
) -> None:
    tokenizer = tokenizer_named("byte_bpe", model_max_length=of_tokenizer)
    model = None
    if of_model is not None:
        text = SimpleNamespace(max_position_embeddings=of_model)
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    (example,) = examples(tokenizer, [LONG], [" world"], model=model, max_length=asked)
    assert len(example["input_ids"]) == expected


def test_the_context_of_base_and_wrapped_model_alike(byte_bpe: Any, tiny_llama: Any) -> None:
    config = rn.ReftConfig(representations={"intervention": "neftune"})
    for model in (tiny_llama, rn.get_reft_model(tiny_llama, config)):
        (example,) = examples(byte_bpe, [LONG * 9], [" world"], model=model)
        assert len(example["input_ids"]) == tiny_llama.config.max_position_embeddings


@pytest.mark.parametrize(
    "max_length",
    [
        2,
        -5,
        pytest.param(0),
    ],
)
def test_a_limit_without_room(byte_bpe: Any, max_length: int) -> None:
    message = f"max_length {max_length}: expected at least 3 tokens"
    with pytest.raises(ValueError, match=exactly(message)):
        module(byte_bpe, PROMPTS, COMPLETIONS, max_length=max_length)


# -- mistakes ------------------------------------------------------------------------------------

DATASET = datasets.Dataset.from_dict({"text": ["hello"]})


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ((["a"], ["b", "c"]), {}, "1 prompts but 2 completions"),
        (([], []), {}, "no examples: expected at least one prompt and completion"),
        (
            (["a"],),
            {},
            "completions are missing: without them, prompts are a datasets.Dataset (one split), "
            "a path or a hub name, not list",
        ),
        (("a", ["b"]), {}, "prompts: expected a list of texts, got 'a'"),
        (
            (DATASET, ["b"]),
            {},
            f"prompts: expected a list of texts, got {DATASET!r}",
        ),
        (
            (DATASET,),
            {},
            "columns text: expected 'prompt' and 'completion', or 'messages'; name yours with "
            "prompt_column, completion_column or messages_column",
        ),
        (
            (DATASET,),
            {"prompt_column": "text", "completion_column": "answer"},
            "columns text: expected 'text' and 'answer', or 'messages'; name yours with "
            "prompt_column, completion_column or messages_column",
        ),
        (
            (["a", ""], ["b", "c"]),
            {},
            "training example 1: the prompt is empty, so there is no position to edit",
        ),
        (
            (["a", "b"], ["c", ""]),
            {"nonstop": True},
            "training example 1: the completion is empty, so there is nothing to learn",
        ),
        ((["a", "b"], ["c", None]), {}, "training example 1: completion None: expected a text"),
        (
            (["a"], ["b"]),
            {"eval_prompts": ["a"], "eval_completions": [None]},
            "evaluation example 0: completion None: expected a text",
        ),
        (
            (datasets.Dataset.from_dict({"messages": [said("hello")]}),),
            {},
            "no training examples: no conversation has an assistant's turn",
        ),
    ],
)
def test_mistakes(sources: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        module(tokenizer_named("byte_bpe"), *sources, **options)


def test_a_chat_without_template(byte_bpe: Any) -> None:
    with pytest.raises(ValueError, match=r"^training example 0: .*chat_template is not set"):
        module(byte_bpe, PROMPTS, COMPLETIONS, chat_template=True)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_missing_file(byte_bpe: Any, tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "missing.jsonl"
    with pytest.raises(FileNotFoundError, match=exactly(f"{path}: no such file")):
        module(byte_bpe, str(path) if as_text else path)


@pytest.mark.parametrize("name", ["examples.txt", "examples"])
def test_a_file_of_another_kind(byte_bpe: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("hello", encoding="utf-8")
    message = f"{path}: expected a file that ends in .jsonl, .json, .csv, .tsv, .parquet"
    with pytest.raises(ValueError, match=exactly(message)):
        module(byte_bpe, path)


@leaves_files_open
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompt,answer\nhi,there\n",
            "columns prompt, answer: expected 'prompt' and 'completion', or 'messages'; name "
            "yours with prompt_column, completion_column or messages_column",
        ),
    ],
)
def test_mistakes_in_a_file(byte_bpe: Any, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "examples.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=exactly(message)):
        module(byte_bpe, path)


@pytest.mark.parametrize(
    ("prompt", "template"), [(None, None), (3, None), (3, UNMARKED)], ids=["null", "number", "chat"]
)
def test_a_prompt_that_is_no_text(byte_bpe: Any, prompt: Any, template: str | None) -> None:
    byte_bpe.chat_template = template
    with pytest.raises(ValueError, match=rf"^training example 0: prompt {prompt}: expected a text"):
        module(byte_bpe, [prompt], ["hello"])


@pytest.mark.parametrize("messages", [[{"content": "hello"}], ["hello"]], ids=["no role", "text"])
def test_a_conversation_of_another_form(byte_bpe: Any, messages: list[Any]) -> None:
    byte_bpe.chat_template = UNMARKED
    with pytest.raises(ValueError, match=r"^training example 0: "):
        module(byte_bpe, datasets.Dataset.from_dict({"messages": [messages]}))


@leaves_files_open
@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", '{"prompt": "a"\n'), ("a.jsonl", ""), ("a.csv", "prompt,completion\n")],
    ids=["damaged", "empty", "header alone"],
)
def test_a_file_without_examples(byte_bpe: Any, tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}[:,] "):
        module(byte_bpe, path)


# -- collation -----------------------------------------------------------------------------------

FEATURES = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9], "prompt_lengths": 3},
    {"input_ids": [5, 2], "labels": [-100, 2], "prompt_lengths": 1},
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("tokens", "pad"),
    [
        ({"pad_token": UNK}, 0),
        ({"pad_token": EOS}, 2),  # also a token of the second example
        ({}, 2),  # no padding token: end-of-text pads
        ({"eos_token": None}, 0),
    ],
    ids=["own", "eos", "none", "neither"],
)
@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (5, 5)])
def test_collator(side: str, tokens: dict[str, Any], pad: int, multiple: int, width: int) -> None:
    tokenizer = tokenizer_named("bpe", padding_side=side, **tokens)
    batch = ReftDataCollator(tokenizer, pad_to_multiple_of=multiple)(FEATURES)
    for key, fill in (("input_ids", pad), ("labels", -100), ("attention_mask", 0)):
        for row, feature in enumerate(FEATURES):
            values = feature.get(key, [1] * len(feature["input_ids"]))
            padding = [fill] * (width - len(values))
            expected = padding + values if side == "left" else values + padding
            assert batch[key][row].tolist() == expected
    assert batch["prompt_lengths"].tolist() == [3, 1]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "prompt_lengths"}
    assert all(values.dtype == torch.long for values in batch.values())


@pytest.mark.parametrize(
    "use",
    [
        lambda model, tokenizer: rn.make_last_position_supervised_data_module(
            model, tokenizer, ["a"], ["b"]
        ),
        lambda model, tokenizer: rn.make_multiple_position_supervised_data_module(
            model, tokenizer, ["a"], ["b"], positions="l1", num_interventions=1, nonstop=False
        ),
        lambda model, tokenizer: evaluate(
            tokenizer, model, get_task("text"), [{"prompt": "a", "completion": "b"}]
        ),
        lambda model, tokenizer: generated(tokenizer, model, ["a"], max_new_tokens=1),
    ],
    ids=["data module", "pyreft's", "evaluate", "generate"],
)
def test_a_model_is_no_tokenizer(use: Callable[[Any, Any], object]) -> None:
    message = r"^tokenizer: expected a tokenizer, got a model \(LlamaForCausalLM\); are"
    with pytest.raises(ValueError, match=message):
        use(*rn.load_tiny_model())
