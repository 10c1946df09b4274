"""Numbers of tables: their first digits, whatever their size."""

import pytest

from reftnoise._util.numbers import fixed, significant


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (0.000312, 3, False, "0.000312"),
        (0.00031249, 3, False, "0.000312"),
        (12.345, 3, False, "12.3"),
        (0.00031, 3, False, "0.000310"),
        (1.0, 3, False, "1.00"),
        (123.4, 3, False, "123"),
        (0.0, 3, False, "0.00"),
        (0.99375, 4, False, "0.9938"),
        (1.0, 4, False, "1.000"),
        (0.25, 3, True, "+0.250"),
        (-0.0012, 2, True, "−0.0012"),
        (-4.1e-5, 3, False, "−4.10e-05"),
    ],
)
def test_significant_digits(value: float, digits: int, sign: bool, text: str) -> None:
    assert significant(value, digits, sign=sign) == text


def test_fixed_decimals() -> None:
    assert [fixed(x, 1, sign=True) for x in (-0.44, 12.0)] == ["−0.4", "+12.0"]
    assert fixed(12.0, 1) == "12.0"
