"""Interleaved times, peak memory in processes of their own, and the share of our own code."""

import bisect
import contextlib
import gc
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import transformers
from methods import METHODS, Bench, Step
from torch.profiler import ProfilerActivity, profile, record_function
from workload import Workload

import reftnoise.interventions

OWN, STEP = "reftnoise", "step"
_NODE = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    seconds: tuple[float, ...]
    peak_bytes: int | None = None
    """The most memory of a GPU at once, with the bases and units of all methods of the run."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __sub__(self, others: "Times") -> "Times":
        """What each round took longer than the other's."""
        pairs = zip(self.seconds, others.seconds, strict=True)
        return Times(tuple(own - other for own, other in pairs))

    def ratio(self, others: "Times") -> float:
        """The median of each round's quotient: a machine is not as fast in all rounds."""
        pairs = zip(self.seconds, others.seconds, strict=True)
        return statistics.median(own / other for own, other in pairs)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2


K = TypeVar("K")
Failed = Callable[[K, Exception], None]
"""What becomes of a method's error; the others go on."""


def interleaved(
    steps: Mapping[K, Step],
    rounds: int,
    device: str,
    warmup: int = 2,
    deadline: float = math.inf,
    failed: Failed[K] | None = None,
) -> dict[K, Times]:
    """Times of the steps, one after the other in every round.

    Args:
        steps: steps by the names of their methods.
        rounds: number of rounds.
        device: cpu or cuda.
        warmup: number of rounds before, which do not count.
        deadline: time of `time.monotonic` after which no round begins, but for the first, and no
            step is run for the first time.
        failed: receives a step's error, and the step is left out; raised, if None.
    """
    times: dict[K, list[float]] = {name: [] for name in steps}
    peaks: dict[K, int] = {}
    gc.collect()
    gc.disable()  # a collection would slow a method at random
    try:
        for round_ in range(warmup + rounds):
            if round_ > warmup and time.monotonic() > deadline:
                break
            for name in list(times):
                seconds = None
                try:
                    if round_ == 0 and time.monotonic() > deadline:
                        raise TimeoutError("no time left")
                    seconds, peak = _measured(steps[name], device)
                except Exception as error:
                    if failed is None:
                        raise
                    failed(name, error)
                if seconds is None:  # now that the error no longer holds its frames
                    del times[name]
                    gc.collect()
                    continue
                if peak is not None:
                    peaks[name] = max(peak, peaks.get(name, 0))
                if round_ >= warmup:
                    times[name].append(seconds)
            gc.collect()
    finally:
        gc.enable()
    return {name: Times(tuple(seconds), peaks.get(name)) for name, seconds in times.items()}


def _measured(step: Step, device: str) -> tuple[float, int | None]:
    """Seconds of a step, and the most memory that a GPU held within it."""
    if device == "cpu":
        started = time.perf_counter()
        step()
        return time.perf_counter() - started, None
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000, int(torch.cuda.max_memory_allocated())


def peak_bytes(work: Workload, method: str) -> int:
    """The most memory that a step on the CPU holds at once, in a process of its own.

    Weights are included, imports are not.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (work, method))


def _peak_here(work: Workload, method: str) -> int:
    torch.set_num_threads(1)
    imported = _resident()
    step = METHODS[method](Bench(work))
    step()
    with contextlib.suppress(OSError):  # Linux: forget the peak so far
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return _peak_resident() - imported


def _resident() -> int:
    return _status("VmRSS") or _peak_resident()


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return None


def own_share(step: Step, repeats: int = 5) -> float:
    """The share of a step's time that reftnoise's own code takes, its gradients included.

    Own is what runs while, of the Python functions of reftnoise and transformers, the innermost is
    reftnoise's; without logits and loss, which the base would compute, too. The profiler slows
    small operations more than large ones, so this is an upper bound.
    """
    with _marked():
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(repeats):
                with record_function(STEP):
                    step()
    events = [event for event in profiler.events() if event.time_range is not None]
    nodes = [event for event in events if event.name.startswith(_NODE)]
    backward = sorted((node.time_range for node in nodes), key=_start)
    own = sorted((event.time_range for event in events if event.name == OWN), key=_start)
    own = [part for part in own if not _covers(backward, part.start)]
    # The operation that made a node of the backward pass is the last to start under its number.
    makers: dict[int, float] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(_NODE):
            started = event.time_range.start
            makers[event.sequence_nr] = max(started, makers.get(event.sequence_nr, started))
    own += [
        node.time_range
        for node in nodes
        if "AccumulateGrad" in node.name  # the base is frozen
        or (node.sequence_nr in makers and _covers(own, makers[node.sequence_nr]))
    ]
    total = sum(event.time_range.elapsed_us() for event in events if event.name == STEP)
    return float(sum(part.elapsed_us() for part in own)) / total


def _start(part: Any) -> float:
    return float(part.start)


def _covers(parts: Sequence[Any], moment: float) -> bool:
    """Whether a moment lies in one of the parts, which follow each other."""
    index = bisect.bisect_right(parts, moment, key=_start) - 1
    return index >= 0 and moment <= parts[index].end


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    """Within the block, the profiler sees our own code under one name."""
    maths = reftnoise.interventions  # another folder, where the package is installed as editable
    ours = tuple(package.__path__[0] for package in (reftnoise, maths))
    known = (*ours, transformers.__path__[0])
    callers: list[FrameType] = []  # those that changed between our own code and the base's
    marks: list[Any] = []  # the open one, if any

    def change() -> None:
        if marks:
            marks.pop().__exit__(None, None, None)
        else:
            marks.append(record_function(OWN))
            marks[0].__enter__()

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            is_own = file.startswith(ours) and not file.endswith(("loss.py", "head.py"))
            if is_own != bool(marks) and file.startswith(known):
                callers.append(frame)
                change()
        elif event == "return" and callers and callers[-1] is frame:
            callers.pop()
            change()

    sys.setprofile(trace)
    try:
        yield
    finally:
        sys.setprofile(None)
