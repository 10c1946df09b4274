"""The benchmark measures real steps and writes what it measured."""

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import Budget
from generation import GENERATIONS
from measure import Times, interleaved, own_share
from methods import METHODS, Bench, Step
from PIL import Image
from report import exponent
from run import benchmark
from running import NEEDS
from suites import GUIDE, REAL_SHAPES, gpu_suite, model_suite
from whole_runs import RUNS, Rows
from workload import SHAPES, Case, Workload

import reftnoise as rn
from reftnoise.cli.main import main, run
from support.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

SMALL = Workload(hidden_size=64, layers=2, vocabulary=128, batch_size=2, prompt=12, completion=4)
FLAGS = [f"--work.{name}={value}" for name, value in vars(SMALL).items() if value is not None]
FOLDER = Path(__file__).parents[2] / "examples" / "benchmark"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds without collections, which take the most time here."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def bench(*arguments: str) -> int:
    return run(benchmark, arguments, prog="python examples/benchmark")


def test_the_program(tmp_path: Path) -> None:
    flags = [*FLAGS, "--methods=[floor,plain]", "--rounds=2", f"--output_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, FOLDER, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "plain" in done.stdout


def test_the_old_command_says_where_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--rounds", "3"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "python examples/benchmark" in line


@pytest.mark.parametrize("positions", ["l1", "f3+l3"])
def test_every_side_has_the_loss_of_its_method(positions: str) -> None:
    bench = Bench(Workload(**vars(SMALL) | {"positions": positions}))
    others = ("pyreft", "compiled", "compiled_lora")
    methods = [method for method in METHODS if method not in others]
    steps = {method: METHODS[method](bench) for method in methods}
    for _ in range(2):  # the second time, prompts are reused
        losses = {method: float(step()) for method, step in steps.items()}
        bare = float(bench.base(**bench.batch).loss)
        # LoRA starts as the base; the edits do not, and are the same however they are run.
        assert_close([losses["floor"], losses["lora"]], [bare] * 2)
        assert_close([losses["split"], losses["reuse"]], [losses["plain"]] * 2)
        assert len({losses["floor"], losses["plain"], losses["neftune"], losses["symnoise"]}) == 4
    assert not any(parameter.requires_grad for parameter in bench.base.parameters())
    assert not any(module._forward_hooks for module in bench.base.modules())


@pytest.mark.skipif(importlib.util.find_spec("pyreft") is None, reason="needs pyreft 0.1.0")
def test_pyreft_edits_beside() -> None:
    bench = Bench(SMALL)
    bare = float(bench.base(**bench.batch).loss)
    loss = float(METHODS["pyreft"](bench)())
    assert loss != bare
    assert loss == pytest.approx(bare, rel=0.1)


def test_the_floor_goes_back_to_the_first_edited_layer() -> None:
    bench = Bench(Workload(**vars(SMALL) | {"edited": "1-1"}))
    reached = []
    for index, layer in enumerate(bench.base.model.layers):
        layer.mlp.register_full_backward_hook(lambda *_, index=index: reached.append(index))
    METHODS["floor"](bench)()
    assert reached == []
    bench = Bench(SMALL)
    for index, layer in enumerate(bench.base.model.layers):
        layer.mlp.register_full_backward_hook(lambda *_, index=index: reached.append(index))
    METHODS["floor"](bench)()
    assert reached == [1]


@pytest.mark.filterwarnings("ignore:Profiler clears events:UserWarning")
def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = "--methods=[floor,plain,split,lora]"
    code = bench(*FLAGS, methods, "--rounds=3", f"--output_dir={tmp_path}")
    printed = capsys.readouterr().out
    assert code == 0
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["machine"]["torch"] == metadata.version("torch")
    assert [row["method"] for row in written["rows"]] == ["floor", "plain", "split", "lora"]
    for row in written["rows"]:
        assert row["tokens_per_second"] == pytest.approx(SMALL.tokens / row["seconds"])
        assert row["method"] in printed
    assert all(0 < row["own_share"] < 1 for row in written["rows"][1:3])
    table = (tmp_path / "results.md").read_text(encoding="utf-8").splitlines()
    assert table[0] == "| | floor | plain | split | lora |"
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[0] == str(SMALL)
    assert float(cells[4]) == pytest.approx(written["rows"][3]["ratio"], abs=0.0005)
    assert "torch " + metadata.version("torch") in table[-1]
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.width > 500


def test_varying_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--vary=rank", "--values=[1,2]", "--methods=[floor,split]", "--rounds=2"]
    assert bench(*FLAGS, *arguments, f"--output_dir={tmp_path}") == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["method"], row["rank"]) for row in rows] == [
        ("floor", 1),
        ("split", 1),
        ("floor", 2),
        ("split", 2),
    ]
    assert "split: time grows with rank to the power of" in capsys.readouterr().out
    assert (tmp_path / "results.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=[floor,slower]"], "methods slower: expected floor, plain"),
        (["--vary=positions", "--values=[1]"], "vary 'positions' over [1]: expected values and"),
        (["--vary=rank"], "vary 'rank' over []: expected values and"),
        (["--values=[1]"], "values [1]: expected vary, too"),
        (["--rounds=1"], "rounds 1: expected at least 2"),
        (["--generation=[bass]"], "generation bass: expected base, prompt"),
        (["--work.model=x", "--work.shape=toy"], "model 'x': expected no shape, got 'toy'"),
        (["--method"], "did you mean '--methods'?"),
        (["--work.hidden_size=65"], "hidden_size 65: expected a multiple of 64"),
    ],
)
def test_what_it_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*arguments, f"--output_dir={tmp_path / 'out'}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generation_is_measured(tmp_path: Path) -> None:
    methods = ["base", "prompt", "addition", "loreft", "adapter", "adapters", "lora"]
    arguments = [f"--generation=[{','.join(methods)}]", "--rounds=2"]
    assert bench(*FLAGS, *arguments, f"--output_dir={tmp_path}") == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    tokens = {"prefill": 2 * 12, "decode": 2 * 4, "generate": 2 * 5}
    measured = [(row["phase"], row["method"]) for row in rows]
    assert measured == [(phase, method) for phase in tokens for method in methods]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(tokens[row["phase"]] / row["seconds"])
        assert row["is_ours"] == (row["method"] not in ("base", "lora"))
    table = (tmp_path / "results.md").read_text(encoding="utf-8").splitlines()
    assert table[0] == "| | " + " | ".join(methods) + " |"


