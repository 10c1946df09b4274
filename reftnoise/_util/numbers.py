"""Numbers as tables and progress show them."""


def significant(value: float, digits: int = 4, *, sign: bool = False) -> str:
    """What was measured, by its first digits, whatever its size: 12.30, 0.0003120, −4.100e-05.

    Args:
        value: the number.
        digits: number of digits.
        sign: whether positive numbers have a sign, too.
    """
    return _with_minus(f"{value:{'+' if sign else ''}#.{digits}g}".removesuffix("."))


def fixed(value: float, decimals: int, *, sign: bool = False) -> str:
    """A number with so many digits after the point, for percentages: 12.3, −0.4.

    Args:
        value: the number.
        decimals: number of digits after the point.
        sign: whether positive numbers have a sign, too.
    """
    return _with_minus(f"{value:{'+' if sign else ''}.{decimals}f}")


def _with_minus(text: str) -> str:
    """A text with a true minus; an exponent keeps its hyphen, as programs write it."""
    return f"−{text[1:]}" if text.startswith("-") else text
