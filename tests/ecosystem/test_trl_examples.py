"""The examples with TRL run as they stand, in fewer steps."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers.utils import logging as transformers_logging

pytest.importorskip("trl", reason="needs trl: pip install 'reftnoise[trl]'")

import reftnoise as rn
from support.trl_runs import MARKS, base_model

pytestmark = MARKS

EXAMPLES = Path(__file__).parents[2] / "examples" / "trl"


@pytest.fixture(autouse=True)
def libraries_as_before() -> Iterator[None]:
    """The examples quieten libraries for the whole process."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()


def run(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**settings)


def expect_one_bar_each(printed: Any, *stages: str) -> None:
    """Nothing of the libraries', such as a Trainer's logs: {'loss': …}."""
    assert "{'" not in printed.out
    bars = {line.partition(":")[0] for line in re.split(r"[\r\n]+", printed.err) if "%|" in line}
    assert bars == set(stages)


def test_supervised_training_then_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = str(tmp_path / "sft"), str(tmp_path / "dpo")
    run("sft", monkeypatch, steps=20, output=first)
    assert "🌲" in capsys.readouterr().out
    run("dpo", monkeypatch, steps=5, adapter=first, output=second)
    assert "margin" in capsys.readouterr().out
    rn.ReftModel.from_pretrained(base_model(), second)


@pytest.mark.parametrize(
    ("name", "steps", "said"),
    [("dpo", 5, "step   5"), ("grpo", 1, "reward"), ("reward", 2, "accuracy")],
)
def test_an_example(
    name: str,
    steps: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(name, monkeypatch, steps=steps, output=str(tmp_path / "adapter"))
    printed = capsys.readouterr()
    assert said in printed.out
    expect_one_bar_each(printed, "training")
    assert (tmp_path / "adapter" / "reft_config.json").is_file()


def test_four_adapters_of_one_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, questions = str(tmp_path / "rlhf"), ["Where does a bear live?"]
    run("rlhf", monkeypatch, steps=(1, 1, 1, 1), questions=questions, output=output)
    printed = capsys.readouterr()
    said = printed.out
    expect_one_bar_each(printed, "supervised", "reward", "reinforced", "distilled")
    for name in ("supervised", "reinforced", "distilled"):
        assert name in said
        rn.ReftModel.from_pretrained(base_model(), tmp_path / "rlhf" / name)


def test_a_scorer_has_the_layers_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    base, tokenizer = rn.load_tiny_model()
    scorer = runpy.run_path(str(EXAMPLES / "rlhf.py"))["scorer_of"](base, tokenizer)
    new = {
        name for name, p in scorer.named_parameters() if all(p is not q for q in base.parameters())
    }
    assert new == {"score.weight"}
    chat = tokenizer("Where does a bear live?", return_tensors="pt")
    assert scorer(**chat).logits.shape == (1, 1)
    base(**chat)  # still a language model
