"""The tables: that of the guide to speed, and that of a GPU, ordered by worth."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from workload import Case, Shape, Workload

from reftnoise.engine.base.loading import has_arithmetic

_FEW_LABELS = Workload(vocabulary=32000, batch_size=4, prompt=92, completion=36)
_BOTH_ENDS = Workload(positions="f7+l7", prompt=96, completion=32)
_SMALL = Workload(positions="f7+l7", rank=64, batch_size=2, prompt=48, completion=16)
_LONG = Workload(vocabulary=128 * 1024, prompt=384, completion=128)
_DECODED = Workload(batch_size=1, completion=128)
_HALVES = Workload(shape="llama-3-8b", positions="f4+l4", batch_size=2, dtype="bfloat16")

REAL_SHAPES: tuple[Shape, ...] = ("llama-3-8b", "qwen3-4b")
EVERY_TOKEN = ("base", "prompt", "addition", "loreft", "lora")
_STEPS_OF_MODEL = ("floor", "split", "reuse", "lora", "pyreft")
COMPILED = ("compiled_base", "compiled_prompt", "compiled_addition", "compiled_loreft")

GUIDE = (
    Case(
        "training",
        Workload(),
        ("floor", "plain", "split", "reuse", "symnoise", "lora", "neftune", "pyreft"),
    ),
    Case("training", _FEW_LABELS, ("floor", "split", "reuse", "lora", "pyreft")),
    Case("training", _BOTH_ENDS, ("floor", "plain", "split", "lora", "pyreft")),
    Case(
        "training",
        replace(_BOTH_ENDS, positions="f1+l1"),
        ("floor", "split", "compiled"),
    ),
    Case("training", _SMALL, ("floor", "split", "lora", "pyreft")),
    Case("training", _LONG, ("plain", "split"), memory=True, rounds=2),
    Case("generation", _DECODED, EVERY_TOKEN),
    Case("generation", replace(_DECODED, batch_size=8), EVERY_TOKEN),
    Case("generation", replace(_DECODED, batch_size=32), ("base", "adapter", "adapters"), rounds=3),
    Case("training", _HALVES, ("floor", "plain", "split", "lora"), rounds=0),
    Case("training", replace(_HALVES, tied=True), ("floor", "plain", "split", "pyreft"), rounds=0),
    Case(
        "training", replace(_HALVES, positions="l1"), ("floor", "plain", "split", "reuse"), rounds=0
    ),
    Case("generation", _HALVES, (*EVERY_TOKEN, "adapter", "adapters"), rounds=0),
)
"""The guide's table."""

RUN_ROUNDS = 3
"""Of whole training runs."""


def model_suite(work: Workload) -> list[Case]:
    """Training, generation and whole runs of a model with its own weights.

    The model's dtypes are float32, and bfloat16 where the device has arithmetic of it.
    """
    dtypes = ["float32"]
    if work.device != "cpu" or has_arithmetic(torch.bfloat16):
        dtypes.append("bfloat16")
    cases = []
    for dtype in dtypes:
        usual = replace(work, prompt=96, dtype=dtype)
        cases += [
            Case("training", replace(usual, completion=completion), _STEPS_OF_MODEL, rounds=5)
            for completion in (16, 64)
        ]
        decoded = replace(usual, completion=64)
        cases.append(Case("generation", decoded, EVERY_TOKEN, rounds=3))
        cases.append(Case("run", usual, ("bare", "train"), rounds=RUN_ROUNDS))
    return cases


_LATER_SHAPE = 3
"""A case of the next shape is worth as much as the one so many places on of the shape before."""


def gpu_suite(shapes: Sequence[Shape], device: str) -> list[Case]:
    """Training and generation on shapes of real models, the most telling cases first."""
    ranked = [
        (place + _LATER_SHAPE * index, case)
        for index, shape in enumerate(shapes)
        for place, case in enumerate(_cases(shape, device))
    ]
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def _cases(shape: Shape, device: str) -> Iterator[Case]:
    """One shape's cases, ordered by worth; each says how long it takes, by and large."""
    sizes: dict[str, Any] = {"prompt": 512, "completion": 128}
    one, few, many = 1, 8, 32
    if shape == "toy":
        sizes, few, many = {"prompt": 12, "completion": 4}, 2, 4

    def work(positions: str, batch_size: int) -> Workload:
        return Workload(
            **sizes, shape=shape, rank=8, positions=positions, batch_size=batch_size,
            dtype="bfloat16", device=device,
        )  # fmt: skip

    def training(positions: str, rows: int, *methods: str, seconds: float, note: str = "") -> Case:
        return Case(
            "training", work(positions, rows), methods, memory=device != "cpu", rounds=5,
            seconds=seconds, note=note,
        )  # fmt: skip

    def generation(rows: int, *methods: str, seconds: float, note: str = "") -> Case:
        chosen = work("f7+l7", rows)
        return Case("generation", chosen, methods, rounds=2, seconds=seconds, note=note)

    yield training("l1", few, "floor", "plain", "split", "reuse", "lora", "pyreft", seconds=25)
    yield training("f7+l7", few, "floor", "plain", "split", "lora", "pyreft", seconds=25)
    yield generation(one, *EVERY_TOKEN, "pyreft", seconds=60)
    yield training("f7+l7", few, "floor", "compiled", "compiled_lora", seconds=90, note="compiled")
    yield generation(many, *EVERY_TOKEN, "adapter", "adapters", seconds=75)
    yield generation(one, *COMPILED, seconds=60, note="compiled")
    yield training("f7+l7", many, "floor", "split", "lora", "pyreft", seconds=50)
    yield training("l1", one, "floor", "split", "reuse", "lora", "pyreft", seconds=10)
    yield generation(few, *EVERY_TOKEN, "pyreft", seconds=60)
    yield training("l1", many, "floor", "split", "reuse", "lora", "pyreft", seconds=60)
