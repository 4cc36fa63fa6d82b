from fractions import Fraction

import pytest

from mcore_sft.evaluation.grading.read.units import (
    DEGREE,
    DOUBLE_PRIME,
    PRIME,
    RADIAN,
    in_units_of,
    read_unit,
    without_units,
)


@pytest.mark.parametrize(
    ("words", "powers", "size"),
    [
        ("cm", (("length", 1),), "1/100"),
        ("cm^2", (("length", 2),), "1/10000"),
        ("square centimeters", (("length", 2),), "1/10000"),
        ("cubic metres", (("length", 3),), "1"),
        ("litres", (("length", 3),), "1/1000"),
        ("inches", (("length", 1),), "127/5000"),
        ("sq in", (("length", 2),), "16129/25000000"),
        ("hours a day", (("time", 0),), "1/24"),
        ("km/h", (("length", 1), ("time", -1)), "5/18"),
        ("kilometers per hour", (("length", 1), ("time", -1)), "5/18"),
        ("mph", (("length", 1), ("time", -1)), "1397/3125"),
        ("cents", (("dollar", 1),), "1/100"),
        ("centuries", (("year", 1),), "100"),
        ("m", (("length", 1),), "1"),
    ],
)
def test_units_are_read(words: str, powers: tuple[tuple[str, int], ...], size: str) -> None:
    unit = read_unit(words)
    assert unit is not None
    assert unit.powers == tuple(power for power in powers if power[1])
    assert unit.size == Fraction(size)


@pytest.mark.parametrize("words", ["", "apples", "in total", "theta", "x"])
def test_other_words_are_no_unit(words: str) -> None:
    assert read_unit(words) is None


@pytest.mark.parametrize(
    ("gold", "given", "factor"),
    [
        ("cm", "cm", ""),
        ("dollars", "cents", r"\frac{1}{100}"),
        ("cents", "dollars", r"\frac{100}{1}"),
        ("minutes", "hours", r"\frac{60}{1}"),
        ("liters", "cm^3", r"\frac{1}{1000}"),
        ("dollars", "dollars per pound", ""),
        ("square units", "cm^2", ""),
        ("units", "cm^2", ""),
        ("cm", "cm^2", None),
        ("cubic units", "cm^2", None),
        ("hours", "dollars", None),
        ("miles per hour", "miles", None),
    ],
)
def test_one_unit_in_another(gold: str, given: str, factor: str | None) -> None:
    left, right = read_unit(gold), read_unit(given)
    assert left is not None
    assert right is not None
    assert in_units_of(left, right) == factor


def test_angles_and_primes() -> None:
    assert in_units_of(DEGREE, RADIAN) == r"\frac{180}{1} \cdot \frac{1}{\pi}"
    assert in_units_of(RADIAN, DEGREE) == r"\frac{1}{180} \cdot \frac{\pi}{1}"
    assert in_units_of(DEGREE, PRIME) == r"\frac{1}{60}"
    assert in_units_of(PRIME, DEGREE) == r"\frac{60}{1}"
    feet, dollars = read_unit("feet"), read_unit("dollars")
    assert feet is not None
    assert dollars is not None
    assert in_units_of(feet, PRIME) == ""
    assert in_units_of(feet, DOUBLE_PRIME) == r"\frac{1}{12}"
    assert in_units_of(dollars, PRIME) is None


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("12inches", "12"),
        ("12dollars", "12"),
        ("12abc", "12abc"),
        (r"20\% increase", r"20\%"),
        ("5 feet 3 inches", "63"),
        ("1 hour and 30 minutes", "90"),
        ("1 minute 30 hours", "1 minute 30 hours"),
        ("1 hour 30 inches", "1 hour 30 inches"),
        ("x = 5 cm", "x =5"),
        ("5 or more", "5 or more"),
        ("7th", "7"),
    ],
)
def test_words_of_measure_are_taken_off(text: str, rest: str) -> None:
    assert without_units(text)[0] == rest
