"""A study's report: every number of its table from the cells themselves."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from report_directories import Line, make_study, write_lines

from reftnoise.report import write_report
from reftnoise.study.statistics import mean_interval, paired_difference


def lines_of(directory: Path) -> list[Line]:
    text = (directory / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def table(directory: Path) -> dict[tuple[str, ...], list[str]]:
    """results.md, by data, method and noise."""
    lines = (directory / "results.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    cells = [row for row in rows[2:] if len(row) > 3]
    return {("columns",): rows[0]} | {tuple(row[:3]): row[3:] for row in cells}


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
        "data", "method", "noise", "seeds", "accuracy", "95 % interval", "difference",
        "95 % interval", "p", "f1", "parameters", "time", "peak memory",
    ]  # fmt: skip
    assert list(found)[:4] == [
        ("trec", "loreft", "none"),
        ("trec", "loreft", "neftune"),
        ("trec", "loreft", "symnoise"),
        ("trec", "direft", "none"),
    ]
    assert len(found) == 12
    rest = ["0.35", "16,448", "41.0 s", "600 MiB"]
    plain = answers(study, data="boolq", method="direft", noise="none")
    interval = mean_interval(plain)
    shown = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
    assert found["boolq", "direft", "none"] == ["3", "50.0", shown, "–", "–", "–", *rest]
    better = answers(study, data="boolq", method="direft", noise="symnoise")
    difference = paired_difference(better, plain)
    row = found["boolq", "direft", "symnoise"]
    assert row[:2] == ["3", "70.0"]
    assert row[3:] == [
        "+20.0",
        f"+{100 * difference.low:.1f} to +{100 * difference.high:.1f}",
        "< 0.001",
        *rest,
    ]


def test_the_page_shows_the_same_with_pictures(study: Path) -> None:
    page = (study / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Results", "Differences to the baseline", "Seeds", "Study",
    ]  # fmt: skip
    assert {path.name for path in study.glob("*.png")} == {"differences.png", "seeds.png"}
    assert "12 combinations of data, method, noise" in page
    assert page.count('class="up">+20.0<') == 4
    assert "the combination with noise none and all else equal" in page
    assert "With few seeds (here 3 at least) intervals are too narrow." in page
    assert "baseline: {noise: none}" in page


def test_a_study_without_baseline_or_axes(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "plain", baseline="")
    kept = {"method": "loreft", "noise": "none", "data": "trec"}
    lines = [x for x in lines_of(directory) if kept.items() <= x["cell"].items()]
    write_lines(
        directory / "results.jsonl", [x | {"cell": {"seed": x["cell"]["seed"]}} for x in lines]
    )
    write_report(directory)
    lines_of_table = (directory / "results.md").read_text(encoding="utf-8").splitlines()
    assert lines_of_table[0].startswith("| seeds | accuracy | 95 % interval | f1 |")
    assert lines_of_table[2].startswith("| 3 | 50.0 |")
    assert {path.name for path in directory.glob("*.png")} == {"seeds.png"}


def test_a_study_that_is_not_finished(tmp_path: Path) -> None:
    """A cell that was run again, cells and baselines that are missing, a line being written."""
    directory = make_study(tmp_path / "going")
    lines = lines_of(directory)
    wanted = ("loreft", "symnoise", "trec")
    again = next(x for x in lines if tuple(x["cell"].values()) == (*wanted, 0))
    lines = [x for x in lines if tuple(x["cell"].values()) != ("loreft", "none", "trec", 2)]
    lines = [x for x in lines if (x["cell"]["noise"], x["cell"]["data"]) != ("none", "boolq")]
    write_lines(directory / "results.jsonl", [*lines, again | {"right": "1" * 50}])
    with (directory / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"cell": {"method":')
    write_report(directory)
    found = table(directory)
    first, second, third = answers(directory_without_tail(directory), **dict(
        zip(("method", "noise", "data"), wanted, strict=True)))[:3]  # fmt: skip
    assert found["trec", "loreft", "symnoise"][0] == "3"
    mean = (1 + second.mean() + third.mean()) / 3
    assert found["trec", "loreft", "symnoise"][1] == f"{100 * mean:.1f}"
    assert found["trec", "loreft", "symnoise"][3] == f"+{100 * ((0.5 + 0.2) / 2):.1f}"
    assert first.mean() == 0.7
    assert found["boolq", "loreft", "symnoise"][3:6] == ["–", "–", "–"]


def directory_without_tail(directory: Path) -> Path:
    path = directory / "results.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    return directory


def test_scores_without_answers(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "scores")
    lines = [{k: v for k, v in x.items() if k != "right"} for x in lines_of(directory)]
    write_lines(directory / "results.jsonl", lines)
    write_report(directory)
    assert table(directory)["trec", "loreft", "symnoise"][1:6] == ["70.0", "–", "–", "–", "–"]
    for x in lines:
        x["scores"] = {"matthews": 0.5}
    write_lines(directory / "results.jsonl", lines)
    write_report(directory)
    assert table(directory)["trec", "loreft", "none"][1:7] == ["–", "–", "–", "–", "–", "0.5"]


def test_what_is_wrong_with_a_study(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "wrong", baseline="baseline: {nois: none}\n")
    with pytest.raises(ValueError, match="baseline 'nois': the study has axes data, method, noise"):
        write_report(directory)
    with pytest.raises(ValueError, match=r"against: .* is a study; expected a run's directory"):
        write_report(directory, against=tmp_path)
    (directory / "study.yaml").unlink()
    lines = lines_of(directory)
    write_lines(directory / "results.jsonl", [*lines, lines[0] | {"right": "10"}])
    with pytest.raises(ValueError, match="its seeds have unequal numbers of items: 2, 50, 50"):
        write_report(directory)
    write_lines(directory / "results.jsonl", [])
    with pytest.raises(ValueError, match="no cell of the study is finished yet"):
        write_report(directory)
