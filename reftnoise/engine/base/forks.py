"""Threads and forks: what a child must not take over from threads that it does not have.

A fork copies one thread and all memory. A lock that another thread held stays locked in the child,
and what that thread changed for a while stays changed.
"""

import contextlib
import os
from collections.abc import Iterator
from threading import RLock, get_ident
from types import TracebackType
from typing import Any
from weakref import WeakSet


class ForkSafeLock:
    """A reentrant lock that is free in a child, unless the forking thread itself holds it."""

    def __init__(self) -> None:
        self._lock, self._owner, self._depth = RLock(), 0, 0
        _LOCKS.add(self)

    def __reduce__(self) -> Any:
        return ForkSafeLock, ()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = get_ident()
        self._depth += 1

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = 0
        self._lock.release()

    def free_in_child(self) -> None:
        """Forget a thread that the child does not have."""
        if self._owner != get_ident():
            self._lock, self._owner, self._depth = RLock(), 0, 0


_LOCKS: WeakSet[ForkSafeLock] = WeakSet()
_OPEN: dict[object, tuple[int, contextlib.ExitStack]] = {}


@contextlib.contextmanager
def undone_in_children() -> Iterator[contextlib.ExitStack]:
    """A stack of blocks; a child that another thread forks closes it, and so undoes its changes."""
    key = object()
    try:
        with contextlib.ExitStack() as stack:
            _OPEN[key] = get_ident(), stack
            yield stack
    finally:
        _OPEN.pop(key, None)


def _in_child() -> None:
    for lock in list(_LOCKS):
        lock.free_in_child()
    for key, (thread, stack) in reversed(list(_OPEN.items())):
        if thread != get_ident():
            del _OPEN[key]
            with contextlib.suppress(Exception):  # what the other thread had half done
                stack.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
