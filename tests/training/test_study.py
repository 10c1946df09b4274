"""Studies: the cells of a grid, what is run again after a kill, and what is said of mistakes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from reftnoise._util.files import json_lines, json_text, read_lines
from reftnoise._util.options import read
from reftnoise.cli.main import main
from reftnoise.training.study.grid import Study, cells, merged
from reftnoise.training.study.results import read_results
from support.waiting import PATIENCE, wait_until

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
NEFTUNE = {"intervention": "neftune"}


def study(directory: Path, **changes: Any) -> dict[str, Any]:
    """Two noises and three seeds on the embedded model, in a few steps each."""
    values: dict[str, Any] = {
        "recipe": {
            "device": "cpu",
            "representations": [LOREFT],
            "data": {"train": "tiny-chat", "template": "chat"},
            "training": {"max_steps": 2, "learning_rate": 4e-3},
            "evaluation": {"data": "tiny-chat", "split": "test[:8]"},
        },
        "axes": {"noise": {"none": {}, "neftune": {"representations": [NEFTUNE]}}},
        "seeds": [0, 1, 2],
        "baseline": {},
        "threads": 1,
        "output_dir": str(directory),
    }
    return values | changes


def write(directory: Path, **changes: Any) -> Path:
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(study(directory / "out", **changes)))
    return path


# -- the grid ------------------------------------------------------------------------------------


def test_a_grid_is_every_level_with_every_other_and_every_seed(tmp_path: Path) -> None:
    axes = {"a": {"x": {}, "y": {}}, "b": {"u": {}, "v": {}, "w": {}}}
    found = [cell.levels for cell in cells(read(Study, study(tmp_path, axes=axes, seeds=[5, 6])))]
    assert found == [{"a": a, "b": b, "seed": seed} for seed in (5, 6) for a in "xy" for b in "uvw"]


def test_grids_choose_levels_and_overlap_once(tmp_path: Path) -> None:
    axes = {"a": {"x": {}, "y": {}}, "b": {"u": {}, "v": {}}}
    grids = [{"a": ["x"]}, {"b": ["v"]}]
    found = cells(read(Study, study(tmp_path, axes=axes, grids=grids, seeds=[0])))
    assert [tuple(cell.levels.values()) for cell in found] == [
        ("x", "u", 0),
        ("x", "v", 0),
        ("y", "v", 0),
    ]


def test_levels_join_units_and_merge_the_rest(tmp_path: Path) -> None:
    rules = [{"when": {"noise": ["neftune"]}, "then": {"training": {"learning_rate": 1e-2}}}]
    none, noise, *_ = cells(read(Study, study(tmp_path, rules=rules)))
    assert none.recipe.representations == [LOREFT]
    assert noise.recipe.representations == [LOREFT, NEFTUNE]
    assert none.recipe.training.learning_rate == 4e-3
    assert noise.recipe.training.learning_rate == 1e-2
    assert noise.recipe.training.max_steps == 2
    assert merged({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2]}}) == {
        "a": {"b": 1, "c": [2]},
        "d": 2,
    }


def test_a_key_is_of_what_decides_the_result(tmp_path: Path) -> None:
    def keys(**changes: Any) -> list[str]:
        return [cell.key for cell in cells(read(Study, study(tmp_path, **changes)))]

    assert len(set(keys())) == 6
    assert keys(jobs=2, output_dir="elsewhere") == keys()
    recipe = study(tmp_path)["recipe"]
    assert not set(keys(recipe=recipe | {"dtype": "float32"})) & set(keys())


def test_levels_that_look_alike_have_directories_of_their_own(tmp_path: Path) -> None:
    alike: dict[str, Any] = {"a-b": {}, "a": {"dtype": "float32"}, "a_b": {"dtype": "bfloat16"}}
    axes = {"x": alike, "y": {"c": {}, "b-c": {"quantization": {"a": 1}}, "b/c": {"task": "boolq"}}}
    found = cells(read(Study, study(tmp_path, axes=axes)))
    assert len({cell.name for cell in found}) == len(found) == 27
    assert all("/" not in cell.name for cell in found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"axes": {}}, "axes: expected at least one"),
        ({"axes": {"seed": {"x": {}}}, "baseline": {}}, "'seed' is always an axis"),
        ({"seeds": []}, "seeds []: expected at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"jobs": 0}, "jobs 0, threads 1: expected at least 1"),
        ({"baseline": {"nois": "none"}}, "did you mean 'noise'?"),
        ({"baseline": {"noise": "non"}}, "did you mean 'none'?"),
        ({"select": {"axis": "rat", "rows": 4}}, "select: no axis 'rat'"),
        ({"select": {"axis": "noise", "rows": 0}, "baseline": {}}, "select.rows 0: expected"),
        (
            {"select": {"axis": "noise", "rows": 4}, "baseline": {"noise": "none"}},
            "baseline: noise is selected; leave it out",
        ),
        (
            {"axes": {"a": {"x": {}}}, "select": {"axis": "a", "rows": 4}, "baseline": {}},
            "select: a is the only axis",
        ),
        ({"grids": [{"noise": ["loud"]}]}, "grids[0]: noise has no level 'loud'"),
        ({"rules": [{"when": {"noise": "none"}}]}, "rules"),
        ({"rules": [{"when": 3, "then": {}}]}, "rules"),
        ({"rules": [{"when": {"noise": "none"}, "then": {"seed": 1}}]}, "see seeds"),
        ({"axes": {"noise": {1e-3: {}}}}, "axes.noise: the level 0.001 is no text"),
        ({"axes": {"noise": {}}}, "axes.noise: expected at least one level"),
        ({"axes": {"noise": {"none": {"seed": 1}}}}, "see seeds"),
        ({"axes": {"noise": {"none": {"representations": 3}}}}, "expected a list"),
        ({"grids": [{"noise": []}]}, "grids[0]: noise has no level"),
        ({"axes": {"noise": {"none": {"sed": 1}}}}, "cell noise none: unknown key 'sed'"),
        ({"recipe": {"sed": 1}}, "did you mean 'seed'?"),
        ({"recipe": {"representations": [LOREFT]}}, "a study needs rows to score"),
        ({"axes": {"noise": {"none": {"task": "boolk"}}}}, "did you mean 'boolq'?"),
    ],
)
def test_a_study_that_does_not_fit_together(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(write(tmp_path, **changes))]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_lines_that_were_cut_off_count_for_none(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    path.write_text('{"a": "\u2028"}\n{"b": \n\n[1]\nnull\n{"c": 3}\n{"d"', encoding="utf-8")
    assert read_lines(path) == [{"a": "\u2028"}, {"c": 3}]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    def refused(constant: str) -> None:
        raise AssertionError(constant)

    value = {"loss": float("nan"), "scores": [{"a": float("-inf"), "b": 0.5}], "text": "é NaN"}
    expected = {"loss": None, "scores": [{"a": None, "b": 0.5}], "text": "é NaN"}
    assert json.loads(json_text(value, indent=2), parse_constant=refused) == expected
    path = tmp_path / "lines.jsonl"
    path.write_bytes(json_lines([value, value]))
    assert read_lines(path) == [expected, expected]


# -- runs ----------------------------------------------------------------------------------------


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "reftnoise", "study", str(path), "--quiet"]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, start_new_session=True)


def finish(path: Path) -> None:
    assert main(["study", str(path), "--quiet"]) == 0


def kill_after(path: Path, count: int) -> list[dict[str, Any]]:
    """Kill a study, and all its processes, when it has `count` results; what it had by then."""
    process = start(path)

    def has_enough() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return len(results_of(path)) >= count

    wait_until(has_enough)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return results_of(path)


def results_of(path: Path) -> list[dict[str, Any]]:
    return read_results(path.parent / "out")


def table(path: Path) -> list[str]:
    """The report's table, without times and memory, which differ from run to run."""
    rows = (path.parent / "out" / "results.md").read_text().splitlines()
    heads = [cell.strip() for cell in rows[0].split("|")]
    measured = {i for i, head in enumerate(heads) if "time" in head or "memory" in head}
    assert len(measured) == 2
    return [
        "|".join(cell for i, cell in enumerate(row.split("|")) if i not in measured) for row in rows
    ]