def test_whole_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model": "tiny-chat", "batch_size": 2, "prompt": 4, "completion": 2}
    flags = [f"--work.{name}={value}" for name, value in sizes.items()]
    assert bench(*flags, "--runs=[bare,train]", f"--output_dir={tmp_path}") == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["phase"], row["method"]) for row in rows] == [("run", "bare"), ("run", "train")]
    assert all(row["seconds"] > 0 for row in rows)
    assert bench(*FLAGS, "--runs=[bare]", f"--output_dir={tmp_path}") == 2
    assert "runs: expected work.model" in capsys.readouterr().err


def test_a_run_trains_what_the_bare_loop_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whole_runs._STEPS", 1)  # one batch: its order does not matter
    rows = Rows(Workload(model="tiny-chat", batch_size=3, prompt=4, completion=2), tmp_path)
    RUNS["bare"](rows)()
    RUNS["train"](rows)()
    bare, trained = (
        rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], rows.folder / name).state_dict()
        for name in ("bare", "run/adapter")
    )
    for name, value in bare.items():
        assert_close(trained[name], value)


def test_the_table_of_a_model_with_its_own_weights() -> None:
    cases = model_suite(Workload(model="smollm2"))
    shown = {(case.kind, case.work.dtype, case.work.completion) for case in cases}
    assert {("training", "float32", 16), ("training", "float32", 64)} < shown
    assert {("generation", "float32", 64), ("run", "float32", 16)} < shown


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []
    steps: dict[str, Any] = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved(steps, rounds=3, device="cpu", warmup=1)
    assert "".join(calls) == "abababab"
    assert len(times["a"].seconds) == 3


def test_the_median_and_half_the_distance_of_the_quartiles() -> None:
    times = Times((1.0, 2.0, 3.0, 4.0, 100.0))
    assert times.median == 3.0
    assert times.spread == pytest.approx((52.0 - 1.5) / 2)


def test_the_exponent_of_a_power_law() -> None:
    values = [1, 2, 4, 8]
    assert exponent(values, [3 * v**1.5 for v in values]) == pytest.approx(1.5)


