"""An adapter directory holds the old or the new adapter, whole, at every instant of a save."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch

import reftnoise as rn
from reftnoise._util.errors import warn_once
from reftnoise.adapters.directory import AdapterFiles
from support.models.architectures import tiny_model

OLD, NEW = "l1", "all"
"""Positions of the two adapters, whose weights are all 1 and all 2."""


@pytest.fixture(scope="module")
def pair() -> dict[str, rn.ReftModel]:
    base = tiny_model()
    models = {}
    for value, positions in enumerate((OLD, NEW), start=1):
        entry = {"layer": "all", "intervention": "noreft", "low_rank_dimension": 2}
        config = rn.ReftConfig(entry | {"positions": positions})
        models[positions] = rn.get_reft_model(base, config)
        for parameter in models[positions].interventions.parameters():
            torch.nn.init.constant_(parameter, value)
    return models


def held(directory: Path) -> str:
    """Which of the two adapters a directory holds; an AssertionError if parts of both."""
    adapter = AdapterFiles.read(directory)
    positions = adapter.config.representations[0].positions
    value = {OLD: 1, NEW: 2}[str(positions)]
    assert all((tensor == value).all() for tensor in adapter.weights().values())
    return str(positions)


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A child that works until the block ends; yields its process number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def save_in_turn(pair: dict[str, rn.ReftModel], directory: Path) -> None:
    while True:
        for reft_model in pair.values():
            reft_model.save_pretrained(directory)


@pytest.mark.parametrize("kills", [8, pytest.param(400, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_old_or_the_new(
    kills: int, pair: dict[str, rn.ReftModel], tmp_path: Path
) -> None:
    pair[OLD].save_pretrained(tmp_path)
    chance, seen = random.Random(0), set()
    for _ in range(kills):
        with forked(lambda: save_in_turn(pair, tmp_path)):
            time.sleep(chance.uniform(0, 0.03))  # the instant of the kill
        seen.add(held(tmp_path))
    pair[OLD].save_pretrained(tmp_path)
    assert held(tmp_path) == OLD
    assert not list(tmp_path.glob(".saving-*"))
    assert kills < 100 or seen == {OLD, NEW}


@pytest.mark.parametrize("loads", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_directory_is_read_while_others_save(
    loads: int, pair: dict[str, rn.ReftModel], tmp_path: Path
) -> None:
    pair[OLD].save_pretrained(tmp_path)

    def save() -> None:
        save_in_turn(pair, tmp_path)

    with forked(save), forked(save):
        for _ in range(loads):
            assert held(tmp_path) in (OLD, NEW)


def test_threads_that_save_into_one_directory(
    pair: dict[str, rn.ReftModel], tmp_path: Path
) -> None:
    def save(name: str) -> None:
        for _ in range(5):
            pair[name].save_pretrained(tmp_path)

    threads = [threading.Thread(target=save, args=(name,)) for name in (OLD, NEW) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "reft_config.json",
        "reft_model.safetensors",
    }
    positions = held(tmp_path)
    text = json.loads((tmp_path / "reft_config.json").read_text())
    assert text["representations"][0]["positions"] == positions


def test_between_the_two_renames(
    pair: dict[str, rn.ReftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair[OLD].save_pretrained(tmp_path)
    rename = os.replace

    def first_alone(source: Path, target: Path) -> None:
        if target.name == "reft_config.json":
            raise OSError("killed")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", first_alone)
        with pytest.raises(OSError, match="killed"):
            pair[NEW].save_pretrained(tmp_path)
    between = AdapterFiles.read(tmp_path).identity()
    assert held(tmp_path) == NEW
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.reft_config == pair[NEW].reft_config
    pair[NEW].save_pretrained(tmp_path)
    assert AdapterFiles.read(tmp_path).identity() == between


def test_what_a_killed_save_left_is_removed_and_a_living_one_is_waited_for(
    pair: dict[str, rn.ReftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".saving-of-the-dead").mkdir()
    (tmp_path / ".saving-of-the-dead" / "reft_model.safetensors").write_bytes(b"half")
    written, may_go_on = threading.Event(), threading.Event()
    write = Path.write_bytes

    def wait(path: Path, content: bytes) -> int:
        size = write(path, content)
        if threading.current_thread() is first:
            written.set()
            assert may_go_on.wait(60)
        return size

    monkeypatch.setattr(Path, "write_bytes", wait)
    first = threading.Thread(target=pair[OLD].save_pretrained, args=(tmp_path,))
    second = threading.Thread(target=pair[NEW].save_pretrained, args=(tmp_path,))
    first.start()
    assert written.wait(60)
    assert not (tmp_path / ".saving-of-the-dead").exists()
    second.start()
    second.join(0.1)
    assert len(list(tmp_path.glob(".saving-*"))) == 1
    may_go_on.set()
    first.join()
    second.join()
    assert held(tmp_path) == NEW
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize("file", ["reft_config.json", "reft_model.safetensors"])
def test_a_flipped_bit_is_noticed(
    file: str, pair: dict[str, rn.ReftModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair[OLD].save_pretrained(tmp_path)
    path = tmp_path / file
    content, chance = path.read_bytes(), random.Random(1)
    for place in chance.sample(range(len(content)), 200):
        flipped = bytearray(content)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        caplog.clear()
        warn_once.cache_clear()
        try:
            held(tmp_path)
        except ValueError:
            continue
        changed = json.loads(bytes(flipped)) if file.endswith("json") else None
        assert changed == json.loads(content) or caplog.records  # white space, or a warning


def test_an_edited_config_counts(pair: dict[str, rn.ReftModel], tmp_path: Path) -> None:
    pair[OLD].save_pretrained(tmp_path)
    path = tmp_path / "reft_config.json"
    description = json.loads(path.read_text())
    description["representations"][0]["positions"] = "f1"
    path.write_text(json.dumps(description))
    assert AdapterFiles.read(tmp_path).config.representations[0].positions == "f1"


def test_files_of_the_first_release(pair: dict[str, rn.ReftModel], tmp_path: Path) -> None:
    """Whose weights have no config inside."""
    for name, reft_model in pair.items():
        reft_model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "reft_model.safetensors"
        plain = safetensors.torch.save(safetensors.torch.load_file(path))
        path.write_bytes(plain)
        description = json.loads((tmp_path / name / "reft_config.json").read_text())
        description["weights_sha256"] = sha256(plain).hexdigest()
        (tmp_path / name / "reft_config.json").write_text(json.dumps(description))
        assert held(tmp_path / name) == name
    shutil.copy(tmp_path / NEW / "reft_model.safetensors", tmp_path / OLD)
    with pytest.raises(ValueError, match=r"not the weights that reft_config\.json was"):
        held(tmp_path / OLD)
