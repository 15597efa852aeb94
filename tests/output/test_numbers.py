"""Times, counts and intervals as people read them."""

import pytest

from prime_v2.output.numbers import duration, interval, quantity, three_digits


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (duration, 59.4, "59 s"),
        (duration, 59.6, "1.0 min"),
        (duration, 642.3, "10.7 min"),
        (duration, 3598, "1.0 h"),
        (quantity, 0, "0"),
        (quantity, 640, "640"),
        (quantity, 999.6, "1 K"),
        (quantity, 786_432, "786 K"),
        (quantity, 999_600, "1 M"),
        (quantity, 40.6e9, "40.6 B"),
        (quantity, 1.5e12, "1.5 T"),
        (three_digits, 0.039512, "0.0395"),
        (three_digits, 12.34, "12.3"),
        (three_digits, 17_849, "17800"),
    ],
)
def test_a_number_has_the_digits_that_are_read(form, value, expected):
    assert form(value) == expected


def test_an_interval_has_both_ends_or_none():
    assert interval([1.23456, 20_123]) == "[1.23, 20100]"
    assert interval([0.5, None], "{:.3f}".format) == "[0.500, inf]"
    assert interval(None) == ""
