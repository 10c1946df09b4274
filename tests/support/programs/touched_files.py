"""Print the files of reftnoise that one training forward pass runs code of, by tracing its calls.

    python touched_files.py

A reader who wants to know how a pass works opens these. The maths is not among them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import reftnoise as rn

ROOT = Path(rn.__file__).resolve().parent
MATHS = (ROOT / "interventions").resolve()
UNITS = [
    {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "f1+l1"},
    {"intervention": "neftune", "alpha": 5.0},
]


def touched_files() -> tuple[list[str], list[str]]:
    """Paths within reftnoise, of a model's first pass and of a later one, which builds nothing."""
    base, tokenizer = rn.load_tiny_model()
    model = rn.get_reft_model(base, rn.ReftConfig(UNITS)).train()
    ids = tokenizer("Where does a bear live? In the forest.", return_tensors="pt").input_ids
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 6, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return called_within(lambda: model(**inputs)), called_within(lambda: model(**inputs))


def called_within(run: Callable[[], Any]) -> list[str]:
    names: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            names.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    paths = (Path(name).resolve() for name in names if not name.startswith("<"))
    inside = {path for path in paths if path.is_relative_to(ROOT)}
    return sorted(str(path.relative_to(ROOT)) for path in inside if MATHS not in path.parents)


if __name__ == "__main__":
    first, later = touched_files()
    print(*first, f"{len(first)} files, {len(later)} of them in later passes", sep="\n")
