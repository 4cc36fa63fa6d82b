r"""An expression in canonical spelling in, its value at a point out; no sympy, nothing evaluated as
code.

    "\frac{x}{2} + \sqrt{3}"  ->  value at x = 0.7...

It serves to tell expressions apart: those whose values differ at one point are different, which
settles most wrong answers in microseconds. Of real functions it tells too whether they agree
wherever both are defined, as `2\ln x` and `\ln x^2` do, which are different to who takes x for
complex; and of decimals, whether they are the rounding of what stands on the other side.
"""

import cmath
import math
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from mcore_sft.evaluation.grading.read.expression import (
    Ambiguous,
    Arithmetic,
    Reading,
    evaluate,
    is_words,
)

# Values further apart than this part of the larger are different; rounding is far below it, and
# decimals that stand for an exact number may be off by less.
_APART = 1e-4
# Error of the sums: this part of the largest number that was met on the way.
_NOISE = 1e-9
# Real functions are looked at in as many points, and must both be defined in as many of them.
_POINTS, _DEFINED = 80, 6
# Values that agree in this part of the larger are taken for the same real number.
_AGREE = 1e-11
# Of the error that floating point makes of a number of moderate size.
_EXACT = 1e-14

_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    r"\sin": cmath.sin,
    r"\cos": cmath.cos,
    r"\tan": cmath.tan,
    r"\cot": lambda angle: 1 / cmath.tan(angle),
    r"\sec": lambda angle: 1 / cmath.cos(angle),
    r"\csc": lambda angle: 1 / cmath.sin(angle),
    r"\ln": lambda number: cmath.log(_require_positive(number)),
    r"\exp": cmath.exp,
}


def differ(left: str, right: str) -> bool:
    """Whether both texts are expressions whose values differ; false where that is not sure."""
    if is_words(left) or is_words(right):
        return False
    if not _POWER_BEHIND.search(left + right):
        return _apart(left, right, None)
    return _apart(left, right, "outer") and _apart(left, right, "inner")


_POWER_BEHIND = re.compile(r"\\[a-z]+\s*\(.*\)\s*\^")


def _apart(left: str, right: str, reading: Reading | None) -> bool:
    for point in (_some_point, _near_zero):
        a, b = _value(left, point, reading), _value(right, point, reading)
        if a is not None and b is not None:
            size = max(abs(a.value), abs(b.value))
            noise = _NOISE * max(a.largest, b.largest)
            return abs(a.value - b.value) > _APART * size + noise
    return False


def agree(left: str, right: str) -> bool:
    """Whether both texts are real functions that agree wherever both are defined.

    Only of roots and logarithms, where real and complex functions differ; a root of odd degree is
    real, also of a negative number.
    """
    if not _BRANCHES.search(left + right) or is_words(left) or is_words(right):
        return False
    defined, real_only = 0, _has_variables(left + right)
    for place in range(_POINTS):
        point = _Real(place)
        a, b = _value(left, point), _value(right, point)
        if a is None or b is None or not (a.is_moderate and b.is_moderate):
            continue
        if abs(a.value - b.value) > _AGREE * max(abs(a.value), abs(b.value)):
            return False
        defined += 1
        real_only |= a.odd_root or b.odd_root
    return defined >= _DEFINED and real_only


_BRANCHES = re.compile(r"\\ln|\\sqrt|\^\s*\{[^{}]*(?:/|\\frac)")


