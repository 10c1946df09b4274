"""Answers to prompts: in batches as one by one, next to the base's, and as files."""

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import reftnoise as rn
from reftnoise.config.decoding import Decoding
from reftnoise.inference.chat import chat
from reftnoise.inference.loading import load_adapted
from reftnoise.inference.prompts import answer_prompts, generate_texts
from reftnoise.training.recipe import DataConfig, Recipe
from support.adapters import QUESTIONS, answer, save_adapter

SHORT = Decoding(max_new_tokens=12)
PLAIN = replace(SHORT, template="plain")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="module")
def loaded(adapter: Path) -> tuple[rn.ReftModel, Any]:
    return load_adapted(adapter, device="cpu")


def alone(loaded: tuple[rn.ReftModel, Any], *, system: str | None = None) -> list[str]:
    before = [] if system is None else [{"role": "system", "content": system}]
    chats = [[*before, {"role": "user", "content": question}] for question in QUESTIONS]
    return [answer(*loaded, chat, 12) for chat in chats]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_batch_answers_as_each_prompt_alone(
    batch_size: int, loaded: tuple[rn.ReftModel, Any]
) -> None:
    assert generate_texts(*loaded, QUESTIONS, batch_size=batch_size, decoding=SHORT) == alone(
        loaded
    )


def test_a_system_message(loaded: tuple[rn.ReftModel, Any]) -> None:
    texts = generate_texts(*loaded, QUESTIONS, decoding=replace(SHORT, system="Answer in emoji."))
    assert texts == alone(loaded, system="Answer in emoji.")
    assert texts != alone(loaded)
    with pytest.raises(ValueError, match=r"^system needs the template chat, not 'plain'$"):
        generate_texts(*loaded, QUESTIONS, decoding=Decoding(template="plain", system="Be brief."))


