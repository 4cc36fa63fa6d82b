from fractions import Fraction

import pytest

from mcore_sft.evaluation.grading.read.number import (
    Number,
    has_decimal,
    is_finite,
    last_half,
    read_number,
    rounded_half,
    same_number,
)
from mcore_sft.evaluation.grading.read.words import base_in_words, number_in_words


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("42", 42),
        ("-42", -42),
        ("+ 42", 42),
        ("0042", 42),
        ("{42}", 42),
        ("3.", 3),
        (".25", Fraction(1, 4)),
        ("- 0.25", Fraction(-1, 4)),
        ("1/3", Fraction(1, 3)),
        ("-1/3", Fraction(-1, 3)),
        ("(-1)/(-3)", Fraction(1, 3)),
        ("1.5/2", Fraction(3, 4)),
        (r"\frac{2}{6}", Fraction(1, 3)),
        (r"-\frac{-2}{6}", Fraction(1, 3)),
        (r"\frac{2}{-6}", Fraction(-1, 3)),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"-1.2\overline{34}", Fraction(-1222, 990)),
        (r"0.\bar3", Fraction(1, 3)),
        (r"1.5 \times 10^{3}", 1500),
        (r"1.5\cdot 10^3", 1500),
        (r"-2 \times 10^{-3}", Fraction(-2, 1000)),
        ("6e2", 600),
        ("6E+2", 600),
        ("-1.25e-2", Fraction(-125, 10000)),
        (r"5\%", 5),
        ("seven", 7),
        (r"twenty\%", 20),
    ],
)
def test_a_number_is_read(written: str, value: Fraction | int) -> None:
    number = read_number(written)
    assert number is not None
    assert number.value == value
    assert number.percent == written.endswith("%")


@pytest.mark.parametrize(
    "written",
    ["", "x", "1/0", r"\frac{1}{0}", "1 2", "1,2", "2x", "--1", "1.2.3", "1e", "e5", "10^{3}", "."],
)
def test_what_is_no_number_is_not_read(written: str) -> None:
    assert read_number(written) is None


@pytest.mark.parametrize(
    ("written", "unit", "significant"),
    [
        ("12", None, 2),
        ("12.", None, 2),
        ("12.50", Fraction(1, 100), 4),
        ("0.00120", Fraction(1, 100000), 3),
        (r"1.25 \times 10^{-2}", Fraction(1, 10000), 3),
        (r"1.25 \times 10^{1}", Fraction(1, 10), 3),
        (r"1.25 \times 10^{2}", None, 3),
        (r"2 \times 10^{-2}", None, 1),
    ],
)
def test_the_last_digit_of_a_decimal(written: str, unit: Fraction | None, significant: int) -> None:
    number = read_number(written)
    assert number is not None
    assert (number.unit, number.significant) == (unit, significant)
    assert number.is_decimal == (unit is not None)


@pytest.mark.parametrize(
    ("gold", "given"),
    [
        ("0.5", "0.50"),
        ("0.5", "1/2"),
        ("42", "42.0"),
        # a fraction that rounds to a decimal gold
        ("0.33", "1/3"),
        ("0.67", "2/3"),
        ("18.9", r"\frac{737}{39}"),
        ("5.5", "111/20"),
        (r"33.3\%", "1/3"),
        # the rounding of a gold that no decimal is
        ("1/3", "0.333333"),
        ("2/3", "0.666667"),
        ("3/7", "0.428571"),
        ("100/3", "33.3333"),
        ("1/300", "0.00333333"),
        (r"0.\overline{3}", "0.333333"),
        ("1/3", r"3.33333 \times 10^{-1}"),
        ("1/3", r"33.3333\%"),
        # fifteen digits are a computer's, which is sure of twelve
        ("2/3", "0.666666666666666"),
        (r"\frac{3}{56}", "0.0535714285714164"),
        # percent
        ("5", r"5\%"),
        ("0.05", r"5\%"),
        (r"5\%", "1/20"),
        (r"5\%", "5"),
    ],
)
def test_same(gold: str, given: str) -> None:
    assert same(gold, given)


