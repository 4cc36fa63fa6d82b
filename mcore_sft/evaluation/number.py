r"""Rational numbers as they are written in answers, compared exactly.

"0.333333", "1/3", "\frac{2}{6}", "0.\overline{3}", "33.3333\%"  ->  a fraction each
"""

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Number:
    """A rational number and how much of it was written."""

    value: Fraction
    percent: bool
    decimals: int | None = None
    """Digits after the point where it is written as a decimal."""
    significant: int = 0


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


_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6}
_PARTS |= {"seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}


def _in_words(text: str) -> Fraction | None:
    """`minus twenty-five`, `one hundred`, `three quarters`; none of anything longer or other."""
    words = re.split(r"[\s\-]+", text.lower()) if len(text) < 40 else []
    if words and words[0] in {"negative", "minus"}:
        value = _in_words(" ".join(words[1:]))
        return None if value is None else -value
    match words:
        case [digits] if digits.isdecimal():
            return Fraction(digits)
        case [one] if one in _ONES:
            return Fraction(_ONES.index(one))
        case [tens] if tens in _TENS:
            return Fraction(10 * _TENS.index(tens) + 20)
        case [tens, one] if tens in _TENS and one in _ONES[1:10]:
            return Fraction(10 * _TENS.index(tens) + 20 + _ONES.index(one))
        case [*few, scale] if few and scale in _SCALES:
            value = _in_words(" ".join(few))
            return None if value is None else value * _SCALES[scale]
        case [one, "hundred", *rest] if one in _ONES[1:10]:
            value = _in_words(" ".join(rest[1:] if rest[0] == "and" else rest))
            return None if value is None else 100 * _ONES.index(one) + value
        case [*few, part] if few and (part in _PARTS or part.removesuffix("s") in _PARTS):
            value = _in_words(" ".join(few))
            size = _PARTS.get(part) or _PARTS[part.removesuffix("s")]
            return None if value is None else value / size
    return None


def read_number(text: str) -> Number | None:
    """The rational number that `text` spells, or none."""
    if text[:1].isalpha() and (spelt := _in_words(text)) is not None:
        return Number(value=spelt, percent=False)
    percent = text.endswith(r"\%")
    body = text.removesuffix(r"\%").strip()
    body = body[1:-1].strip() if re.fullmatch(r"\{[^{}]*\}", body) else body
    if match := _DECIMAL.fullmatch(body):
        digits = match[2].partition(".")[2]
        return Number(
            value=_sign(match[1]) * _fraction(match[2]),
            percent=percent,
            decimals=len(digits) if "." in match[2] else None,
            significant=len(match[2].replace(".", "").lstrip("0")),
        )
    value = _quotient(body)
    if value is None and (match := _SCIENTIFIC.fullmatch(body) or _EXPONENT.fullmatch(body)):
        value = _sign(match[1]) * _fraction(match[2]) * Fraction(10) ** int(match[3])
    if value is None and (match := _REPEATING.fullmatch(body)):
        value = _sign(match[1]) * _repeating(match[2], match[3], match[4] or match[5])
    return None if value is None else Number(value=value, percent=percent)


def same_number(left: Number, right: Number) -> bool:
    """Whether both are one number; a decimal of six digits stands for what it is rounded from.

    5 % of something is asked for as 5 or as 0.05, and either is right; 500 is not.
    """
    if _same(left, right):
        return True
    return left.percent != right.percent and _same(_as_ratio(left), _as_ratio(right))


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


def _as_ratio(number: Number) -> Number:
    if not number.percent:
        return number
    return Number(
        value=number.value / 100,
        percent=False,
        decimals=None if number.decimals is None else number.decimals + 2,
        significant=number.significant,
    )


def _same(left: Number, right: Number) -> bool:
    if left.value == right.value:
        return True
    if left.decimals is None and right.decimals is None:
        return False
    coarse, fine = sorted((left, right), key=lambda n: (n.decimals is None, n.decimals or 0))
    return _rounds_to(coarse, fine.value)


def _rounds_to(decimal: Number, exact: Fraction) -> bool:
    """A decimal of at least six significant digits stands for what rounds, or is cut, to it."""
    if decimal.decimals is None or decimal.significant < 6 or exact.denominator == 1:
        return _almost(decimal, exact)
    unit = Fraction(1, 10**decimal.decimals)
    error = abs(exact) - abs(decimal.value)
    same_sign = (exact < 0) == (decimal.value < 0)
    return same_sign and (abs(error) <= unit / 2 or 0 <= error < unit or _almost(decimal, exact))


def _almost(decimal: Number, exact: Fraction) -> bool:
    """The noise of floating point: twelve digits right, and no more than a thousandth."""
    return abs(decimal.value - exact) <= min(abs(exact) / 10**12, Fraction(1, 1000))
