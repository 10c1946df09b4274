"""The demo on a chat model: its data, and what it prints, on a small model and on SmolLM2."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import reftnoise as rn
from reftnoise._util.options import read_file
from reftnoise.cli.demo.chat import DATA, demo_recipe, is_emoji, run_chat_demo
from reftnoise.config.base_model import PACKAGED, expect_base
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.training.recipe import Recipe

ROOT = Path(__file__).parents[2]


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("text", ["🐻", "☔📖 ☕", "👨‍👩‍👧‍👦❤️", "🇮🇹", "👍🏽 1️⃣", " 🏝️\n"])
def test_emoji(text: str) -> None:
    assert is_emoji(text)


@pytest.mark.parametrize("text", ["", " ", "bear", "🐻.", "a 🐻", "1", "☔\ufffd", "🐻 12", "#"])
def test_what_is_not_emoji_alone(text: str) -> None:
    assert not is_emoji(text)


def test_the_data_is_whole() -> None:
    train, test, moods = rows("train"), rows("test"), rows("moods")
    assert len(train) == 20
    assert len(test) >= 10
    assert all(is_emoji(row["completion"]) and not is_emoji(row["prompt"]) for row in train)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert all(row.keys() == {"cheerful", "gloomy"} for row in moods)


def test_the_recipe_that_is_shipped_is_the_demos() -> None:
    shipped = read_file(Recipe, ROOT / "examples" / "recipes" / "persona.yaml")
    assert (ROOT / str(shipped.data.train)).samefile(DATA / "train.jsonl")
    data = replace(shipped.data, train=str(DATA / "train.jsonl"))
    recipe = demo_recipe(shipped.model, shipped.seed, shipped.output_dir)
    assert replace(shipped, data=data) == recipe


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", "80")
    return 80


def test_it_runs_on_any_chat_model(
    narrow: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_chat_demo(str(DIRECTORY), str(tmp_path / "adapter"), 0)
    out = capsys.readouterr().out
    assert re.search(r"In emoji alone: \d+ of 12 answers, and 0 of the base's\.", out)
    table = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert len(table) > 20
    assert all(len(line) <= narrow for line in table)
    loaded = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], tmp_path / "adapter")
    layers, width = loaded.config.num_hidden_layers, loaded.config.hidden_size
    assert loaded.parameter_counts()[0] == layers * (2 * 4 * width + 4)  # R, W and b of rank 4


def installed() -> bool:
    try:
        expect_base("smollm2")
    except ImportError:
        return False
    return True


@pytest.mark.slow  # a minute or two
@pytest.mark.skipif(not installed(), reason=f"needs {PACKAGED['smollm2'].install}")
def test_it_convinces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_chat_demo("smollm2", str(tmp_path / "adapter"), 0)
    shares = re.search(r"In emoji alone: (\d+) of 12 answers, and (\d+)", capsys.readouterr().out)
    assert shares is not None
    assert int(shares[1]) >= 10
    assert int(shares[2]) == 0
