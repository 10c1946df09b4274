"""Whose turn it is on a base, which several models, passes and threads may share.

Threads take turns, and within a thread the innermost pass alone edits: a pass of another
`ReftModel`, or of the bare base, may be run from a hook or a logits processor.
"""

import contextlib
from collections.abc import Callable, Iterator
from threading import RLock, get_ident
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: "WeakKeyDictionary[nn.Module, RLock]" = WeakKeyDictionary()
_PASSES: "WeakKeyDictionary[nn.Module, list[object]]" = WeakKeyDictionary()


def exclusive(base: nn.Module) -> RLock:
    """The lock by which threads take turns on `base`."""
    return _LOCKS.setdefault(base, RLock())


@contextlib.contextmanager
def innermost(base: nn.Module) -> Iterator[Callable[[], bool]]:
    """Make the block the innermost pass on `base`; yields whether it still is, in this thread."""
    passes, mine, thread = _PASSES.setdefault(base, []), object(), get_ident()
    passes.append(mine)
    try:
        yield lambda: passes[-1] is mine and get_ident() == thread
    finally:
        passes.remove(mine)
