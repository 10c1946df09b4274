"""torch.compile, in a process without the shape checks, which it cannot trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.training_steps import batch, step, wrapped

HAS_TRACED_PASSES = torch.__version__ >= "2.8"


@pytest.mark.skipif(not HAS_TRACED_PASSES, reason="needs torch 2.8")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["compiled_passes.py", "compiled_bases.py"])
def test_in_a_process_of_its_own(name: str, which: str) -> None:
    cases = Path(__file__).parents[1] / "support" / "programs" / name
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", which, "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"REFTNOISE_TEST_UNCHECKED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(HAS_TRACED_PASSES, reason="torch 2.8 and newer compile passes")
def test_older_versions_run_passes_as_they_are_written() -> None:
    model, compiled = wrapped("f1+l1"), torch.compile(wrapped("f1+l1"), backend="eager")
    expected = step(model, batch())
    found = compiled(**batch())
    assert torch.equal(found.loss, expected[0].loss)