def test_plain_texts_are_continued(loaded: tuple[rn.ReftModel, Any]) -> None:
    reft_model, tokenizer = loaded
    prompt = tokenizer(QUESTIONS[0], return_tensors="pt")
    tokens = reft_model.generate(**prompt, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate_texts(*loaded, QUESTIONS, decoding=PLAIN)[0] == expected


def test_sampling_follows_its_seed(loaded: tuple[rn.ReftModel, Any]) -> None:
    def sampled(**settings: Any) -> list[str]:
        return generate_texts(*loaded, QUESTIONS, decoding=replace(SHORT, **settings))

    state = torch.get_rng_state()
    assert sampled(temperature=1.5) == sampled(temperature=1.5)
    assert sampled(temperature=1.5) != sampled(temperature=1.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled(temperature=1.5, top_k=1) == alone(loaded)
    assert sampled(temperature=1.5, top_p=1e-9) == alone(loaded)


def test_greedy_whatever_the_base_samples_with(adapter: Path) -> None:
    reft_model, tokenizer = load_adapted(adapter, device="cpu")
    reft_model.generation_config.update(do_sample=True, temperature=3.0, top_p=0.9)
    expected = generate_texts(*load_adapted(adapter, device="cpu"), QUESTIONS, decoding=SHORT)
    assert generate_texts(reft_model, tokenizer, QUESTIONS, decoding=SHORT) == expected


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf"), "hot"])
def test_what_is_no_temperature(temperature: Any) -> None:
    with pytest.raises(ValueError, match=r"^temperature .*: expected a number of at least 0$"):
        Decoding(temperature=temperature)


def test_what_is_no_number_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"^max_new_tokens 0: expected at least 1$"):
        Decoding(max_new_tokens=0)


@pytest.mark.parametrize(
    ("prompts", "settings", "problem"),
    [
        (["a", ""], {}, "prompt 1: expected a text, got ''"),
        ([3], {}, "prompt 0: expected a text, got 3"),
        (["a"], {"batch_size": 0}, "batch_size 0: expected at least 1"),
        (["a"], {"decoding": Decoding(max_new_tokens=300)}, "max_new_tokens 300: expected at"),
    ],
)
def test_bad_input(
    prompts: Any, settings: Any, problem: str, loaded: tuple[rn.ReftModel, Any]
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        generate_texts(*loaded, prompts, **settings)


# -- files ---------------------------------------------------------------------------------------


def test_files_side_by_side(
    adapter: Path, loaded: tuple[rn.ReftModel, Any], tmp_path: Path
) -> None:
    rows = [{"question": question, "id": number} for number, question in enumerate(QUESTIONS)]
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", encoding="utf-8")
    target.write_text("of an earlier time", encoding="utf-8")
    written = answer_prompts(
        adapter, input=source, output=target, column="question", compare=True, decoding=SHORT
    )
    with loaded[0].disabled():
        bases = alone(loaded)
    expected = [
        row | {"base": base, "text": text}
        for row, base, text in zip(rows, bases, alone(loaded), strict=True)
    ]
    assert written == expected
    assert [
        json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()
    ] == expected
    assert bases != alone(loaded)
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "answers.jsonl"}


def test_a_write_that_fails_leaves_the_old_file(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "answers.jsonl"
    target.write_text("of an earlier time", encoding="utf-8")

    def fail(*_: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        answer_prompts(adapter, prompts=QUESTIONS[:1], output=target, decoding=SHORT)
    assert target.read_text(encoding="utf-8") == "of an earlier time"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_printed(adapter: Path, loaded: tuple[rn.ReftModel, Any]) -> None:
    def printed(**arguments: Any) -> str:
        file = io.StringIO()
        answer_prompts(adapter, console=Console(file=file, width=200), **arguments, decoding=SHORT)
        return file.getvalue()

    assert printed(prompts=QUESTIONS[:1]) == alone(loaded)[0] + "\n"
    table = printed(prompts=QUESTIONS, compare=True)
    assert re.search(r"prompt +┃ base +┃ adapted", table)
    assert all(text.split()[0] in table for text in alone(loaded))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", r"line 1: expected a mapping, got \[1\]"),
        ('{"Prompts": "a"}', "line 1: no 'prompt'; did you mean 'Prompts'"),
        ('{"prompt": ""}', "line 1: prompt '', expected a text"),
    ],
)
def test_a_damaged_input_file(line: str, problem: str, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, {problem}"):
        answer_prompts(adapter, input=path)


def test_nothing_to_answer(adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"^no prompts: expected a prompt, or an input file$"):
        answer_prompts(adapter)


def test_prompts_of_a_run_stand_in_its_template(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    run = tmp_path / "run"
    model.save_pretrained(run / "adapter")
    recipe = Recipe(data=DataConfig(template="Question: {prompt}\nAnswer:"))
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    [answered] = answer_prompts(run, prompts=["Can a bee fly?"], decoding=SHORT)
    filled = ["Question: Can a bee fly?\nAnswer:"]
    assert answered["text"] == generate_texts(model, tokenizer, filled, decoding=PLAIN)[0]
    [plain] = answer_prompts(run, prompts=filled, decoding=PLAIN)
    assert plain["text"] == answered["text"]

    monkeypatch.setattr("sys.stdin", io.StringIO("Can a bee fly?\n"))
    console = Console(file=io.StringIO(), width=200)
    chat(run, console=console, decoding=SHORT)
    assert console.file.getvalue().rstrip().endswith(answered["text"].rstrip())  # type: ignore[attr-defined]


def test_answers_replace_no_column_and_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Can a bee fly?", "note": "a\u2028b"}\n')
    with pytest.raises(ValueError, match="column 'text': the answer goes there"):
        answer_prompts("nowhere", input=path, column="text")
    with pytest.raises(ValueError, match="expected a file, found a directory"):
        answer_prompts("nowhere", prompts=["a"], output=tmp_path)
    with pytest.raises(ValueError, match=r"top_p 0\.5: needs a temperature above 0"):
        Decoding(top_p=0.5)
