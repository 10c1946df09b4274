"""Operations of training steps and of decoding: what a small edit costs on a GPU.

An operation is a call of one of torch's operators that launches work, forward or backward. In
torch's profiler, these are the outermost operators that are not made of others. Three kinds launch
nothing, and are not counted:

- views, such as view, transpose, slices, expand and detach,
- allocations without values, such as empty_like,
- questions to a tensor or a data type, such as `promote_types`.

Bases have shapes without values, so that Llama-3-8B's needs no memory. Two of them, of different
depth, tell what each layer costs from what each step costs once. Where code asks for a number, it
gets that of a base whose weights are zero.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from generation import GENERATIONS
from measure import Failed
from methods import METHODS, Bench
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from workload import Case

ALLOCATIONS = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
)
"""Operators that launch nothing, beside views; the last is a view that autograd need not know."""

_LAYERS = 2
"""Of the shallower base; the other has one more."""
_TOKENS = 3
"""Of the shorter generation: the first is the prefill's, and the second may make what is kept."""


@dataclass(frozen=True)
class Operations:
    """Operations beyond the first method's, or the first method's own.

    Args:
        layer: those of each layer.
        step: those of each step, or each token, whatever the number of layers.
        names: those of each layer, by operator.
    """

    layer: int
    step: int
    names: dict[str, int]


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts operations by operator while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if launches(func):
            self.counts[func.overloadpacket.__name__] += 1
        return _answer(func, args, kwargs or {})


def launches(func: Any) -> bool:
    """Whether an operator launches work."""
    if func.is_view or func.namespace == "prim":
        return False
    if func.overloadpacket.__name__ in ALLOCATIONS:
        return False
    return _has_tensors(func._schema.arguments) or _has_tensors(func._schema.returns)


def _has_tensors(values: Sequence[Any]) -> bool:
    return any("Tensor" in str(value.type) for value in values)


def _answer(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What an operator returns; where that is no number of the base, as if those were zeros.

    A token, a truth or a Python value cannot go on without its value, as a hidden state can.
    """
    is_known = not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
    if is_known or func.namespace == "prim":
        return func(*args, **kwargs)
    if _has_tensors(func._schema.returns):
        output = func(*args, **kwargs)
        if any(leaf.is_floating_point() for leaf in tree_leaves(output)):
            return output
    zeros = tree_map_only(FakeTensor, _zeros, (args, kwargs))
    return func(*zeros[0], **zeros[1])


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def count(run: Callable[[], Any], warmup: int = 2) -> Counter[str]:
    """Operations of a call after some others, which make what is kept."""
    with OperationCounter() as counter, warnings.catch_warnings():
        # Kept prompts look at where weights lie, and fake tensors at gradients of states.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        for _ in range(warmup):
            run()
        counter.counts.clear()
        run()
    return counter.counts


def count_case(
    case: Case,
    methods: Sequence[str],
    failed: Failed[str] | None = None,
    *,
    has_values: bool = False,
) -> dict[str, dict[str, Operations]]:
    """Operations of methods, by method and phase; graphs of torch.compile have none.

    Args:
        case: the workload.
        methods: the methods, of which the others are compared with the first.
        failed: receives a method's error, and the method is left out; raised, if None.
        has_values: whether bases have weights, which changes no count.
    """
    depths = (_LAYERS, _LAYERS + 1)
    benches = [Bench(case.work, layers=layers, has_values=has_values) for layers in depths]
    counts: dict[str, list[dict[str, Counter[str]]]] = {}
    for name in methods:
        if name.startswith("compiled"):
            continue
        try:
            counts[name] = [_phases(case, bench, name) for bench in benches]
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
    return {
        name: {
            phase: _operations(*(_beyond(counts, name, phase, depth) for depth in (0, 1)))
            for phase in phases
        }
        for name, (phases, _) in counts.items()
    }


def _beyond(
    counts: Mapping[str, list[dict[str, Counter[str]]]], name: str, phase: str, depth: int
) -> Counter[str]:
    """A method's operations beyond the first's; the first's own."""
    first = next(iter(counts))
    own = counts[name][depth][phase]
    return own if name == first else _minus(own, counts[first][depth][phase])


def _phases(case: Case, bench: Bench, method: str) -> dict[str, Counter[str]]:
    """Operations of a training step, or of a prefill and of one more token."""
    if case.kind == "training":
        return {"training": count(METHODS[method](bench))}
    generate = GENERATIONS[method](bench)
    prefill = count(functools.partial(generate, 1), warmup=1)
    few, more = (count(functools.partial(generate, n), warmup=0) for n in (_TOKENS, _TOKENS + 1))
    return {"prefill": prefill, "decode": _minus(more, few)}


def _operations(shallow: Counter[str], deep: Counter[str]) -> Operations:
    """What one more layer adds, and what is left without layers."""
    names = {name: number for name, number in sorted(_minus(deep, shallow).items()) if number}
    layer = sum(names.values())
    return Operations(layer, shallow.total() - _LAYERS * layer, names)


def _minus(counts: Counter[str], others: Mapping[str, int]) -> Counter[str]:
    """The difference, negative numbers included."""
    difference = Counter(counts)
    difference.subtract(others)
    return difference
