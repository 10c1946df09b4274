"""Numbers as readers want them."""


def score(value: float | None) -> str:
    """A score with four digits; nothing for None."""
    return "" if value is None else f"{value:.4g}"


def signed(value: float, digits: int) -> str:
    """A number with its sign, minus as such."""
    return f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def memory(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
