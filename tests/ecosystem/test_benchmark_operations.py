"""The benchmark's operations: known counts, and those of torch's profiler."""

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import METHODS, Bench
from operations import ALLOCATIONS, count, count_case
from run import benchmark
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from workload import Case, Workload

from reftnoise.cli.main import run
from reftnoise.engine.base import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

SMALL = Workload(
    hidden_size=64, vocabulary=128, batch_size=2, prompt=12, completion=4, positions="f2+l2"
)
TRAINING, GENERATION = Case("training", SMALL, ()), Case("generation", SMALL, ())


def layers(work: Workload, kind: Any, *methods: str, phase: str = "training") -> list[int]:
    """Operations a layer of methods beyond the first, on bases with weights."""
    counts = count_case(Case(kind, work, ()), methods, has_values=True)
    return [counts[method][phase].layer for method in methods[1:]]


def test_a_vector_added_to_each_layer_is_one_operation_a_layer() -> None:
    stack = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
    vector, states = torch.ones(4), torch.ones(2, 3, 4)
    with torch.no_grad():
        bare = count(lambda: stack(states))
        for layer in stack:
            layer.register_forward_hook(lambda _, __, output: output + vector)
        edited = count(lambda: stack(states))
    assert bare.total() == 5
    assert edited - bare == {"add": 5}


def test_what_launches_nothing() -> None:
    states = torch.ones(2, 3, 4)

    def run() -> Tensor:
        torch.promote_types(torch.float32, torch.bfloat16)
        states.new_empty(3), torch.empty_like(states)
        return states.view(-1).reshape(6, 4).t()[1:, None].expand(2, -1, -1, 6).detach()

    assert not count(run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_has_the_operations_of_its_formula(dtype: str) -> None:
    is_mixed = dtype != "float32"
    # W x + s B A x: two products, the scale and the sum; x and the output are converted.
    forward = 4 + 2 * is_mixed
    # Gradients of A, of B, of x by either, of the scale; and x sums what it gets from both sides.
    # Converted are those of x, of the output, and of W x, which the sum took as float32.
    backward = 6 + 3 * is_mixed
    work = replace(SMALL, dtype=dtype)
    assert layers(work, "generation", "base", "lora", phase="decode") == [2 * forward]
    assert layers(work, "training", "floor", "lora") == [2 * (forward + backward)]


def test_what_edits_cost_today() -> None:
    """Bounds that only shrink."""
    work = replace(SMALL, dtype="bfloat16")
    assert layers(work, "training", "floor", "plain")[0] <= 24
    assert layers(replace(work, tied=True), "training", "floor", "plain")[0] <= 15
    methods = ("base", "prompt", "addition", "loreft", "adapters")
    counts = count_case(Case("generation", work, ()), methods, has_values=True)
    decode = {method: counts[method]["decode"] for method in methods}
    assert decode["prompt"].layer == decode["prompt"].step == 0
    prefill = {method: counts[method]["prefill"].layer for method in methods}
    assert prefill["addition"] <= 4
    assert prefill["loreft"] <= 4
    bounds = {"addition": 1, "loreft": 4, "adapters": 5}
    for method, bound in bounds.items():
        assert 1 <= decode[method].layer <= bound
        assert decode[method].step == 0
        assert sum(decode[method].names.values()) == decode[method].layer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "methods"),
    [
        (TRAINING, ("floor", "plain", "split", "reuse", "symnoise", "lora")),
        (GENERATION, ("base", "prompt", "addition", "loreft", "adapter", "adapters", "lora")),
    ],
)
def test_counts_depend_neither_on_weights_nor_on_depth(
    case: Case, methods: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(case, work=replace(case.work, hidden_size=4096, vocabulary=100_000))
    without_weights = count_case(wide, methods)
    monkeypatch.setattr("operations._LAYERS", 4)
    counts = count_case(case, methods, has_values=True)
    for method in methods[1:]:
        for phase, operations in counts[method].items():
            other = without_weights[method][phase]
            assert other.names == operations.names
            # Whether a gradient of the first layer needs a copy depends on its strides.
            assert other.step == pytest.approx(operations.step, abs=1)


@pytest.mark.parametrize("method", ["floor", "plain", "lora"])
def test_the_profiler_sees_the_same(method: str) -> None:
    step = METHODS[method](Bench(replace(SMALL, layers=2)))
    counted = count(step)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    assert profiled(profiler.events() or []) == in_any_place(counted)


def in_any_place(counts: Counter[str]) -> Counter[str]:
    """Counts in which `add_` is `add`: gradients are summed in place where no mode looks."""
    names: Counter[str] = Counter()
    for name, number in counts.items():
        names[name.removesuffix("_")] += number
    return names


def profiled(events: Any) -> Counter[str]:
    """Outermost operators that are not made of others, and neither views nor allocations."""
    names: Counter[str] = Counter()

    def visit(event: Any) -> None:
        name = event.name.removeprefix("aten::")
        has_itself = any(child.name == event.name for child in event.cpu_children)
        if name == event.name or has_itself or is_made_of_others(name):
            for child in event.cpu_children:
                visit(child)
        elif name not in ALLOCATIONS and not overloads(name)[0].is_view:
            names[name] += 1

    for event in events:
        if event.cpu_parent is None:
            visit(event)
    return in_any_place(names)


def overloads(name: str) -> list[Any]:
    """An operator's overloads of tensors without names."""
    packet = getattr(torch.ops.aten, name)
    names = [o for o in packet.overloads() if o != "a" and "prim_" not in o and "out" not in o]
    every = [getattr(packet, overload) for overload in names]
    return [o for o in every if "Tensor" in str(o._schema) and "Dimname" not in str(o._schema)]


def is_made_of_others(name: str) -> bool:
    return all(overload._can_decompose() for overload in overloads(name))


def test_a_run_that_counts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a base of billions of weights, which no memory is needed for."""
    flags = ["--work.shape=llama-3-8b", "--work.batch_size=2", "--work.prompt=12"]
    flags += ["--methods=[floor,plain]", "--rounds=0", f"--output_dir={tmp_path}"]
    assert run(benchmark, flags, prog="python examples/benchmark") == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["floor", "plain"]
    assert all("seconds" not in row for row in rows)
    narrow = replace(SMALL, positions="l1")
    assert [rows[1]["operations"]] == layers(narrow, "training", "floor", "plain")
    cell = f"+{rows[1]['operations']} a layer, {rows[1]['operations_once']:+d} a step"
    assert cell in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert cell in capsys.readouterr().out


def test_a_model_on_disk_with_its_weights() -> None:
    folder = Path(tiny.__file__).with_name("tiny-chat")
    work = replace(SMALL, model=str(folder))
    bench = Bench(work)
    assert "tiny-chat" in str(work)
    assert torch.equal(bench.base.lm_head.weight, tiny.load_tiny_model()[0].lm_head.weight)
    twin = bench.twin()
    assert twin.lm_head is not bench.base.lm_head
    assert twin.lm_head.weight is bench.base.lm_head.weight


@pytest.mark.skipif(importlib.util.find_spec("pyreft") is None, reason="needs pyreft 0.1.0")
def test_pyreft_is_counted_beside() -> None:
    assert layers(SMALL, "training", "floor", "pyreft")[0] > 43