def _has_variables(text: str) -> bool:
    return bool(re.search("[a-df-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)))


def value_at_a_point(text: str) -> complex | None:
    """The value of an expression where each variable is a number of its own; none of others."""
    value = None if is_words(text) else _value(text, _some_point)
    return None if value is None else value.value


def rounds_to(exact: str, decimals: str, half: Callable[[str], Fraction]) -> bool | None:
    """Whether `decimals`, an expression with decimals in it, is `exact` with its numbers rounded.

    Each number of `decimals` may be off by what `half` says of it. None where that is not sure.
    """
    if is_words(exact) or is_words(decimals):
        return None
    places = [found.span() for found in _DECIMAL.finditer(decimals)]
    for point in (_some_point, _near_zero, _far):
        a, b = _value(exact, point), _value(decimals, point)
        if a is None or b is None:
            return None
        allowed = 0.0
        for start, end in places:
            digits = decimals[start:end]
            moved = f"{float(Fraction(digits) + half(digits)):.25f}"
            other = _value(decimals[:start] + moved + decimals[end:], point)
            if other is None:
                return None
            allowed += abs(other.value - b.value)
        error, noise = abs(a.value - b.value), _EXACT * max(a.largest, b.largest)
        if error > allowed + noise:
            return False
        if error > allowed - noise:
            return None
    return True


_DECIMAL = re.compile(r"\d*\.\d+")

# The number that stands for a variable.
Point = Callable[[str], float]


def _some_point(name: str) -> float:
    return 0.4 + (zlib.crc32(name.encode()) % 99991) / 49999


def _near_zero(name: str) -> float:
    return _some_point(name) / 16


def _far(name: str) -> float:
    return -1024 * _some_point(name)


class _Real:
    """One of many points, negative ones too; roots and logarithms are those of real numbers."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __call__(self, name: str) -> float:
        reach = (2, 20, 200, 2000)[self._place % 4]
        return random.Random(f"{name} {self._place}").uniform(-reach, reach)


@dataclass(frozen=True)
class _Value:
    value: complex
    largest: float  # magnitude on the way to it
    smallest: float  # that is not zero
    odd_root: bool  # of a negative number, taken as real

    @property
    def is_moderate(self) -> bool:
        """Whether no part is too small beside another to be seen."""
        return self.largest < 1e8 and self.smallest > 1e-6


def _value(text: str, point: Point, reading: Reading | None = None) -> _Value | None:
    """The value of `text`; none where there is no one reading."""
    arithmetic = _Floats(point)
    try:
        value = evaluate(text, arithmetic, reading)
    except (Ambiguous, ArithmeticError, ValueError, RecursionError):
        return None
    if not cmath.isfinite(value):
        return None
    return _Value(value, arithmetic.largest, arithmetic.smallest, arithmetic.odd_root)


def _require_positive(number: complex) -> complex:
    """`number`, where roots, logarithms and powers have one value."""
    if number.imag or number.real <= 0:
        raise Ambiguous
    return number


class _Floats(Arithmetic[complex]):
    """Complex numbers, and how large and small they were on the way."""

    def __init__(self, point: Point) -> None:
        self._point = point
        self._real = isinstance(point, _Real)
        self.largest, self.smallest = 0.0, math.inf
        self.odd_root = False

    def number(self, digits: str) -> complex:
        return float(digits)

    def letter(self, name: str) -> complex:
        """i and e are what they are in MATH; any other name is a number of its own."""
        if name == "i":
            if self._real:
                raise Ambiguous
            return 1j
        return {"e": math.e, r"\pi": math.pi}.get(name) or self._point(name)

    def power(self, base: complex, exponent: complex) -> complex:
        if not exponent.imag and not exponent.real % 1:
            return base**exponent
        if self._real and base.real < 0 and not base.imag:
            ratio = Fraction(exponent.real).limit_denominator(20)
            if ratio.denominator % 2 and math.isclose(ratio, exponent.real, rel_tol=1e-14):
                self.odd_root = True
                sign = -1 if ratio.numerator % 2 else 1
                return sign * (-base) ** exponent
        return complex(_require_positive(base) ** exponent)

    def root(self, number: complex, degree: complex | None) -> complex:
        return self.power(number, 1 / (2 if degree is None else degree))

    def call(self, function: str, argument: complex) -> complex:
        return _FUNCTIONS[function](argument)

    def factorial(self, number: complex) -> complex:
        return float(math.factorial(_small(number)))

    def binomial(self, above: complex, below: complex) -> complex:
        return float(math.comb(_small(above), _small(below)))

    def seen(self, number: complex) -> complex:
        size = abs(number)
        self.largest = max(self.largest, size)
        self.smallest = min(self.smallest, size or math.inf)
        return number


def _small(number: complex) -> int:
    if number.imag or number.real % 1 or not 0 <= number.real <= 170:
        raise Ambiguous
    return int(number.real)
