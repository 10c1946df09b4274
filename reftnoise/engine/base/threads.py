"""What threads share, and what a child must not take over from threads that it does not have.

Blocks of several threads may overlap: the last one to end puts back what the first one found. A
fork copies one thread and all memory. A lock that another thread held stays locked in the child,
and what that thread changed for a while stays changed.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from threading import RLock, get_ident
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn


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


@contextlib.contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[[Any, Any, Any], Any]]]) -> Iterator[None]:
    """Within the block, modules call their forward hooks in this thread's passes alone.

    Args:
        hooks: modules, each with a function of its arguments, keyword arguments and output, which
            may return another output.
    """
    thread = get_ident()

    def in_thread(hook: Callable[[Any, Any, Any], Any], _: nn.Module, *values: Any) -> Any:
        return hook(*values) if get_ident() == thread else None

    with undone_in_children() as stack:
        for module, hook in hooks:
            handle = module.register_forward_hook(partial(in_thread, hook), with_kwargs=True)
            stack.callback(handle.remove)
        yield


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


# -- evaluation mode and the random state --------------------------------------------------------

_LOCK = ForkSafeLock()
_MODES: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
"""The own modes of modules that blocks keep in evaluation mode."""
_BLOCKS: dict[object, tuple[int, set[nn.Module]]] = {}
"""The thread and the modules of each block."""
_STATES: list[dict[str, Tensor]] = []
"""The random states that blocks put back, by device; the innermost block's last."""


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, a model is in evaluation mode."""
    block, modules = object(), set(model.modules())
    with _LOCK:
        for module in modules:
            _MODES.setdefault(module, module.training)
        _BLOCKS[block] = get_ident(), modules
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            del _BLOCKS[block]
            _restore()


def _restore() -> None:
    """Give modules that are in no block their own modes back."""
    kept = set[nn.Module]().union(*(modules for _, modules in _BLOCKS.values()))
    for module, mode in list(_MODES.items()):
        if module not in kept:
            module.training = mode
            del _MODES[module]


def _end_blocks_in_child() -> None:
    """End the blocks of threads that a child does not have, at whatever point they were."""
    for block, (thread, _) in list(_BLOCKS.items()):
        if thread != get_ident():
            del _BLOCKS[block]
    _restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_blocks_in_child)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block, torch draws by a seed on the CPU and a device; its state comes back.

    Draws of overlapping blocks mix, since torch has one state for all threads.
    """
    on_gpu = device.type == "cuda"

    def restore() -> None:
        with _LOCK:
            index = next(i for i, saved in enumerate(_STATES) if saved is states)
            del _STATES[index]
            if index < len(_STATES):  # a block that began later ends later
                _STATES[index].update(states)
                return
            torch.set_rng_state(states["cpu"])
            for name in states.keys() - {"cpu"}:
                torch.cuda.set_rng_state(states[name], name)

    with undone_in_children() as stack:
        with _LOCK:
            states: dict[str, Any] = {"cpu": torch.get_rng_state()}
            if on_gpu:
                states[str(device)] = torch.cuda.get_rng_state(device)
            _STATES.append(states)
            stack.callback(restore)
            torch.manual_seed(seed)
        yield
