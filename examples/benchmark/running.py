"""One case: times, memory and operations of its methods, as rows."""

import functools
import gc
import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from generation import GENERATIONS
from measure import Failed, Times, interleaved, own_share, peak_bytes
from methods import METHODS, Bench, Step
from operations import count_case
from report import Measurement
from whole_runs import LOAD, RUNS, Rows
from workload import Case

NEEDS = {"lora": "peft", "neftune": "peft", "compiled_lora": "peft", "pyreft": "pyreft"}
OTHERS = ("floor", "base", "compiled_base", "bare", *NEEDS)
PHASES = {
    "training": ("training",),
    "generation": ("prefill", "decode", "generate"),
    "run": ("run",),
}
_INSTALL = {"peft": "pip install peft", "pyreft": "pip install --no-deps pyreft==0.1.0"}
_PROFILED = ("plain", "split")

S = TypeVar("S")
T = TypeVar("T")
Measured = dict[tuple[str, str], Measurement]
"""What was measured, by phase and method."""


def rows_of(case: Case, *, deadline: float, say: Callable[[str], None]) -> list[Measurement]:
    """What is measured of a case, phase for phase. A method's error is a row, and others go on.

    Args:
        case: the case, its rounds decided; without rounds, operations alone are counted.
        deadline: time of `time.monotonic` after which no round begins.
        say: prints a line.
    """
    methods = _installed(case.methods, say)
    errors: dict[str, str] = {}

    def failed(method: str, error: Exception) -> None:
        lines = str(error).strip().splitlines() or [""]
        errors[method] = f"{type(error).__name__}: {lines[0]}"
        if "out of memory" in lines[0]:
            errors[method] = "out of memory"
        say(f"{method}: {errors[method]}")

    measured = _times(case, methods, deadline, failed) if case.rounds else {}
    gc.collect()  # the bases, before those of the next case
    torch.compiler.reset()
    if case.operations or not case.rounds:
        _count(case, [method for method in methods if method not in errors], failed, measured)
    first = next((method for method in methods if method not in errors), methods[0])
    facts = {**asdict(case.work), "kind": case.kind, "first": first}
    rows = []
    for phase in PHASES[case.kind]:
        for method in methods:
            row = {"error": errors[method]} if method in errors else measured.get((phase, method))
            if row is not None:
                names = {"phase": phase, "method": method, "is_ours": method not in OTHERS}
                rows.append({**facts, "case": _title(case, phase), **names, **row})
    return rows


def _installed(methods: Sequence[str], say: Callable[[str], None]) -> list[str]:
    available = []
    for method in methods:
        package = NEEDS.get(method)
        if package is None or importlib.util.find_spec(package) is not None:
            available.append(method)
        else:
            say(f"without {method}: {_INSTALL[package]}")
    if not available:
        raise ValueError(f"none of the methods {', '.join(methods)} is installed")
    return available


def _title(case: Case, phase: str) -> str:
    tokens = {"prefill": case.work.prompt, "decode": case.work.completion}
    whole = {"training": "", "generate": "prefill and decode, ", "run": "a run, "}
    start = whole.get(phase, f"{phase} of {tokens.get(phase)} tokens, ")
    return f"{start}{case}"


# -- times and memory ----------------------------------------------------------------------------


def _times(case: Case, methods: Sequence[str], deadline: float, failed: Failed[str]) -> Measured:
    try:
        if case.kind == "run":
            with tempfile.TemporaryDirectory() as folder:
                rows = Rows(case.work, Path(folder))
                return _whole_runs(case, methods, rows, deadline, failed)
        bench = Bench(case.work)
    except Exception as error:
        for method in methods:
            failed(method, error)
        return {}
    if case.kind == "training":
        return _training(case, _made(METHODS, methods, bench, failed), deadline, failed)
    return _generation(case, _made(GENERATIONS, methods, bench, failed), deadline, failed)


def _made(
    makers: Mapping[str, Callable[[S], T]],
    methods: Sequence[str],
    bench: S,
    failed: Failed[str],
) -> dict[str, T]:
    made = {}
    for method in methods:
        try:
            made[method] = makers[method](bench)
        except Exception as error:
            failed(method, error)
    return made


def _training(
    case: Case, steps: Mapping[str, Step], deadline: float, failed: Failed[str]
) -> Measured:
    device, rounds = case.work.device, case.rounds or 0
    times = interleaved(steps, rounds, device, deadline=deadline, failed=failed)
    rows = _rows("training", times, case.work.tokens)
    for (_, method), row in rows.items():
        if method in _PROFILED and rounds > 2 and not case.seconds and device == "cpu":
            row["own_share"] = own_share(steps[method])
        if case.memory:
            peak = times[method].peak_bytes
            row["peak_bytes"] = peak_bytes(case.work, method) if peak is None else peak
    return rows


def _generation(
    case: Case, runs: Mapping[str, Callable[[int], Any]], deadline: float, failed: Failed[str]
) -> Measured:
    """The prompt, each token after it, and both."""
    work = case.work
    steps = {
        (method, tokens): functools.partial(generate, tokens)
        for method, generate in runs.items()
        for tokens in (1, 1 + work.completion)
    }
    times = interleaved(
        steps,
        case.rounds or 0,
        work.device,
        warmup=1,
        deadline=deadline,
        failed=lambda key, error: failed(key[0], error),
    )
    prefill = {method: run for (method, tokens), run in times.items() if tokens == 1}
    whole = {method: run for (method, tokens), run in times.items() if tokens > 1}
    both = [method for method in prefill if method in whole]
    decode = {method: whole[method] - prefill[method] for method in both}
    rows = _rows("prefill", prefill, work.batch_size * work.prompt)
    rows |= _rows("decode", decode, work.batch_size * work.completion)
    return rows | _rows("generate", whole, work.batch_size * (1 + work.completion))


def _whole_runs(
    case: Case, methods: Sequence[str], rows: Rows, deadline: float, failed: Failed[str]
) -> Measured:
    """Runs without the time in which their base is loaded."""
    steps = _made(RUNS, [LOAD, *methods], rows, failed)
    times = interleaved(steps, case.rounds or 0, case.work.device, 1, deadline, failed)
    loading = times.pop(LOAD)
    after = {method: measured - loading for method, measured in times.items()}
    return _rows("run", after, len(rows.prompts) * (case.work.prompt + case.work.completion))


def _rows(phase: str, times: Mapping[str, Times], tokens: int) -> Measured:
    first = next(iter(times.values()), None)
    return {
        (phase, method): {
            "seconds": measured.median,
            "spread": measured.spread,
            "ratio": measured.ratio(first),
            "tokens_per_second": tokens / measured.median,
        }
        for method, measured in times.items()
        if first is not None
    }


# -- operations ----------------------------------------------------------------------------------


def _count(case: Case, methods: Sequence[str], failed: Failed[str], rows: Measured) -> None:
    """Put operations into the rows."""
    for method, phases in count_case(case, methods, failed).items():
        for phase, operations in phases.items():
            rows.setdefault((phase, method), {}).update(
                operations=operations.layer,
                operations_once=operations.step,
                operations_of_layer=operations.names,
            )
