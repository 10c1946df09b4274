"""Run workloads and report them."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import report
import torch
from budget import Budget
from generation import GENERATIONS
from methods import METHODS
from rich.console import Console
from running import rows_of
from suites import GUIDE, REAL_SHAPES, RUN_ROUNDS, gpu_suite, model_suite
from whole_runs import LOAD, RUNS
from workload import SHAPES, Case, Shape, Workload


def benchmark(
    work: Workload | None = None,
    vary: str | None = None,
    values: list[int] | None = None,
    methods: list[str] | None = None,
    generation: list[str] | None = None,
    runs: list[str] | None = None,
    shapes: list[Shape] | None = None,
    rounds: int = 7,
    threads: int = 1,
    memory: bool = False,
    operations: bool = False,
    seconds: float | None = None,
    device: str = "cpu",
    output_dir: str = "reftnoise-bench",
) -> None:
    """Measure training steps and generation, and the floor, LoRA, NEFTune and pyreft as well.

    The floor is the frozen base's forward pass, with logits everywhere, and the backward pass down
    to the first edited layer's output. Without work, vary, methods, generation and runs, a whole
    table is measured: on the CPU in about a quarter of an hour, on a GPU in the given seconds. With
    work.model alone, a table of that model is.

    Args:
        work: workload that is measured instead of the table.
        vary: number of the workload that takes each of `values`, such as rank or layers.
        values: numbers for `vary`.
        methods: methods of a training step: some of floor, plain, split, reuse, symnoise, r3f,
            compiled, lora, neftune, compiled_lora, pyreft; by default all that are not compiled.
        generation: methods that generate: some of base, prompt, addition, loreft, adapter,
            adapters, lora, pyreft, compiled_base, compiled_prompt, compiled_addition,
            compiled_loreft.
        runs: whole training runs after the base is loaded: some of bare, train.
        shapes: shapes for the GPU's table, some of llama-3-8b, qwen3-4b and toy.
        rounds: interleaved measurements of each method; 0 to count operations alone.
        threads: threads of torch.
        memory: whether each method's peak memory is measured, too, on the CPU in a process of its
            own.
        operations: whether each method's operations are counted, too.
        seconds: time for the table; cases that would take longer than what is left are skipped.
        device: cpu or cuda, for the table.
        output_dir: directory for results.json, results.md and results.png.
    """
    budget = Budget(seconds)
    values, methods, generation, runs = values or [], methods or [], generation or [], runs or []
    _check(methods, generation, runs, shapes or [], rounds, threads, vary, values)
    device = device if work is None else work.device
    is_table = vary is None and not (methods or generation or runs)
    cases: Sequence[Case]
    if is_table and work is None:
        is_guide = device == "cpu" and shapes is None
        cases = GUIDE if is_guide else gpu_suite(shapes or REAL_SHAPES, device)
    elif is_table and work and work.model and work == Workload(model=work.model, device=device):
        cases = model_suite(work)
    else:
        works = _works(work or Workload(device=device), vary, values)
        cases = list(_cases(works, methods, generation, runs, memory, operations))
    torch.set_num_threads(threads)
    console, folder = Console(), Path(output_dir)
    console.width = max(console.width, 100)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[report.Measurement] = []
    for case in cases:
        if not budget.holds(case):
            console.print(f"skipped {case.kind} for lack of time: {case}")
            continue
        decided = replace(case, rounds=rounds if case.rounds is None else case.rounds)
        with budget.spending(case):
            measured = rows_of(decided, deadline=budget.deadline, say=console.print)
        report.print_tables(measured, console)
        rows += measured
        report.write(folder, rows, device)
    if rows and all("error" in row for row in rows):
        raise ValueError(f"{rows[0]['method']}: {rows[0]['error']}")
    _draw([row for row in rows if "seconds" in row], vary, folder, console)
    console.print(f"written to {folder}")


def _check(
    methods: Sequence[str],
    generation: Sequence[str],
    runs: Sequence[str],
    shapes: Sequence[str],
    rounds: int,
    threads: int,
    vary: str | None,
    values: Sequence[int],
) -> None:
    if values and vary is None:
        raise ValueError(f"values {list(values)!r}: expected vary, too, the number that takes them")
    for name, chosen, known in (
        ("methods", methods, METHODS),
        ("generation", generation, GENERATIONS),
        ("runs", runs, [name for name in RUNS if name != LOAD]),
        ("shapes", shapes, SHAPES),
    ):
        if unknown := set(chosen) - set(known):
            raise ValueError(f"{name} {', '.join(sorted(unknown))}: expected {', '.join(known)}")
    if threads < 1:
        raise ValueError(f"threads {threads}: expected at least 1")
    if rounds < 0 or rounds == 1:
        raise ValueError(f"rounds {rounds}: expected at least 2, for a spread, or 0 for none")


def _works(work: Workload, vary: str | None, values: Sequence[int]) -> list[Workload]:
    if vary is None:
        return [work]
    numbers = [name for name, value in asdict(work).items() if type(value) is int]
    if vary not in numbers or not values:
        raise ValueError(f"vary {vary!r} over {values!r}: expected values and {', '.join(numbers)}")
    return [Workload(**{**asdict(work), vary: value}) for value in values]


def _cases(
    works: Sequence[Workload],
    methods: Sequence[str],
    generation: Sequence[str],
    runs: Sequence[str],
    memory: bool,
    operations: bool,
) -> Iterator[Case]:
    if not (methods or generation or runs):
        methods = [method for method in METHODS if not method.startswith("compiled")]
    for work in works:
        if methods:
            yield Case("training", work, tuple(methods), memory, operations)
        if generation:
            yield Case("generation", work, tuple(generation), False, operations)
        if runs:
            yield Case("run", work, tuple(runs), rounds=RUN_ROUNDS)


def _draw(
    rows: Sequence[report.Measurement], vary: str | None, folder: Path, console: Console
) -> None:
    if not rows:
        return
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no picture: pip install matplotlib")
    elif vary is not None:
        report.draw_lines(folder / "results.png", rows, vary)
    else:
        report.draw_bars(folder / "results.png", rows)
    if vary is None:
        return
    for name in dict.fromkeys((row["phase"], row["method"]) for row in rows):
        own = [row for row in rows if (row["phase"], row["method"]) == name]
        if len(own) > 1:
            slope = report.exponent([r[vary] for r in own], [r["seconds"] for r in own])
            phase = "" if name[0] == "training" else f"{name[0]}, "
            console.print(f"{phase}{name[1]}: time grows with {vary} to the power of {slope:.2f}")
