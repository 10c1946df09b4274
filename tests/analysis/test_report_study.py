"""A study's report: every number of its table from the cells themselves."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from reftnoise.analysis.report import show_table, write_report, write_study_report
from reftnoise.training.recipe import EvaluationConfig, Recipe
from reftnoise.training.study.statistics import mean_interval, paired_difference
from support.report_directories import Line, make_study, write_lines


def lines_of(directory: Path) -> list[Line]:
    text = (directory / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def table(directory: Path, axes: int = 3) -> dict[tuple[str, ...], list[str]]:
    """results.md, by the levels of so many axes: data, method and noise."""
    lines = (directory / "results.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    cells = [row for row in rows[2:] if len(row) > 3]
    return {("columns",): rows[0]} | {tuple(row[:axes]): row[axes:] for row in cells}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_study(tmp_path_factory.mktemp("studies") / "noise")
    write_report(directory)
    return directory


def answers(directory: Path, **cell: str) -> np.ndarray:
    rows = [x["right"] for x in lines_of(directory) if cell.items() <= x["cell"].items()]
    return np.array([[letter == "1" for letter in row] for row in rows])


def test_every_number_of_a_row(study: Path) -> None:
    found = table(study)
    assert found.pop(("columns",)) == [
        "data", "method", "noise", "by", "seeds", "right", "95 % interval", "difference",
        "95 % interval", "p", "f1", "parameters", "time", "peak memory",
    ]  # fmt: skip
    assert list(found)[:3] == [
        ("trec", "loreft", "none"),
        ("trec", "loreft", "symnoise"),
        ("trec", "direft", "none"),
    ]
    assert len(found) == 8
    rest = ["0.3500", "16,448", "41.0 s", "600 MiB"]
    plain = answers(study, data="boolq", method="direft", noise="none")
    interval = mean_interval(plain)
    shown = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
    expected = ["generation", "3", "50.0", shown, "–", "–", "–", *rest]
    assert found["boolq", "direft", "none"] == expected
    better = answers(study, data="boolq", method="direft", noise="symnoise")
    difference = paired_difference(better, plain)
    row = found["boolq", "direft", "symnoise"]
    assert row[:3] == ["generation", "3", "70.0"]
    assert row[4:] == [
        "+20.0",
        f"+{100 * difference.low:.1f} to +{100 * difference.high:.1f}",
        "< 0.001",
        *rest,
    ]


def test_each_row_has_its_way(tmp_path: Path) -> None:
    recipes = {
        "likelihood": Recipe(evaluation=EvaluationConfig(by="likelihood")),
        "head": Recipe(task={"name": "glue", "subset": "rte"}),
    }
    for way, recipe in recipes.items():
        directory = make_study(tmp_path / way, ("method",), recipe)
        write_report(directory)
        columns, *rows = table(directory, axes=1).values()
        assert columns[1] == "by"
        assert [row[0] for row in rows] == [way] * 2


def test_the_page_shows_the_same_with_pictures(study: Path) -> None:
    page = (study / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Results", "Differences to the baseline", "Seeds", "Study",
    ]  # fmt: skip
    assert {path.name for path in study.glob("*.png")} == {"differences.png", "seeds.png"}
    assert "8 combinations of data, method, noise" in page
    assert page.count('class="up">+20.0<') == 4
    assert "the combination with noise none and all else equal" in page
    assert "Intervals of few seeds (here 3) are too narrow." in page
    assert "baseline:\n  noise: none\n" in page


def test_a_study_without_baseline(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "plain", axes=("method",))
    write_report(directory)
    lines = (directory / "results.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| method | by | seeds | right | 95 % interval | f1 |")
    assert lines[2].startswith("| loreft | generation | 3 | 50.0 |")
    assert {path.name for path in directory.glob("*.png")} == {"seeds.png"}


def test_a_study_that_is_not_finished(tmp_path: Path) -> None:
    """Seeds and baselines that are missing, a stale result, a line that is being written."""
    directory = make_study(tmp_path / "going", axes=("noise", "data"))

    def is_done(line: Line) -> bool:
        noise, data, seed = line["cell"].values()
        return noise != "none" or (data == "trec" and seed != 2)

    lines = [line for line in lines_of(directory) if is_done(line)]
    stale = {"cell": {"noise": "old"}, "key": "of a recipe that was changed"}
    write_lines(directory / "results.jsonl", [stale, *lines])
    with (directory / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"cell": {"method":')
    before = (directory / "results.jsonl").read_bytes()
    write_report(directory)
    assert (directory / "results.jsonl").read_bytes() == before
    assert "4 cells are not finished." in (directory / "results.md").read_text(encoding="utf-8")
    found = table(directory, 2)
    assert len(found) == 1 + 3
    assert found["trec", "none"][1:3] == ["2", "50.0"]
    assert found["trec", "symnoise"][1:3] == ["3", "70.0"]
    assert found["trec", "symnoise"][4] == "+20.0"
    assert found["boolq", "symnoise"][4:7] == ["–", "–", "–"]


def test_the_table_in_a_terminal(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "shown")
    page, made = write_study_report(directory)
    assert page == directory / "report.html"

    def shown(**console: Any) -> list[list[str]]:
        file = io.StringIO()
        show_table(made, Console(file=file, **console))
        lines = file.getvalue().splitlines()
        assert all(len(line) <= console.get("width", 200) for line in lines)
        return [re.split(r"  +", line.strip()) for line in lines]

    whole = [made.columns, *[[cell.text for cell in row] for row in made.rows]]
    assert shown() == whole
    narrow = shown(force_terminal=True, color_system=None, width=60)
    assert narrow[1] == whole[1][: len(narrow[0])]
    assert 3 < len(narrow[0]) < len(made.columns)
    assert any(line[0].startswith("The report also has") for line in narrow)


def test_scores_without_answers(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "scores", axes=("noise",))
    lines = [{k: v for k, v in x.items() if k != "right"} for x in lines_of(directory)]
    write_lines(directory / "results.jsonl", lines)
    write_report(directory)
    found = table(directory, 1)
    assert found["columns",][8:10] == ["accuracy", "f1"]
    assert found["symnoise",][2:9] == ["–", "–", "–", "–", "–", "0.7000", "0.3500"]
    assert not list(directory.glob("*.png"))


def test_losses(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "losses", axes=("noise",))
    better = {"none": [1.0, 2.0, 1.5], "symnoise": [0.5, 1.5, 0.875]}
    lines = lines_of(directory)
    for line in lines:
        del line["right"]
        line["losses"] = better[line["cell"]["noise"]]
        line["scores"] = {"loss": sum(line["losses"]) / 3}
    write_lines(directory / "results.jsonl", lines)
    page = write_report(directory).read_text(encoding="utf-8")
    found = table(directory, 1)
    assert found["columns",][3] == "loss"
    assert "loss" not in found["columns",][4:]
    assert found["none",][2] == "1.500"
    assert found["symnoise",][2] == "0.9583"
    assert found["symnoise",][4:6] == ["−0.542", "−0.625 to −0.500"]
    # The lower loss is the better one.
    assert '<td class="up">−0.542</td>' in page
    assert "nats per token" in page


@pytest.mark.parametrize("name", ["right", "losses"])
def test_the_level_that_is_best_on_the_first_rows(tmp_path: Path, name: str) -> None:
    """Noise and loss pull apart: what is best on the first rows is worse on the others."""
    directory = make_study(tmp_path / "tuned", axes=("method", "noise"))
    first = {"loreft": {"none": 1, "symnoise": 3}, "direft": {"none": 3, "symnoise": 2}}
    others = {"loreft": {"none": 4, "symnoise": 2}, "direft": {"none": 3, "symnoise": 4}}
    lines = lines_of(directory)
    for line in lines:
        method, noise = line["cell"]["method"], line["cell"]["noise"]
        rows = [n < first[method][noise] for n in range(4)]
        rows += [n < others[method][noise] for n in range(8)]
        del line["right"]
        if name == "right":
            line["right"] = "".join("01"[row] for row in rows)
        else:
            line["losses"] = [1.0 - row for row in rows]
    write_lines(directory / "results.jsonl", lines)
    path = directory / "study.yaml"
    text = path.read_text(encoding="utf-8").replace(
        "select: null", "select: {axis: noise, rows: 4}"
    )
    path.write_text(text.replace("noise: none", "method: direft"), encoding="utf-8")
    page = write_report(directory).read_text(encoding="utf-8")
    found = table(directory, 2)
    columns = found.pop(("columns",))
    assert columns[:4] == ["method", "noise", "by", "seeds"]
    assert "accuracy" not in columns  # which is of all rows
    shown = {"right": ["25.0", "37.5", "−12.5"], "losses": ["0.7500", "0.6250", "+0.125"]}[name]
    assert [list(found), found["loreft", "symnoise"][2], found["direft", "none"][2]] == [
        [("loreft", "symnoise"), ("direft", "none")],
        *shown[:2],
    ]
    assert found["loreft", "symnoise"][4] == shown[2]
    assert "best on the first 4 scored rows" in page
    path.write_text(path.read_text(encoding="utf-8").replace("rows: 4", "rows: 12"))
    with pytest.raises(ValueError, match=r"select\.rows 12: loreft, none has no more"):
        write_report(directory)


@pytest.mark.parametrize("fault", ["missing", "null", "nan"])
def test_a_level_that_diverged_with_a_seed_is_not_chosen(tmp_path: Path, fault: str) -> None:
    directory = make_study(tmp_path / "lucky", axes=("method", "noise"))
    kept = []
    for line in lines_of(directory):
        del line["right"]
        is_lucky = line["cell"]["noise"] == "symnoise"
        line["losses"] = [0.5 if is_lucky else 1.0] * 8
        if is_lucky and line["cell"]["seed"] != 0:
            if fault == "missing":
                continue
            line["losses"][3] = None if fault == "null" else float("nan")
        kept.append(line)
    write_lines(directory / "results.jsonl", kept)
    path = directory / "study.yaml"
    text = path.read_text(encoding="utf-8").replace(
        "select: null", "select: {axis: noise, rows: 4}"
    )
    path.write_text(text.replace("noise: none", "method: direft"), encoding="utf-8")
    page = write_report(directory).read_text(encoding="utf-8")
    rows = table(directory, 2)
    assert set(rows) == {("columns",), ("loreft", "none"), ("direft", "none")}
    assert rows["loreft", "none"][1:3] == ["3", "1.000"]
    assert ("4 cells have losses that are not finite" in page) is (fault != "missing")


def test_answers_that_no_level_can_be_chosen_by(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "numbers", axes=("method", "noise"))
    lines = lines_of(directory)
    for line in lines:
        del line["right"]
    write_lines(directory / "results.jsonl", lines)
    path = directory / "study.yaml"
    text = path.read_text(encoding="utf-8").replace(
        "select: null", "select: {axis: noise, rows: 4}"
    )
    path.write_text(text.replace("noise: none", "method: direft"), encoding="utf-8")
    with pytest.raises(ValueError, match="select: loreft, none has no right or wrong by row"):
        write_report(directory)


def test_what_is_wrong_with_a_study(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "wrong", axes=("noise",))
    with pytest.raises(ValueError, match=r"against: .* is a study; expected a run's directory"):
        write_report(directory, against=tmp_path)
    lines = lines_of(directory)
    write_lines(directory / "results.jsonl", [*lines, lines[0] | {"right": "10"}])
    with pytest.raises(ValueError, match="its seeds have unequal numbers of items: 2, 50, 50"):
        write_report(directory)
    write_lines(directory / "results.jsonl", [])
    with pytest.raises(ValueError, match="no cell of the study is finished yet"):
        write_report(directory)
    text = (directory / "study.yaml").read_text(encoding="utf-8")
    (directory / "study.yaml").write_text(text.replace("noise: none", "nois: none"))
    with pytest.raises(ValueError, match="baseline: no axis 'nois'"):
        write_report(directory)
