"""Damaged data files load, or end in one line that names the file, soon and in little memory."""

import os
import re
import resource
import signal
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

import reftnoise as rn
from reftnoise.cli.main import main
from reftnoise.data.sources import load_rows
from reftnoise.engine.base.tiny import DIRECTORY
from support.damaged_data import damaged_file

SECONDS, BYTES = 10, 2**29
"""Limits of a file, in seconds of processor time: with what the first file of a process imports."""
FAILED_ONCE = (4510, 5775)
_BATCH = 50
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def outcome(tokenizer: Any, path: Path) -> str | None:
    """None for a file that loads or ends in a line; else what went wrong."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    message = ""
    try:
        rows = load_rows(path)
        rn.make_last_position_supervised_data_module(tokenizer, None, rows)
        list(zip(range(9), load_rows(path, streaming=True), strict=False))
    except (ValueError, OSError) as error:
        message = str(error)
    except BaseException:
        return traceback.format_exc()
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if "\n" in message:
        return f"more than one line: {message}"
    names = (str(path), "training example ", "columns ", "no training examples")
    if message and not message.startswith(names):
        return f"no file and no row: {message}"
    return None if seconds < SECONDS and grown < BYTES else f"{seconds} s, {grown} bytes"


def campaign(seeds: Sequence[int], directory: Path) -> list[str]:
    """What went wrong, by seed, in children that an alarm ends."""
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    tokenizer.chat_template = TEMPLATE
    failures = []
    for first in range(0, len(seeds), _BATCH):
        part = seeds[first : first + _BATCH]
        child = os.fork()
        if child == 0:
            signal.alarm(600)  # a hang
            (directory / f"{first}.failures").write_text(_failures(tokenizer, part, directory))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            failures.append(f"seeds from {part[0]}: the child ended with {status}")
        else:
            failures += filter(None, (directory / f"{first}.failures").read_text().split("\0"))
    return failures


def _failures(tokenizer: Any, seeds: Sequence[int], directory: Path) -> str:
    failures = []
    for seed in seeds:
        suffix, content = damaged_file(seed)
        path = directory / f"{seed}{suffix}"
        path.write_bytes(content)
        if failure := outcome(tokenizer, path):
            failures.append(f"seed {seed} {path}: {failure}")
        path.unlink()
    return "\0".join(failures)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "seeds",
    [[*range(20), *FAILED_ONCE], pytest.param(range(20, 10_020), marks=pytest.mark.slow)],
    ids=len,
)
def test_damaged_files(
    seeds: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert campaign(seeds, tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"messages": ' + "[" * 100_000, "line 1: nested more than 100 levels deep"),
        ("a.csv", "prompt,completion\na,b\nc\n", "line 3: 1 cells, expected 2"),
        ("a.csv", "prompt,completi\0n\na,b\n", "line 1: column 'completi\\x00n': expected a name"),
        ("a.json", "[3]", "row 0: expected a mapping, got 3"),
    ],
)
def test_the_command_line_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    unit = "[{intervention: loreft, low_rank_dimension: 4, layer: all}]"
    arguments = ["--representations", unit, "--data.train", str(path)]
    assert main(["train", *arguments, "--output_dir", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(f"reftnoise: {re.escape(str(path))}, {re.escape(message)}", lines[0])
    assert not (tmp_path / "run").exists()
