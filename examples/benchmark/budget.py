"""The time that a table may take."""

import contextlib
import math
import time
from collections.abc import Iterator

from workload import Case


class Budget:
    """Seconds from now on, and how long cases take compared with what they say.

    Args:
        seconds: time for all cases; no limit, if None.
    """

    def __init__(self, seconds: float | None) -> None:
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds
        self._expected, self._taken = 0.0, 0.0

    def holds(self, case: Case) -> bool:
        """Whether the time left is enough for a case, at the pace of the cases so far."""
        pace = self._taken / self._expected if self._expected else 1.0
        return time.monotonic() + pace * case.seconds < self.deadline

    @contextlib.contextmanager
    def spending(self, case: Case) -> Iterator[None]:
        """Within the block, the case takes its time."""
        started = time.monotonic()
        yield
        if case.seconds:
            self._expected += case.seconds
            self._taken += time.monotonic() - started
