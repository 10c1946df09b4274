"""Waiting for other processes. No outcome hangs on the clock: a busy machine may take its time."""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 400.0
"""Seconds after which a test that hangs fails."""


def wait_until(holds: Callable[[], Any]) -> Any:
    """Ask again and again; the first answer that is true."""
    end = time.monotonic() + PATIENCE
    while not (answer := holds()):
        assert time.monotonic() < end, f"not so after {PATIENCE:.0f} seconds"
        time.sleep(0.05)
    return answer