def test_a_study_that_is_killed_twice_runs_no_cell_again(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (
        write(tmp_path / name, jobs=jobs, seeds=[0, 1], baseline={"noise": "none"})
        for name, jobs in (("whole", 1), ("killed", 2))
    )
    finish(whole)
    first = kill_after(killed, 1)
    second = kill_after(killed, len(first) + 1)
    assert second[: len(first)] == first
    with (tmp_path / "killed" / "out" / "results.jsonl").open("a") as file:
        file.write('{"cell": {"noise": "no')  # a line that was being written
    finish(killed)
    last = results_of(killed)
    assert last[: len(second)] == second
    assert len(last) == len({line["key"] for line in last}) == 4
    measured = ("seconds", "peak_memory_bytes", "cell")

    def by_key(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        kept = [{n: v for n, v in line.items() if n not in measured} for line in lines]
        return {line["key"]: line for line in kept}

    assert by_key(last) == by_key(results_of(whole))
    assert table(killed) == table(whole)
    assert (tmp_path / "killed" / "out" / "report.html").exists()
    before = (tmp_path / "killed" / "out" / "results.jsonl").read_bytes()
    finish(killed)
    assert (tmp_path / "killed" / "out" / "results.jsonl").read_bytes() == before


def test_a_study_that_is_terminated_leaves_no_cell_running(tmp_path: Path) -> None:
    training = {"max_steps": 100_000, "learning_rate": 4e-3, "logging_steps": 1}
    path = write(tmp_path, recipe=study(tmp_path)["recipe"] | {"training": training})
    process = start(path)
    cells_of = tmp_path / "out" / "cells"
    wait_until(lambda: list(cells_of.glob("*/log.jsonl")))
    process.terminate()
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (130, "reftnoise: interrupted\n")
    wait_until(lambda: not is_running(process.pid))


def is_running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_cell_that_fails_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    too_high = {"representations": [LOREFT | {"layer": 99}]}
    axes = {"layer": {"far": too_high, "near": {}}}
    recipe = study(tmp_path)["recipe"] | {"representations": []}
    axes["layer"]["near"] = {"representations": [LOREFT]}
    path = write(tmp_path, recipe=recipe, axes=axes, seeds=[0])
    assert main(["study", str(path), "--quiet"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "1 of 2 cells failed; far-0-" in line
    assert "the model has layers 0 to" in line
    [result] = read_results(tmp_path / "out")
    assert result["cell"] == {"layer": "near", "seed": 0}
    [cell] = (tmp_path / "out" / "cells").glob("near-0-*")
    assert not (cell / "adapter").exists()


def test_what_a_study_says_is_what_a_run_says(tmp_path: Path) -> None:
    finish(write(tmp_path, seeds=[3], keep_adapters=True))
    _, noisy = read_results(tmp_path / "out")
    [cell], run = (tmp_path / "out" / "cells").glob("neftune-3-*"), tmp_path / "run"
    assert main(["train", str(cell / "recipe.yaml"), "--quiet", "--output_dir", str(run)]) == 0
    weights = Path("adapter", "reft_model.safetensors")
    assert (cell / weights).read_bytes() == (run / weights).read_bytes()
    [entry] = json.loads((run / "scores.json").read_text())
    assert (noisy["right"], noisy["scores"]) == (entry["right"], entry["scores"])
