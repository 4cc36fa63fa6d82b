r"""Rational numbers as they are written in answers, compared exactly.

"0.333333", "1/3", "\frac{2}{6}", "0.\overline{3}", "33.3333\%", "six"  ->  a fraction each

One rule says what a decimal stands for (docs/evaluation.md); `same_number` holds it for numbers,
`last_half` and `rounded_half` say how far off the numbers of an expression may be.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from mcore_sft.evaluation.grading.read.words import number_in_words

ENOUGH = 6
"""Significant digits from which on a decimal stands for what it is the rounding of."""
_DOUBLE, _SURE = 15, 12
"""Digits that only a computer prints, and those of them that its errors leave right."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """A rational number and how it was written."""

    value: Fraction
    percent: bool = False
    is_decimal: bool = False
    """Written with a point, also where its digits never end: 0.5, 0.333..."""
    unit: Fraction | None = None
    """Of the last digit behind the point, where there is one."""
    significant: int = 0
    """Digits, without the zeros before them."""


_PLAIN = r"(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
_DECIMAL = re.compile(rf"([+-]?)\s*({_PLAIN})")
_QUOTIENT = re.compile(
    rf"([+-]?)\s*(?:\\frac\{{\s*([+-]?)\s*({_PLAIN})\s*\}}\{{\s*([+-]?)\s*({_PLAIN})\s*\}}"
    rf"|\(?([+-]?)\s*({_PLAIN})\)?\s*/\s*\(?([+-]?)\s*({_PLAIN})\)?)"
)
_SCIENTIFIC = re.compile(
    rf"([+-]?)\s*({_PLAIN})\s*(?:\\times|\\cdot)\s*10\s*\^\s*\{{?\s*([+-]?\d{{1,3}})\s*\}}?"
)
_EXPONENT = re.compile(rf"([+-]?)({_PLAIN})[eE]([+-]?\d{{1,3}})")
_REPEATING = re.compile(
    r"([+-]?)\s*(\d{0,50})\.(\d{0,50})\s*\\(?:overline|bar)\s*(?:\{(\d{1,50})\}|(\d))"
)


def read_number(text: str) -> Number | None:
    """The rational number that `text` spells, or none."""
    percent = text.endswith(r"\%")
    body = text.removesuffix(r"\%").strip()
    if body[:1].isalpha():
        spelt = number_in_words(body)
        return None if spelt is None else Number(value=spelt, percent=percent)
    body = body[1:-1].strip() if re.fullmatch(r"\{[^{}]*\}", body) else body
    if match := _DECIMAL.fullmatch(body):
        return _decimal(match[1], match[2], percent=percent)
    if match := _SCIENTIFIC.fullmatch(body) or _EXPONENT.fullmatch(body):
        return _scaled(_decimal(match[1], match[2], percent=percent), int(match[3]))
    if match := _REPEATING.fullmatch(body):
        value = _sign(match[1]) * _repeating(match[2], match[3], match[4] or match[5])
        return Number(value=value, percent=percent, is_decimal=True)
    quotient = _quotient(body)
    return None if quotient is None else Number(value=quotient, percent=percent)


def same_number(gold: Number, given: Number) -> bool:
    """Whether `given` is right where `gold` is asked for.

    Equal values are; so is the fraction whose rounding is a decimal `gold`, and the rounding, of
    six digits or more, of a `gold` that no decimal is. 5 % is asked for as 5 or as 0.05, and either
    is right; 500 is not.
    """
    if _stands_for(gold, given):
        return True
    return gold.percent != given.percent and _stands_for(_as_ratio(gold), _as_ratio(given))


def _stands_for(gold: Number, given: Number) -> bool:
    if gold.value == given.value:
        return True
    error = abs(gold.value - given.value)
    if gold.unit is not None:
        return not given.is_decimal and error <= gold.unit / 2
    if given.unit is None or is_finite(gold.value):
        return False
    near = error < _last_that_counts(given.unit, given.significant) / 2
    return near and given.significant >= ENOUGH


_POINT = re.compile(r"\d*\.\d+")


def has_decimal(text: str) -> bool:
    """Whether a number with a point stands in `text`."""
    return bool(_POINT.search(text))


def last_half(digits: str) -> Fraction:
    """Half a unit of the last of `digits`, behind a point."""
    return Fraction(1, 2 * 10 ** len(digits.partition(".")[2]))


def rounded_half(digits: str) -> Fraction:
    """How far off a number may be that a model's `digits` stand for; 0 where they are too few."""
    significant = len(digits.replace(".", "").lstrip("0"))
    return (
        _last_that_counts(last_half(digits), significant) if significant >= ENOUGH else Fraction(0)
    )


def is_finite(value: Fraction) -> bool:
    """Whether `value` is a decimal with an end."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _last_that_counts(unit: Fraction, significant: int) -> Fraction:
    """The unit of the last digit that is no error of floating point."""
    return unit * 10 ** (significant - _SURE) if significant >= _DOUBLE else unit


def _decimal(sign: str, digits: str, *, percent: bool) -> Number:
    behind = digits.partition(".")[2]
    return Number(
        value=_sign(sign) * _fraction(digits),
        percent=percent,
        is_decimal=bool(behind),
        unit=Fraction(1, 10 ** len(behind)) if behind else None,
        significant=len(digits.replace(".", "").lstrip("0")),
    )


def _scaled(number: Number, exponent: int) -> Number:
    """`number` times a power of ten; where no digit is behind the point then, it is no decimal."""
    scale = Fraction(10) ** exponent
    unit = None if number.unit is None or number.unit * scale >= 1 else number.unit * scale
    return replace(number, value=number.value * scale, is_decimal=unit is not None, unit=unit)


def _as_ratio(number: Number) -> Number:
    return replace(_scaled(number, -2), percent=False) if number.percent else number


def _fraction(plain: str) -> Fraction:
    return Fraction("0" + plain.rstrip("."))


def _quotient(body: str) -> Fraction | None:
    match = _QUOTIENT.fullmatch(body)
    if not match:
        return None
    sign, *parts = match.groups()
    top_sign, top, bottom_sign, bottom = parts[:4] if parts[1] else parts[4:]
    below = _fraction(bottom)
    if not below:
        return None
    return _sign(sign) * _sign(top_sign) * _sign(bottom_sign) * _fraction(top) / below


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    shift = 10 ** len(fixed)
    return Fraction(int(f"0{whole}{fixed}"), shift) + Fraction(
        int(period), shift * (10 ** len(period) - 1)
    )


def _sign(text: str | None) -> int:
    return -1 if text == "-" else 1
