"""Run workloads and report them."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import report
from .measure import Times, interleaved, own_share, peak_bytes
from .sides import SIDES, Bench
from .workload import GPU_SUITE, SUITE, Case, Workload

OURS = ("plain", "split", "reuse", "symnoise", "compiled")
_PROFILED = ("plain", "split")
NEEDS = {"lora": "peft", "neftune": "peft", "pyreft": "pyreft"}
_INSTALL = {"peft": "pip install peft", "pyreft": "pip install --no-deps pyreft==0.1.0"}

NEW_TOKENS = 128


def run_bench(
    work: Workload | None,
    *,
    vary: str | None = None,
    values: Sequence[int] = (),
    sides: Sequence[str] = (),
    rounds: int = 7,
    threads: int = 1,
    memory: bool = False,
    generation: bool = False,
    device: str = "cpu",
    output_dir: str = "reftnoise-bench",
) -> list[report.Row]:
    """Measure, print, and write `results.json`, `.md` and `.png`; arguments as of the command."""
    _check(sides, rounds, threads, vary, values)
    device = device if work is None else work.device
    if work is None and vary is None and not sides:
        cases = list(GPU_SUITE if device == "cuda" else SUITE)
        generation = True
    else:
        cases = _cases(work or Workload(device=device), vary, values, sides, memory)
    torch.set_num_threads(threads)
    console, folder = Console(), Path(output_dir)
    console.width = max(console.width, 100)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[report.Row] = []
    for case in cases:
        found = _steps(case, rounds, console)
        report.print_table(found, str(case.work), console)
        rows += found
        report.write(folder, rows, device)
    if generation:
        for batch_size in (1, 8):
            chosen = replace(work or Workload(device=device), batch_size=batch_size)
            found = _generation(chosen, rounds)
            for pair in (found[:2], found[2:]):
                report.print_table(pair, pair[0]["case"], console)
            rows += found
        report.write(folder, rows, device)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no picture: pip install matplotlib")
    elif vary is not None:
        report.draw_lines(folder / "results.png", rows, vary)
    else:
        report.draw_bars(folder / "results.png", rows)
    if vary is not None:
        for side in dict.fromkeys(row["side"] for row in rows):
            own = [row for row in rows if row["side"] == side]
            slope = report.exponent([r[vary] for r in own], [r["seconds"] for r in own])
            console.print(f"{side}: time grows with {vary} to the power of {slope:.2f}")
    console.print(f"written to {folder}")
    return rows


def _check(
    sides: Sequence[str], rounds: int, threads: int, vary: str | None, values: Sequence[int]
) -> None:
    if values and vary is None:
        raise ValueError(f"values {list(values)!r}: expected vary, too, the number that takes them")
    if unknown := set(sides) - set(SIDES):
        raise ValueError(f"sides {', '.join(sorted(unknown))}: expected {', '.join(SIDES)}")
    if threads < 1:
        raise ValueError(f"threads {threads}: expected at least 1")
    if rounds < 2:
        raise ValueError(f"rounds {rounds}: expected at least 2, for a spread")


def _cases(
    work: Workload,
    vary: str | None,
    values: Sequence[int],
    sides: Sequence[str],
    memory: bool,
) -> list[Case]:
    chosen = tuple(sides) or tuple(side for side in SIDES if side != "compiled")
    if vary is None:
        return [Case(work, chosen, memory)]
    numbers = [name for name, value in asdict(work).items() if isinstance(value, int)]
    if vary not in numbers or not values:
        raise ValueError(f"vary {vary!r} over {values!r}: expected values and {', '.join(numbers)}")
    varied = [Workload(**{**asdict(work), vary: value}) for value in values]
    return [Case(each, chosen, memory) for each in varied]


def _steps(case: Case, rounds: int, console: Console) -> list[report.Row]:
    available = []
    for side in case.sides:
        package = NEEDS.get(side)
        if package is None or importlib.util.find_spec(package) is not None:
            available.append(side)
        else:
            console.print(f"without {side}: {_INSTALL[package]}")
    if not available:
        raise ValueError(f"none of the sides {', '.join(case.sides)} is installed")
    bench = Bench(case.work)
    steps = {side: SIDES[side](bench) for side in available}
    times = interleaved(steps, case.rounds or rounds, case.work.device)
    rows = []
    for side, found in times.items():
        row = {
            **asdict(case.work),
            "case": str(case.work),
            "side": side,
            "is_ours": side in OURS,
            "seconds": found.median,
            "spread": found.spread,
            "tokens_per_second": case.work.tokens / found.median,
        }
        if side in _PROFILED and case.rounds is None and case.work.device == "cpu":
            row["own_share"] = own_share(steps[side])
        rows.append(row)
    steps.clear()
    del bench
    if case.memory:
        for row in rows:
            row["peak_bytes"] = peak_bytes(case.work, row["side"])
    return rows


def _generation(work: Workload, rounds: int) -> list[report.Row]:
    """Greedy generation: the prompt, and each token after it, by the base and by the ReftModel."""
    bench = Bench(work)
    model = bench.reft().eval()
    prompt = {name: bench.batch[name][:, : work.prompt] for name in ("input_ids", "attention_mask")}

    def generate(model: Any, tokens: int) -> Callable[[], None]:
        def run() -> None:
            model.generate(
                **prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
                use_cache=True, pad_token_id=0,
            )  # fmt: skip

        return run

    bench.base.generation_config.eos_token_id = None
    steps = {
        f"{name}, {tokens}": generate(chosen, tokens)
        for name, chosen in (("base", bench.base), ("reftnoise", model))
        for tokens in (1, 1 + NEW_TOKENS)
    }
    times = interleaved(steps, rounds, work.device)
    rows = []
    for phase in ("prefill", "decode"):
        for name in ("base", "reftnoise"):
            found, tokens = times[f"{name}, 1"], work.batch_size * work.prompt
            if phase == "decode":
                whole = times[f"{name}, {1 + NEW_TOKENS}"].seconds
                rest = [a - b for a, b in zip(whole, found.seconds, strict=True)]
                found, tokens = Times(tuple(rest)), work.batch_size * NEW_TOKENS
            rows.append(
                {
                    **asdict(work),
                    "case": f"{phase} of {tokens // work.batch_size} tokens, {work}",
                    "side": name,
                    "is_ours": name == "reftnoise",
                    "seconds": found.median,
                    "spread": found.spread,
                    "tokens_per_second": tokens / found.median,
                }
            )
    return rows
