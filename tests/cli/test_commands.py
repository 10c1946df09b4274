"""Commands on a finished run: what they print is what the library says."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reftnoise as rn
from reftnoise.config.decoding import Decoding
from reftnoise.inference.prompts import generate_texts
from support.command_line import command, quick

SHORT = Decoding(max_new_tokens=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert command(*quick(directory), "--quiet") == 0
    return directory


@pytest.fixture
def loaded(run: Path) -> tuple[Any, Any]:
    model, tokenizer = rn.load_tiny_model()
    return rn.ReftModel.from_pretrained(model, run / "adapter"), tokenizer


def test_generate(
    run: Path, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    question, settings = "Where does a bear live?", ("--max_new_tokens", 8, "--device", "cpu")
    expected = generate_texts(*loaded, [question], decoding=SHORT)
    with loaded[0].disabled():
        base = generate_texts(*loaded, [question], decoding=SHORT)
    capsys.readouterr()
    assert command("generate", run, "--prompt", question, "--compare", "--json", *settings) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"prompt": question, "base": base[0], "text": expected[0]}
    ]
    assert command("generate", run, "--prompt", question, *settings) == 0
    assert capsys.readouterr().out.strip() == expected[0].strip()
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text(json.dumps({"question": question, "note": 1}) + "\n")
    files = ("--input", asked, "--output", answered, "--column", "question")
    assert command("generate", run, *files, *settings) == 0
    [row] = [json.loads(line) for line in answered.read_text().splitlines()]
    assert row == {"question": question, "note": 1, "text": expected[0]}


def test_chat(
    run: Path,
    loaded: tuple[Any, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [expected] = generate_texts(*loaded, ["Where does a bear live?"], decoding=SHORT)
    monkeypatch.setattr("sys.stdin", io.StringIO("Where does a bear live?\n"))
    assert command("chat", run, "--max_new_tokens", 8, "--device", "cpu") == 0
    assert expected.strip() in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Where does a bear live?\n"))
    own = "Where? {prompt}\n"
    [expected] = generate_texts(
        *loaded, ["Where does a bear live?"], decoding=replace(SHORT, template=own)
    )
    drawn = ("--template", own, "--temperature", 1.5, "--top_k", 1)  # the most likely, as greedily
    assert command("chat", run, "--max_new_tokens", 8, "--device", "cpu", *drawn) == 0
    assert expected.strip() in capsys.readouterr().out


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("inspect", run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    model = rn.load_tiny_model()[0]
    assert len(found["units"]) == model.config.num_hidden_layers
    assert sum(unit["parameters"] for unit in found["units"]) == 4 * (2 * 4 * 128 + 4)
    assert command("inspect", run) == 0
    assert "tiny-chat" in capsys.readouterr().out


def test_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'reftnoise[plots]'")
    assert command("report", run, "--prompts", "Can a bee fly?", "--output_dir", tmp_path) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "report.html"
    assert "Can a bee fly?" in page.read_text(encoding="utf-8")


def test_eval_of_an_adapter_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    wanted = ("--evaluation.data", "tiny-chat", "--evaluation.split", "test[:8]")
    assert command("eval", adapter, *wanted, "--data.template", "chat", "--json") == 0
    [entry] = json.loads(capsys.readouterr().out)
    [of_run] = json.loads((run / "scores.json").read_text())
    assert entry["right"] == of_run["right"]
    (adapter / "reft_config.json").write_text("{}")
    assert command("eval", adapter, *wanted) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "reft_config.json: damaged or not an adapter's config" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "{run}"), "no prompts"),
        (("generate", "{run}", "--prompt", "a", "--top_p", 0.5), "needs a temperature above 0"),
        (("generate", "nowhere/at/all", "--prompt", "a"), "nowhere/at/all"),
        (("inspect", "nowhere"), "nowhere"),
        (("report", "nowhere"), "nowhere"),
        (("eval", "nowhere"), "expected the directory of a run or of an adapter"),
        (("train", "--seed", 1, "recipe.yaml"), "recipe.yaml: a file comes first"),
        (("train", "nowhere.yaml"), "no such file"),
        (("chat", "{run}", "--max_new_tokens", 0), "max_new_tokens 0: expected at least 1"),
        (("chat", "{run}", "--template", "alpacca"), "template 'alpacca': expected plain"),
        (("chat", "{run}", "--template", "plain", "--system", "a"), "system needs the template"),
        (("generate", "{run}", "--system_", "a"), "did you mean '--system'?"),
    ],
)
def test_mistakes(
    arguments: tuple[Any, ...], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*(str(one).replace("{run}", str(run)) for one in arguments)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("reftnoise: ")
    assert said in line


def test_a_section_that_is_a_text_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 2, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {rows}\n", encoding="utf-8")
    assert command("train", recipe) == 2
    message = f"train: data: expected a mapping, or a YAML file of one, got '{rows}'"
    assert capsys.readouterr().err == f"reftnoise: {message}\n"