def test_the_share_of_our_own_code_is_none_of_the_floors() -> None:
    bench = Bench(SMALL)
    ours = own_share(METHODS["plain"](bench), repeats=2)
    assert 0 < ours < 1
    # The floor runs none of the marked functions, and accumulates no gradient but of one state.
    assert own_share(METHODS["floor"](bench), repeats=2) < 0.05


def test_peak_memory_counts_the_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 64, "layers": 1, "vocabulary": 30_000, "batch_size": 8}
    sizes |= {"prompt": 60, "completion": 4}
    flags = [f"--work.{name}={value}" for name, value in sizes.items()]
    flags += ["--methods=[plain,split]", "--rounds=2", f"--output_dir={tmp_path}"]
    assert bench(*flags, "--memory") == 0
    assert "peak memory" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    whole, part = (row["peak_bytes"] for row in rows)
    logits = 8 * 64 * 30_000 * 4
    assert whole > logits
    assert part < whole - logits


def test_workloads_are_told_apart() -> None:
    known = {"training": METHODS, "generation": GENERATIONS}
    for suite in (GUIDE, gpu_suite(REAL_SHAPES, "cuda"), gpu_suite(["toy"], "cpu")):
        names = [(case.kind, str(case)) for case in suite]
        assert len(set(names)) == len(names)
        for case in suite:
            assert set(case.methods) <= set(known[case.kind])
    assert set(NEEDS) <= set(METHODS)
    assert all(SHAPES[shape]["num_hidden_layers"] > 30 for shape in REAL_SHAPES)


def test_the_table_of_a_gpu_on_toys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Shape checks cannot be compiled, and other tests compile.
    monkeypatch.setattr("torch.compile", lambda model, **_: model)
    monkeypatch.setitem(METHODS, "lora", out_of_memory)
    cases = gpu_suite(["toy"], "cpu")[:6]  # which include every kind
    monkeypatch.setattr("run.gpu_suite", lambda *_: cases)
    assert bench("--shapes=[toy]", "--seconds=600", f"--output_dir={tmp_path}") == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert "skipped" not in capsys.readouterr().out
    phases = {"training": 1, "generation": 3}
    has_pyreft = importlib.util.find_spec("pyreft") is not None
    methods = [
        method
        for case in cases
        for method in case.methods * phases[case.kind]
        if has_pyreft or method != "pyreft"
    ]
    assert sorted(row["method"] for row in rows) == sorted(methods)
    for row in rows:
        if row["kind"] == "training" and row["method"] == "lora":
            assert row["error"] == "out of memory"
        else:
            assert "seconds" in row
    assert "out of memory" in (tmp_path / "results.md").read_text(encoding="utf-8")


def out_of_memory(_: Bench) -> Step:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


def test_an_error_of_all_methods_is_the_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "floor", out_of_memory)
    assert bench(*FLAGS, "--methods=[floor]", f"--output_dir={tmp_path}") == 2
    assert "floor: out of memory" in capsys.readouterr().err


def test_an_aborted_run_keeps_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def abort(_: Bench) -> Step:
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "plain", abort)
    cases = [Case("training", SMALL, (method,), rounds=2) for method in ("floor", "plain")]
    monkeypatch.setattr("run.GUIDE", cases)
    assert bench(f"--output_dir={tmp_path}") == 130
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["floor"]


def test_cases_that_the_time_left_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    budget = Budget(100)
    short, long = (Case("training", SMALL, (), seconds=seconds) for seconds in (10, 60))
    assert budget.holds(long)
    with budget.spending(short):
        now[0] += 20  # twice what it says
    assert budget.holds(short)
    assert not budget.holds(long)
    assert Budget(None).holds(long)


def test_no_round_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def slow() -> None:
        now[0] += 10

    times = interleaved({"a": slow}, rounds=9, device="cpu", warmup=1, deadline=25)
    assert len(times["a"].seconds) == 2
    failures: dict[str, Exception] = {}
    late = interleaved(
        {"a": slow, "b": slow}, rounds=2, device="cpu", deadline=35, failed=failures.setdefault
    )
    assert list(late) == ["a"]
    assert isinstance(failures["b"], TimeoutError)
