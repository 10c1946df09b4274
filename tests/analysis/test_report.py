"""Reports hold what the files say and what a direct measurement gives."""

import base64
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import reftnoise as rn
from reftnoise.analysis.report import write_report
from reftnoise.analysis.report.figures import common_label, printable
from support.report_directories import LOREFT, make_run, write_lines

PICTURES = {"loss", "learning_rate", "speed", "noise", "edits"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with its report."""
    directory = make_run(tmp_path_factory.mktemp("runs") / "a run")
    assert write_report(directory) == directory / "report.html"
    return directory


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def rows(page: str, first: str) -> list[list[str]]:
    """The table whose first column has this name, row by row."""
    tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    table = next(t for t in tables if re.search(r"<th[^>]*>(.*?)</th>", t)[1] == first)  # type: ignore[index]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>")[2:]]


def test_the_page_is_whole_and_loads_nothing(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<title>Run a run</title>" in page
    assert "loreft + symnoise on tiny-chat" in page
    assert headings(page) == [
        "Overview", "Scores", "Training", "Noise", "Edits", "Logit lens", "Generations", "Recipe",
    ]  # fmt: skip
    assert "<script" not in page
    assert "<link" not in page
    assert all(found.startswith("data:image/png") for found in re.findall(r'src="(.*?)"', page))
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page


def test_pictures_lie_beside_the_page_and_in_it(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    inside = re.findall(r'(srcset|src)="data:image/png;base64,(.*?)"', page)
    light = [base64.b64decode(data) for kind, data in inside if kind == "src"]
    dark = [base64.b64decode(data) for kind, data in inside if kind == "srcset"]
    files = {path.stem: path.read_bytes() for path in run.glob("*.png")}
    assert set(files) == PICTURES
    assert sorted(light) == sorted(files.values())
    for pngs, corner in ((light, (255, 255, 255)), (dark, (13, 17, 23))):
        for png in pngs:
            assert Image.open(io.BytesIO(png)).convert("RGB").getpixel((0, 0)) == corner
    assert len(dark) == len(light)


def test_numbers_of_the_files(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    # 4 layers, rank 4, width 128: 4 · (2 · 4 · 128 + 4)
    assert facts.pop("trained parameters") == "4,112"
    assert facts.pop("of the base&#39;s").endswith("%")
    assert facts == {"training time": "12.6 min", "tokens": "123,456", "peak memory": "3.00 GiB"}
    assert "date 2026-11-21, torch 2.13.0<" in page
    assert rows(page, "task") == [
        ["text", "tiny-chat test", "generation", "adapted", "12", "1.000", ""],
        ["text", "tiny-chat test", "generation", "base", "12", "0.000", ""],
        ["lm_eval/boolq", "", "", "adapted", "", "", "0.5000"],
    ]
    found = rows(page, "prompt")
    assert len(found) == 8
    question = rn.load_tiny_examples("test")[0]
    base = f"&lt;b&gt;{question.words}&lt;/b&gt;"
    assert found[0] == [question.prompt, base, question.completion, question.completion]
    assert "low_rank_dimension: 4" in page


def test_noise_is_measured_on_training_rows(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    found = {row[0]: row[1:] for row in rows(page, "model")}
    model, tokenizer = rn.load_tiny_model()
    examples = rn.load_tiny_examples("train")[:32]
    module = rn.make_last_position_supervised_data_module(
        tokenizer, model, [e.prompt for e in examples], [e.completion for e in examples],
        chat_template=True,
    )  # fmt: skip
    batch = module["data_collator"](list(module["train_dataset"]))
    adapted = rn.ReftModel.from_pretrained(model, run / "adapter")
    with torch.no_grad():
        losses = {"adapted": adapted(**batch).loss}
        batch.pop("prompt_lengths")
        losses["base"] = model(**batch).loss
    assert set(found) == {"base", "adapted"}
    for name, (clean, mean, low, high, difference) in found.items():
        assert float(clean) == pytest.approx(float(losses[name]), abs=2e-4)
        assert float(low) < float(mean) < float(high)
        given = float(difference.replace("−", "-"))
        assert given == pytest.approx(float(mean) - float(clean), abs=2e-4)


def test_the_lens_ends_with_the_models_own_prediction(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    last = rows(page, "layer")[-1]
    model, tokenizer = rn.load_tiny_model()
    chat = [{"role": "user", "content": rn.load_tiny_examples("test")[0].prompt}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    adapted = rn.ReftModel.from_pretrained(model, run / "adapter")
    with torch.no_grad():
        for logits, cell in (
            (model(**prompt).logits, last[1]),
            (adapted(**prompt).logits, last[4]),
        ):
            value, token = logits[0, -1].softmax(-1).max(-1)
            text = tokenizer.decode([int(token)]).replace(" ", "␣")
            assert cell == f"{text} {float(value):.0%}"


def test_prompts_another_adapter_and_another_folder(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", [LOREFT])
    prompts = ["Where does a bear live?", "What is 1 < 2?"]
    path = write_report(run, against=other, prompts=prompts, output_dir=tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    assert {found.stem for found in path.parent.glob("*.png")} == PICTURES | {"subspaces"}
    page = path.read_text(encoding="utf-8")
    assert "Subspaces" in headings(page)
    assert [row[0] for row in rows(page, "prompt")] == [prompts[0], "What is 1 &lt; 2?"]
    model, tokenizer = rn.load_tiny_model()
    chat = [{"role": "user", "content": prompts[0]}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    width = prompt["input_ids"].shape[1]
    expected = tokenizer.decode(tokens[0, width:], skip_special_tokens=True)
    assert rows(page, "prompt")[0][1] == expected.strip()


def test_what_a_run_does_not_have_is_left_out(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "bare", [{"layer": [0], "intervention": "bias"}])
    for name in ("log.jsonl", "summary.json", "scores.json", "predictions.jsonl"):
        (directory / name).unlink()
    assert headings(write_report(directory).read_text(encoding="utf-8")) == ["Recipe"]
    prompts = ["A"]
    page = write_report(directory, prompts=prompts).read_text(encoding="utf-8")
    assert headings(page) == ["Edits", "Logit lens", "Generations", "Recipe"]


def test_a_measurement_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "moved")
    recipe = directory / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8").replace("train: tiny-chat", "train: null")
    recipe.write_text(text, encoding="utf-8")
    page = write_report(directory).read_text(encoding="utf-8")
    assert "Not shown: the recipe names no training data." in page


def test_rows_of_a_stream_end(run: Path, tmp_path: Path) -> None:
    directory = tmp_path / "streamed"
    shutil.copytree(run, directory)
    recipe = directory / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8").replace("streaming: false", "streaming: true")
    recipe.write_text(text, encoding="utf-8")
    page = write_report(directory).read_text(encoding="utf-8")
    assert rows(page, "model") == rows((run / "report.html").read_text(encoding="utf-8"), "model")


def test_what_is_no_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a run .* or a study .* found neither"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text(encoding="utf-8"))
    with pytest.raises(FileNotFoundError, match="the run has no adapter"):
        write_report(tmp_path, prompts=["A"])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json: not JSON"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("[1]")
    with pytest.raises(ValueError, match=r"recipe.yaml: expected a mapping, got \[1\]"):
        write_report(tmp_path)


def test_a_run_whose_adapter_was_not_kept(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "cell")
    shutil.rmtree(directory / "adapter")
    page = write_report(directory).read_text(encoding="utf-8")
    assert headings(page) == [
        "Overview", "Scores", "Training", "Generations", "Adapter", "Recipe",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["another component", "a method of PEFT"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_adapters_that_cannot_be_compared(
    kind: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two runs, only the part about both is missing, and the page says why."""
    if kind == "another component":
        other = make_run(tmp_path / "other", [LOREFT | {"component": "mlp_output"}])
    else:
        pytest.importorskip("peft", reason="needs peft: pip install 'reftnoise[peft]'")
        other = tmp_path / "other"
        lora = {"peft_type": "lora", "r": 2, "target_modules": ["q_proj"]}
        config = rn.ReftConfig([], peft=lora)
        rn.get_reft_model(rn.load_tiny_model()[0], config).save_pretrained(other)
    output = tmp_path / "out"
    page = write_report(run, against=other, output_dir=output).read_text(encoding="utf-8")
    assert headings(page)[-2:] == ["Subspaces", "Recipe"]
    assert f"Not compared with {other}: no common site" in page
    assert not (output / "subspaces.png").exists()
    [record] = caplog.records
    assert "is not compared with" in record.getMessage()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "reftnoise.analysis.report.figures")
    with pytest.raises(ValueError, match=r"needs matplotlib: pip install 'reftnoise\[plots\]'"):
        importlib.import_module("reftnoise.analysis.report.figures")


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (["model.layers.0.output", "model.layers.11.output"], ("layer", ["0", "11"])),
        (["h.0.attn.output", "h.1.mlp.output"], ("site", ["0.attn", "1.mlp"])),
        (["wte.output", "h.0.output"], ("site", ["wte.output", "h.0.output"])),
        (["h.3.output"], ("site", ["h.3.output"])),
    ],
)
def test_labels_keep_what_differs(sites: list[str], expected: Any) -> None:
    assert common_label(sites) == expected


