"""What calls of a model do where they do not say it themselves.

A choice has a value of the model, which all threads share. Within a block, it has another value in
the thread or asyncio task that entered the block, and in what runs in a copy of its context. A call
reads its choices once, as it begins.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..interventions import RowStrengths
from .base.threads import ForkSafeLock
from .units import PlacedUnit

Arithmetic: TypeAlias = Literal["wide", "base"]
Observer: TypeAlias = Callable[[Sequence[PlacedUnit], Tensor, Tensor], None]


@dataclass(frozen=True)
class CallChoices:
    """The choices of one call."""

    adapter: Any = "default"
    """What edits, as `adapter_names` has it for a row."""
    scale: float = 1.0
    """Factor of all edits."""
    strengths: RowStrengths | None = None
    """What each row gets of its edits, times that factor; None for all of them."""
    is_disabled: bool = False
    """Whether the bare base runs."""
    is_noised: bool = False
    """Whether noise also acts on units in evaluation mode."""
    arithmetic: Arithmetic = "wide"
    """Whether low-rank edits are computed in the wider of the weights' and the hidden states'
    dtypes, or in that of the hidden states."""
    observer: Observer | None = None
    """Called with the units of a site, and the hidden states before and after them."""

    def for_rows(self, rows: int, copies: int) -> "CallChoices":
        """The choices of a call whose rows are so many copies of a batch, one after the other.

        Raises:
            ValueError: strengths for another number of rows.
        """
        if self.strengths is None:
            return self
        if len(self.strengths) != rows // copies:
            raise ValueError(
                f"strengths: expected {rows // copies}, one per row of the batch, got "
                f"{len(self.strengths)}"
            )
        return replace(self, strengths=self.strengths.repeat(copies))


MODEL_CHOICES = CallChoices()
"""Those of a new model."""


@dataclass(eq=False)
class _Block:
    has_ended: bool = False
    """Whether it ended in another context than it began in, which keeps it otherwise."""


_Entered: TypeAlias = tuple["CallSettings", _Block, dict[str, Any]]
_BLOCKS: ContextVar[tuple[_Entered, ...]] = ContextVar("reftnoise_blocks", default=())
_CHANGE = ForkSafeLock()


class CallSettings:
    """The choices of a model's calls; engines on one base may share them.

    Args:
        default: choices outside of blocks.
    """

    def __init__(self, default: CallChoices = MODEL_CHOICES) -> None:
        self._default = default
        self._open = 0
        self._has_blocks = False
        """Whether any thread is in a block: torch.compile cannot trace context variables."""

    def __reduce__(self) -> Any:
        return CallSettings, (self._default,)  # a copy is in no block

    @property
    def now(self) -> CallChoices:
        """The choices of a call that begins now."""
        choices = self._default
        if torch.compiler.is_compiling() and not self._has_blocks:
            return choices
        for settings, block, changes in _BLOCKS.get():
            if settings is self and not block.has_ended:
                choices = replace(choices, **changes)
        return choices

    def set(self, name: str, value: Any) -> None:
        """Change a choice of the innermost block here that makes it, or else of the model."""
        entered = _BLOCKS.get()
        for index in reversed(range(len(entered))):
            settings, block, changes = entered[index]
            if settings is self and name in changes and not block.has_ended:
                changed = (settings, block, changes | {name: value})
                _BLOCKS.set((*entered[:index], changed, *entered[index + 1 :]))
                return
        with _CHANGE:
            self._default = replace(self._default, **{name: value})

    @contextlib.contextmanager
    def block(self, **changes: Any) -> Iterator[None]:
        """Within the block, calls in this thread or asyncio task make other choices."""
        block = _Block()
        _BLOCKS.set((*_BLOCKS.get(), (self, block, changes)))
        self._count(1)
        try:
            yield
        finally:
            entered = _BLOCKS.get()
            others = tuple(entry for entry in entered if entry[1] is not block)
            # A generator may end in another thread than it began in.
            block.has_ended = len(others) == len(entered)
            _BLOCKS.set(others)
            self._count(-1)

    def _count(self, change: int) -> None:
        with _CHANGE:
            self._open += change
            self._has_blocks = self._open > 0
