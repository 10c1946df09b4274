"""A recipe is resolved once, whatever is done with it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from reftnoise.data import sources
from reftnoise.data.tasks.text import TextTask
from reftnoise.training import resolved_run
from support.command_line import command, quick


def test_task_and_rows_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[str]()
    get_task, load_rows, question = resolved_run.get_task, sources.load_rows, TextTask.question

    def counted_task(spec: Any) -> Any:
        calls["task"] += 1
        return get_task(spec)

    def counted_rows(source: Any, **options: Any) -> Any:
        if isinstance(source, str):  # and not rows
            calls[f"{source} {options['split']}"] += 1
        return load_rows(source, **options)

    def counted_question(self: TextTask, row: Mapping[str, Any]) -> Any:
        calls[f"question {row['prompt']}"] += 1
        return question(self, row)

    monkeypatch.setattr(resolved_run, "get_task", counted_task)
    monkeypatch.setattr(sources, "load_rows", counted_rows)
    monkeypatch.setattr(TextTask, "question", counted_question)
    assert command(*quick(tmp_path / "run"), "--quiet") == 0
    scored = list(load_rows("tiny-chat", split="test[:8]"))
    expected = {"task": 1, "tiny-chat train": 1, "tiny-chat test[:8]": 1}
    expected |= {f"question {row['prompt']}": 1 for row in scored}
    assert {name: calls[name] for name in expected} == expected
    assert {name for name in calls if "question" not in name} == set(list(expected)[:3])
    calls.clear()
    assert command("eval", tmp_path / "run", "--base", "--quiet") == 0
    del expected["tiny-chat train"]
    assert calls == expected
