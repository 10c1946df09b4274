"""Run workloads and report them."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import report
import torch
from measure import Times, interleaved, own_share, peak_bytes
from methods import METHODS, Bench
from rich.console import Console
from workload import GPU_SUITE, SUITE, Case, Workload

OURS = ("plain", "split", "reuse", "symnoise", "compiled")
_PROFILED = ("plain", "split")
NEEDS = {"lora": "peft", "neftune": "peft", "pyreft": "pyreft"}
_INSTALL = {"peft": "pip install peft", "pyreft": "pip install --no-deps pyreft==0.1.0"}

NEW_TOKENS = 128


def benchmark(
    work: Workload | None = None,
    vary: str | None = None,
    values: list[int] | None = None,
    methods: list[str] | None = None,
    rounds: int = 7,
    threads: int = 1,
    memory: bool = False,
    generation: bool = False,
    device: str = "cpu",
    output_dir: str = "reftnoise-bench",
) -> None:
    """Measure training steps and generation, and the floor, LoRA, NEFTune and pyreft as well.

    The floor is the frozen base's forward pass, with logits everywhere, and the backward pass down
    to the first edited layer's output. Without work, vary and methods, the whole table is measured,
    in about ten minutes.

    Args:
        work: workload that is measured instead of the table.
        vary: number of the workload that takes each of `values`, such as rank or layers.
        values: numbers for `vary`.
        methods: some of floor, plain, split, reuse, symnoise, compiled, lora, neftune, pyreft; by
            default all but compiled.
        rounds: interleaved measurements of each method.
        threads: threads of torch.
        memory: whether each method's peak memory is measured, too, in a process of its own.
        generation: whether generation is measured, too.
        device: cpu or cuda, for the table.
        output_dir: directory for results.json, results.md and results.png.
    """
    values, methods = values or [], methods or []
    _check(methods, rounds, threads, vary, values)
    device = device if work is None else work.device
    if work is None and vary is None and not methods:
        cases = list(GPU_SUITE if device == "cuda" else SUITE)
        generation = True
    else:
        cases = _cases(work or Workload(device=device), vary, values, methods, memory)
    torch.set_num_threads(threads)
    console, folder = Console(), Path(output_dir)
    console.width = max(console.width, 100)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[report.Measurement] = []
    for case in cases:
        measured = _steps(case, rounds, console)
        report.print_table(measured, str(case.work), console)
        rows += measured
        report.write(folder, rows, device)
    if generation:
        for batch_size in (1, 8):
            chosen = replace(work or Workload(device=device), batch_size=batch_size)
            measured = _generation(chosen, rounds)
            for pair in (measured[:2], measured[2:]):
                report.print_table(pair, pair[0]["case"], console)
            rows += measured
        report.write(folder, rows, device)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no picture: pip install matplotlib")
    elif vary is not None:
        report.draw_lines(folder / "results.png", rows, vary)
    else:
        report.draw_bars(folder / "results.png", rows)
    if vary is not None:
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            slope = report.exponent([r[vary] for r in own], [r["seconds"] for r in own])
            console.print(f"{method}: time grows with {vary} to the power of {slope:.2f}")
    console.print(f"written to {folder}")


def _check(
    methods: Sequence[str], rounds: int, threads: int, vary: str | None, values: Sequence[int]
) -> None:
    if values and vary is None:
        raise ValueError(f"values {list(values)!r}: expected vary, too, the number that takes them")
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"methods {', '.join(sorted(unknown))}: expected {', '.join(METHODS)}")
    if threads < 1:
        raise ValueError(f"threads {threads}: expected at least 1")
    if rounds < 2:
        raise ValueError(f"rounds {rounds}: expected at least 2, for a spread")


def _cases(
    work: Workload,
    vary: str | None,
    values: Sequence[int],
    methods: Sequence[str],
    memory: bool,
) -> list[Case]:
    chosen = tuple(methods) or tuple(method for method in METHODS if method != "compiled")
    if vary is None:
        return [Case(work, chosen, memory)]
    numbers = [name for name, value in asdict(work).items() if isinstance(value, int)]
    if vary not in numbers or not values:
        raise ValueError(f"vary {vary!r} over {values!r}: expected values and {', '.join(numbers)}")
    varied = [Workload(**{**asdict(work), vary: value}) for value in values]
    return [Case(each, chosen, memory) for each in varied]


def _steps(case: Case, rounds: int, console: Console) -> list[report.Measurement]:
    available = []
    for method in case.methods:
        package = NEEDS.get(method)
        if package is None or importlib.util.find_spec(package) is not None:
            available.append(method)
        else:
            console.print(f"without {method}: {_INSTALL[package]}")
    if not available:
        raise ValueError(f"none of the methods {', '.join(case.methods)} is installed")
    bench = Bench(case.work)
    steps = {method: METHODS[method](bench) for method in available}
    times = interleaved(steps, case.rounds or rounds, case.work.device)
    rows = []
    for method, measured in times.items():
        row = {
            **asdict(case.work),
            "case": str(case.work),
            "method": method,
            "is_ours": method in OURS,
            "seconds": measured.median,
            "spread": measured.spread,
            "tokens_per_second": case.work.tokens / measured.median,
        }
        if method in _PROFILED and case.rounds is None and case.work.device == "cpu":
            row["own_share"] = own_share(steps[method])
        rows.append(row)
    steps.clear()
    del bench
    if case.memory:
        for row in rows:
            row["peak_bytes"] = peak_bytes(case.work, row["method"])
    return rows


def _generation(work: Workload, rounds: int) -> list[report.Measurement]:
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
            measured, tokens = times[f"{name}, 1"], work.batch_size * work.prompt
            if phase == "decode":
                whole = times[f"{name}, {1 + NEW_TOKENS}"].seconds
                rest = [a - b for a, b in zip(whole, measured.seconds, strict=True)]
                measured, tokens = Times(tuple(rest)), work.batch_size * NEW_TOKENS
            rows.append(
                {
                    **asdict(work),
                    "case": f"{phase} of {tokens // work.batch_size} tokens, {work}",
                    "method": name,
                    "is_ours": name == "reftnoise",
                    "seconds": measured.median,
                    "spread": measured.spread,
                    "tokens_per_second": tokens / measured.median,
                }
            )
    return rows
