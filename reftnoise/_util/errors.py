"""Parts of error messages, and the check of numbers that several settings share."""

import contextlib
import difflib
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

from typing_extensions import TypeIs

_LONGEST = 1000
"""The most characters of a message."""


def nearest(name: object, possible: Iterable[str], rest: str | None = None) -> str:
    """`did you mean 'x'? possible: …`, without the question where no name is near.

    Case makes no difference.

    Args:
        name: the unknown name.
        possible: all known names.
        rest: text in place of the list, where that would be too long.
    """
    names = list(possible)
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    hint = f"did you mean {by_lower[near[0]]!r}? " if near else ""
    return hint + (rest or f"possible: {', '.join(names) or 'none'}")


def one_line(text: object) -> str:
    """An error's message, or another text, without line breaks, and cut where it is very long."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


@contextlib.contextmanager
def value_errors(where: object) -> Iterator[None]:
    """Within the block, which reads what others wrote, any error is a ValueError of one line.

    A ValueError says what is wrong. Any other error is named, and stays the cause, since it may be
    one of ours. Long values in messages are cut.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, Warning):  # the last, where a user asks for errors
        raise
    except Exception as error:
        text, is_clear = one_line(error), isinstance(error, ValueError)
        if not is_clear:
            text = f"cannot be used ({type(error).__name__}: {text})"
        if not text.startswith(f"{where}: "):
            text = f"{where}: {text}"
        raise ValueError(text) from (None if is_clear else error)


def is_finite_number(value: object) -> TypeIs[int | float]:
    """Whether a setting is a real number, numpy's too, but neither a bool, an infinity nor NaN."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can be
        return False


def brief(value: object) -> str:
    """A value for one line of an error; models and other long values by their class."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # the second: of integers with too many digits
        return type(value).__name__
    return text if len(text) < 100 and "\n" not in text else type(value).__name__


def first_difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Where two plain values differ first, and what stands there; None where they are equal.

    The place is one such as `representations[0].positions`. A key that one of them lacks has None.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = list(dict.fromkeys([*before, *now]))
        parts = [
            (f"{where}.{name}" if where else str(name), before.get(name), now.get(name))
            for name in names
        ]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        parts = [(f"{where}[{index}]", *pair) for index, pair in pairs]
    else:
        return None if before == now else (where, before, now)
    return next(filter(None, (first_difference(b, n, w) for w, b, n in parts)), None)


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, the first time in this process."""
    logger.warning(message)