def test_tokens_that_a_font_lacks_are_boxes() -> None:
    assert [printable(t) for t in (" a\n", "🦊", "$x$", "a" * 20)] == [
        "·a↵", "□", "$x$", "a" * 13 + "…",
    ]  # fmt: skip


def test_numbers_that_are_none_or_infinite_are_drawn(tmp_path: Path) -> None:
    directory = tmp_path / "diverged"
    make_run(directory, [{"layer": [0], "intervention": "bias"}])
    lines = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 3.0}, {"step": 3}]
    write_lines(directory / "log.jsonl", lines)
    (directory / "predictions.jsonl").unlink()
    assert json.loads((directory / "log.jsonl").read_text().splitlines()[1])["loss"] == 3.0
    write_report(directory)
    assert (directory / "loss.png").is_file()


def test_a_logarithmic_axis_has_several_ticks() -> None:
    from reftnoise.analysis.report.figures import draw_lines

    for losses in ([0.2, 0.005], [9.0, 0.4], [3.0, 0.11]):
        figure = draw_lines({"training": list(enumerate(losses))}, "loss", may_be_log=True)
        figure.draw_without_rendering()
        [axes] = figure.axes
        assert axes.get_yscale() == "log"
        low, high = axes.get_ylim()
        assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_choices_are_not_called_generations(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "chosen"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter")
    path = copy / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for way, title in (("generation", "Generations"), ("likelihood", "Answers")):
        write_lines(path, [line | {"by": way} for line in lines])
        page = write_report(copy).read_text(encoding="utf-8")
        assert headings(page)[-3] == title
        assert ("choices that the models found most likely" in page) == (way == "likelihood")
    write_lines(path, [{"by": "loss", "adapter": True, "prompt": "", "answer": "", "loss": 1.0}])
    assert "Generations" not in headings(write_report(copy).read_text(encoding="utf-8"))
