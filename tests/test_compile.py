"""torch.compile, in a process without the shape checks, which it cannot trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["compiled_passes.py", "compiled_bases.py"])
def test_in_a_process_of_its_own(name: str) -> None:
    cases = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"REFTNOISE_TEST_UNCHECKED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
