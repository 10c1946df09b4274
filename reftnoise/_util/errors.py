"""What errors say: in one line, and to somebody who mistyped a name."""

import difflib
from collections.abc import Iterable


def nearest(name: object, possible: Iterable[str], rest: str | None = None) -> str:
    """`did you mean 'x'? possible: …`, without the first part where nothing is near.

    Case makes no difference. Where there is too much to be listed, `rest` says where to look.
    """
    names = list(possible)
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    hint = f"did you mean {by_lower[near[0]]!r}? " if near else ""
    return hint + (rest or f"possible: {', '.join(names) or 'none'}")


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