@pytest.mark.parametrize(
    ("gold", "given"),
    [
        ("42", "43"),
        ("0.5", "-0.5"),
        # never another decimal
        ("16386.16", "16386.2"),
        ("1234.56", "1234.569"),
        ("0.33", "0.333333"),
        ("0.333", r"0.\overline{3}"),
        # nor a fraction that does not round to it, nor a whole number
        ("0.33", "1/4"),
        ("0.33", "27/80"),
        (r"1.5 \times 10^{3}", "1499"),
        ("4.96", "5"),
        # fewer digits, no rounding, or a gold that a decimal is
        ("1/3", "0.33333"),
        ("1/3", "0.333334"),
        ("2/3", "0.666666"),
        ("2/3", "0.66666666666666"),
        (r"\frac{3}{56}", "0.053571428571"[:-1] + "2"),
        ("1/300", "0.0033333"),
        ("1/2", "0.5000001"),
        ("1/16", "0.062500001"),
        ("10000000000000", "10000000000001.0"),
        ("3/10", "0.30000000000000004"),
        (r"5\%", "500"),
        (r"5\%", "1/19"),
    ],
)
def test_not_the_same(gold: str, given: str) -> None:
    assert not same(gold, given)


def same(gold: str, given: str) -> bool:
    left, right = read_number(gold), read_number(given)
    assert left is not None
    assert right is not None
    return same_number(left, right)


def test_a_decimal_in_an_expression() -> None:
    assert has_decimal("x + .5") is True
    assert has_decimal("x + 5.") is False


def test_how_far_off_the_numbers_of_an_expression_may_be() -> None:
    assert last_half("0.25") == Fraction(1, 200)
    assert rounded_half("0.33333") == 0
    assert rounded_half("0.333333") == Fraction(1, 2_000_000)
    assert rounded_half("0.0333333") == Fraction(1, 20_000_000)
    assert rounded_half("0.333333333333333") == Fraction(1, 2 * 10**12)


@pytest.mark.parametrize(
    ("value", "finite"),
    [
        (Fraction(1), True),
        (Fraction(3, 40), True),
        (Fraction(1, 7), False),
        (Fraction(1, 6), False),
    ],
)
def test_decimals_with_an_end(value: Fraction, finite: bool) -> None:
    assert is_finite(value) == finite


def test_what_is_not_said_of_a_number() -> None:
    assert Number(value=Fraction(1)) == Number(
        value=Fraction(1), percent=False, is_decimal=False, unit=None, significant=0
    )


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("zero", 0),
        ("nineteen", 19),
        ("twenty", 20),
        ("Twenty-Five", 25),
        ("ninety nine", 99),
        ("one hundred", 100),
        ("a hundred", 100),
        ("one hundred and five", 105),
        ("twelve hundred", 1200),
        ("six thousand nine", 6009),
        ("two thousand and one", 2001),
        ("five hundred thousand", 500_000),
        ("nine hundred ninety-nine thousand, nine hundred ninety-nine", 999_999),
        ("one million two hundred thousand and one", 1_200_001),
        ("three billion", 3 * 10**9),
        ("two trillion", 2 * 10**12),
        ("minus seven", -7),
        ("negative two thirds", Fraction(-2, 3)),
        ("one half", Fraction(1, 2)),
        ("a half", Fraction(1, 2)),
        ("two halves", 1),
        ("three quarters", Fraction(3, 4)),
        ("five sixteenths", Fraction(5, 16)),
        ("three and a half", Fraction(7, 2)),
        ("two point five", Fraction(5, 2)),
        ("zero point zero four", Fraction(1, 25)),
        ("minus 5", -5),
    ],
)
def test_numbers_in_words(words: str, value: Fraction | int) -> None:
    assert number_in_words(words) == value


@pytest.mark.parametrize(
    "words",
    [
        *("", "and", "five and", "one two", "thousand", "third", "twenty zero", "half"),
        *("one thousand thousand", "two hundred thousand million", "a", "point five", "minus"),
        *("five apples", "one hundred and", "two point", "one " * 40),
    ],
)
def test_other_words_are_no_number(words: str) -> None:
    assert number_in_words(words) is None


def test_a_base_in_words() -> None:
    assert (base_in_words("eight"), base_in_words("16"), base_in_words("n")) == ("8", "16", "n")
