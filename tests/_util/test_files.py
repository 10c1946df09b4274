"""Paths of users: `~` is the same place for every part, and mistakes are one line."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

import reftnoise as rn
from reftnoise._util.files import local_path, writing
from reftnoise.analysis.report import write_report
from reftnoise.config.base_model import expect_base
from reftnoise.data.sources import load_rows
from reftnoise.engine.base.loading import load_base
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.training.run_directory import RunDirectory
from reftnoise.training.study.results import read_results
from reftnoise.training.trainer import last_complete_checkpoint
from support.command_line import command, quick


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, and a working directory in which nothing may appear."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/a", "{home}/a"),
        ("~", "{home}"),
        ("a/~/b", "a/~/b"),
        ("~no such user/a", "~no such user/a"),
        ("$HOME/a", "$HOME/a"),
        (Path("~/a"), "{home}/a"),
        (PurePosixPath("~/a"), "{home}/a"),
        (" a", " a"),
    ],
)
def test_a_path_is_read_as_a_shell_does_but_without_variables(
    path: str | os.PathLike[str], expected: str, home: Path
) -> None:
    assert local_path(path) == Path(expected.format(home=home))


@pytest.mark.parametrize("path", ["", "a\0b", 3, None, True, b"a", ["a"], "a" * 200 + "\0"])
def test_what_is_no_path_is_one_line(path: Any) -> None:
    with pytest.raises(ValueError, match=r"^output_dir .*: expected a path, such as") as error:
        local_path(path, "output_dir")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"No space left on device: 'a/b'"),
        (OSError(13, "Permission denied", "a/c"), r"Permission denied: 'a/c'"),
        (Exception("No space left on device (os error 28)"), r"No space left on device: 'a/b'"),
        (RuntimeError("PytorchStreamWriter failed writing file"), r"a/b: a write failed"),
    ],
)
def test_a_failed_write_names_its_path(error: Exception, message: str) -> None:
    with pytest.raises(OSError, match=message), writing(Path("a/b")):
        raise error
    with pytest.raises(RuntimeError, match="of the model"), writing(Path("a/b")):
        raise RuntimeError("of the model")


def test_a_run_in_the_home_is_one_directory_and_resumes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    train = quick(Path("~/runs/x"), "--quiet", "--training.save_steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "finish", killed)
        assert command(*train) == 130
    assert command(*train, "--resume") == 0
    assert {path.name for path in (home / "runs" / "x").iterdir()} >= {"adapter", "scores.json"}
    assert command("eval", "~/runs/x", "--evaluation.limit", 1, "--quiet") == 0
    assert command("inspect", "~/runs/x") == 0
    assert write_report("~/runs/x", output_dir="~/page") == home / "page" / "report.html"
    assert not os.listdir()


PLACES: dict[str, Callable[[], Any]] = {
    "adapter": lambda: rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], "~/a"),
    "another adapter": lambda: rn.get_reft_model(rn.load_tiny_model()[0]).load_adapter("~/a", "x"),
    "base": lambda: load_base("~/base"),
    "base's name": lambda: expect_base("~/base"),
    "rows": lambda: load_rows("~/rows.jsonl"),
    "config": lambda: rn.ReftConfig.from_file("~/config.yaml"),
    "checkpoints": lambda: last_complete_checkpoint("~/checkpoints"),
    "prefix cache": lambda: rn.PrefixCache("disk", 2**20, "~").write(b"a", torch.zeros(1, 1)),
    "results": lambda: read_results("~/study")[0],
}


@pytest.mark.parametrize("read", PLACES.values(), ids=PLACES)
def test_what_is_read_may_lie_in_the_home(home: Path, read: Callable[[], Any]) -> None:
    config = rn.ReftConfig([{"layer": 0, "intervention": "loreft", "low_rank_dimension": 1}])
    rn.get_reft_model(rn.load_tiny_model()[0], config).save_pretrained("~/a")
    (home / "base").symlink_to(DIRECTORY)
    (home / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (home / "config.yaml").write_text(config.to_yaml())
    (home / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (home / "checkpoints" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (home / "study").mkdir()
    (home / "study" / "results.jsonl").write_text('{"cell": {}, "key": "a"}\n')
    read()
    assert not os.listdir()
