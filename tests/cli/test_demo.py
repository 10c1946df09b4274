"""The embedded model, the demo and the command line as a user meets them."""

import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reftnoise as rn
from reftnoise.engine.base.tiny import DIRECTORY, load_tiny_examples


def run(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reftnoise", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_the_demo_convinces(tmp_path: Path) -> None:
    done = run("demo", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = re.findall(r"│ (base|LoReFT[ +A-Za-z]*?) +│ +([01]\.\d+) │", done.stdout)
    accuracy = {name: float(value) for name, value in rows}
    assert set(accuracy) == {"base", "LoReFT", "LoReFT + NEFTune", "LoReFT + SymNoise"}
    assert accuracy.pop("base") <= 0.10
    assert min(accuracy.values()) >= 0.90

    printed = done.stdout[done.stdout.index("import reftnoise as rn") :]
    names: dict[str, rn.ReftModel] = {}
    exec(printed.replace("'reftnoise-demo'", repr(str(tmp_path / "reftnoise-demo"))), names)
    tokenizer = rn.load_tiny_model()[1]
    example = load_tiny_examples("test")[0]
    chat = [{"role": "user", "content": example.prompt}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = names["reft_model"].generate(**prompt, max_new_tokens=16)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() == example.completion


def test_the_embedded_model_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 4 * 2**20
    model, tokenizer = rn.load_tiny_model()
    assert 300_000 <= model.num_parameters() <= 2_000_000
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    text = "Où est le 🐙, s'il vous plaît? 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    train, test = load_tiny_examples("train"), load_tiny_examples("test")
    assert 10 <= len(train) <= 50
    assert len(test) >= 50
    assert not {example.prompt for example in train} & {example.prompt for example in test}


def test_the_script_makes_the_embedded_text_and_vocabulary() -> None:
    path = Path(__file__).parents[2] / "examples" / "make_tiny_model.py"
    script = runpy.run_path(str(path))
    facts = script["build_facts"]()
    examples = script["split_examples"](facts, random.Random(0))
    lines = (DIRECTORY / "emoji.jsonl").read_text(encoding="utf-8").splitlines()
    assert [vars(example) for example in examples] == [json.loads(line) for line in lines]
    known = script["withhold"](facts, examples)
    asked = {question for fact in known for question in fact.questions}
    assert not asked & {example.prompt for example in examples}
    vocabulary = script["train_tokenizer"](known, 1800).get_vocab()
    assert vocabulary == rn.load_tiny_model()[1].get_vocab()


def test_errors_of_the_user_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert run("demo", "--seeed", "1", directory=tmp_path).returncode == 2
    assert run("dmeo", directory=tmp_path).returncode == 2
    done = run("demo", "--output_dir", "taken", directory=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "reftnoise: taken: expected a directory, found a file\n"
    assert "━" not in done.stdout, "it says so before it trains"


@pytest.mark.parametrize("command", [[], ["train"], ["study"], ["chat"]])
def test_help_needs_no_torch(command: list[str]) -> None:
    arguments = [*command, "--help"]
    code = (
        f"import sys, reftnoise.cli.main as c\ntry: c.main({arguments})\nexcept SystemExit: pass\n"
    )
    check = "assert not {'torch', 'transformers', 'pyvene', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"usage: reftnoise" in done.stdout
