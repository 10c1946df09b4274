"""Interleaved times, peak memory in processes of their own, and the share of our own code."""

import contextlib
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..engine import hooks as engine
from ..engine.training_pass import runner as passes
from ..engine.training_pass.prefix_cache import PrefixCache
from ..interventions import rotation
from .sides import SIDES, Bench, Step
from .workload import Workload

OWN = "reftnoise"
STEP = "step"


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2


def interleaved(
    steps: Mapping[str, Step], rounds: int, device: str, warmup: int = 2
) -> dict[str, Times]:
    """Times of the steps, one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()  # a collection would fall on some side at random
    try:
        for round_ in range(warmup + rounds):
            for name, step in steps.items():
                seconds = _seconds(step, device)
                if round_ >= warmup:
                    times[name].append(seconds)
            gc.collect()
    finally:
        gc.enable()
    return {name: Times(tuple(found)) for name, found in times.items()}


def _seconds(step: Step, device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def peak_bytes(work: Workload, side: str) -> int:
    """The most memory that a step holds at once, weights included, in a process of its own.

    Of the device where there is one, else of the process, without what importing took.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (work, side))


def _peak_here(work: Workload, side: str) -> int:
    torch.set_num_threads(1)
    imported = _resident()
    step = SIDES[side](Bench(work))
    step()
    if work.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated())
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
    """The share of a step's time that is spent in edits, bases and alignment, and their gradients.

    The profiler slows small operations more than large ones, so this is an upper bound.
    """
    with _marked():
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(repeats):
                with record_function(STEP):
                    step()
    events = [event for event in profiler.events() if event.time_range is not None]
    ours = [event.time_range for event in events if event.name == OWN]
    ours.sort(key=lambda found: found.start)
    outermost: list[Any] = []
    for found in ours:
        if not outermost or found.start >= outermost[-1].end:
            outermost.append(found)
    total = sum(event.time_range.elapsed_us() for event in events if event.name == STEP)
    forward = sum(found.elapsed_us() for found in outermost)
    # The operation that made a node of the backward pass is the last to start under its number.
    makers: dict[int, Any] = {}
    nodes = []
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function"):
            nodes.append(event)
        elif event.sequence_nr >= 0:
            known = makers.get(event.sequence_nr)
            if known is None or event.time_range.start >= known.time_range.start:
                makers[event.sequence_nr] = event

    def is_ours(node: Any) -> bool:
        if "AccumulateGrad" in node.name:  # the base is frozen
            return True
        maker = makers.get(node.sequence_nr)
        return maker is not None and any(
            found.start <= maker.time_range.start <= found.end for found in outermost
        )

    backward = sum(node.time_range.elapsed_us() for node in nodes if is_ours(node))
    return float(forward + backward) / total


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    """Within the block, the profiler sees our own code under one name."""
    marked = [
        (engine.Engine, "_apply"),
        (rotation, "_bases"),
        (passes, "align"),
        (passes, "aligned_inputs"),
        (passes, "pack"),
        (passes, "unpack"),
        (passes.Runner, "_plan"),
        (PrefixCache, "stacked"),
        (PrefixCache, "write"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name in marked:
            original = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, _recorded(original)))
        yield


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(OWN):
            return function(*args, **kwargs)

    return run
