r"""An expression in canonical spelling in, its value at a point out; no sympy, nothing evaluated as
code.

    "\frac{x}{2} + \sqrt{3}"  ->  value at x = 0.7...

It serves to tell expressions apart: those whose values differ at one point are different, which
settles most wrong answers in microseconds. What has more than one reading (`1/2x`, `x^10`,
`\sin x(y)`) has no value. Of real functions it tells too whether they agree wherever both are
defined, as `2\ln x` and `\ln x^2` do, which are different to who takes x for complex.
"""

import cmath
import math
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

# Values further apart than this part of the larger are different; rounding is far below it, and
# decimals that stand for an exact number may be off by less.
_APART = 1e-4
# Error of the sums: this part of the largest number that was met on the way.
_NOISE = 1e-9
_MAX_TOKENS = 400
# Real functions are looked at in as many points, and must both be defined in as many of them.
_POINTS, _DEFINED = 80, 6
# Values that agree in this part of the larger are taken for the same real number.
_AGREE = 1e-11

_TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|\d+(?:\.\d+)?|\.\d+|[a-zA-Z](?:_\{\w+\})?|[-+/^(){}\[\]])")
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
_TIMES = {r"\cdot", r"\times"}
_STARTS = {r"\frac", r"\sqrt", r"\pi", "(", "{", *_FUNCTIONS}
_CLOSING = {"(": ")", "{": "}", "[": "]"}


def differ(left: str, right: str) -> bool:
    """Whether both texts are expressions whose values differ; false where that is not sure."""
    if _is_words(left) or _is_words(right):
        return False
    for point in (_some_point, _near_zero):
        a, b = _value(left, point), _value(right, point)
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
    if not _BRANCHES.search(left + right) or _is_words(left) or _is_words(right):
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
    value = None if _is_words(text) else _value(text, _some_point)
    return None if value is None else value.value


# The number that stands for a variable.
Point = Callable[[str], float]


def _some_point(name: str) -> float:
    return 0.4 + (zlib.crc32(name.encode()) % 99991) / 49999


def _near_zero(name: str) -> float:
    return _some_point(name) / 16


class _Real:
    """One of many points, negative ones too; roots and logarithms are those of real numbers."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __call__(self, name: str) -> float:
        reach = (2, 20, 200, 2000)[self._place % 4]
        return random.Random(f"{name} {self._place}").uniform(-reach, reach)


def _is_words(text: str) -> bool:
    """Whether letters stand there that are no product."""
    return bool(re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", text))


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


def _value(text: str, point: Point) -> _Value | None:
    """The value of `text`; none where there is no one reading."""
    try:
        reader = _Reader(text, point)
        value = reader.expression()
        if reader.token is not None or not cmath.isfinite(value):
            return None
        return _Value(value, reader.largest, reader.smallest, reader.odd_root)
    except (_Ambiguous, ArithmeticError, ValueError, RecursionError):
        return None


class _Ambiguous(Exception):
    """The text has no value, or more than one."""


def _require_positive(number: complex) -> complex:
    """`number`, where roots, logarithms and powers have one value."""
    if number.imag or number.real <= 0:
        raise _Ambiguous
    return number


class _Reader:
    """Recursive descent over the tokens; each method takes what it reads."""

    def __init__(self, text: str, point: Point) -> None:
        self._point = point
        self._real = isinstance(point, _Real)
        self._tokens: list[str] = []
        place, end = 0, len(text.rstrip())
        while place < end:
            found = _TOKEN.match(text, place)
            if not found or len(self._tokens) > _MAX_TOKENS:
                raise _Ambiguous
            self._tokens.append(found[1])
            place = found.end()
        self._place = 0
        self.largest, self.smallest = 0.0, math.inf
        self.odd_root = False

    @property
    def token(self) -> str | None:
        """The next token, or none at the end."""
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def expression(self) -> complex:
        """Terms with + and - between them."""
        total = self._signed_term()
        while self.token in {"+", "-"}:
            total = self._seen(total + self._signed_term())
        return total

    def _signed_term(self) -> complex:
        sign = 1
        while self.token in {"+", "-"}:
            sign = -sign if self._next() == "-" else sign
        return sign * self._term()

    def _term(self) -> complex:
        product = self._power()
        while self.token is not None:
            if self.token in _TIMES:
                self._next()
                product = self._seen(product * self._signed_power())
            elif self.token == "/":
                self._next()
                product = self._seen(product / self._signed_power())
                if self._starts_factor():
                    raise _Ambiguous  # 1/2x
            elif self._starts_factor():
                if self.token[0].isdigit() or self.token[0] == ".":
                    raise _Ambiguous  # 2 3, x 3
                product = self._seen(product * self._power())
            else:
                break
        return product

    def _starts_factor(self) -> bool:
        token = self.token
        return token is not None and (token in _STARTS or token[0].isalnum() or token[0] == ".")

    def _signed_power(self) -> complex:
        sign = 1
        while self.token in {"+", "-"}:
            sign = -sign if self._next() == "-" else sign
        return sign * self._power()

    def _power(self) -> complex:
        base = self._factor()
        if self.token != "^":
            return base
        self._next()
        exponent = self._exponent()
        if self.token == "^":
            raise _Ambiguous
        return self._seen(self._raised(base, exponent))

    def _raised(self, base: complex, exponent: complex) -> complex:
        if not exponent.imag and not exponent.real % 1:
            return base**exponent
        if self._real and base.real < 0 and not base.imag:
            ratio = Fraction(exponent.real).limit_denominator(20)
            if ratio.denominator % 2 and math.isclose(ratio, exponent.real, rel_tol=1e-14):
                self.odd_root = True
                sign = -1 if ratio.numerator % 2 else 1
                return sign * (-base) ** exponent
        return complex(_require_positive(base) ** exponent)

    def _exponent(self) -> complex:
        if self.token == "{":
            return self._group()
        token = self._next()
        if len(token) == 1 and token.isdigit():
            return float(token)
        if token[0].isalpha():
            return self._letter(token)
        raise _Ambiguous  # x^10 is x^1 0 in LaTeX

    def _factor(self) -> complex:
        token = self.token
        if token in {"(", "{"}:
            return self._group()
        token = self._next()
        if token[0].isdigit() or token[0] == ".":
            return self._seen(float(token))
        if token[0].isalpha():
            return self._letter(token)
        if token == r"\pi":
            return math.pi
        if token == r"\frac":
            top, bottom = self._group(), self._group()
            return self._seen(top / bottom)
        if token == r"\sqrt":
            degree = self._group() if self.token == "[" else 2
            return self._seen(self._raised(self._group(), 1 / degree))
        if token in _FUNCTIONS:
            return self._function(_FUNCTIONS[token])
        raise _Ambiguous

    def _function(self, function: Callable[[complex], complex]) -> complex:
        power: complex = 1
        if self.token == "^":
            self._next()
            power = self._exponent()
            if power == -1:
                raise _Ambiguous  # the inverse function
        if self.token in {"(", "{"}:
            argument = self._group()
            if self.token == "^" or (self.token and self.token in {"(", "{"}):
                raise _Ambiguous  # \sin(x)^2, \sin(x)(y)
        else:
            argument = self._bare_argument()
        return self._seen(function(argument) ** power)

    def _bare_argument(self) -> complex:
        """A product of numbers and letters, as in 2x; a bracket after it is of one or the other."""
        product: complex = 1
        start = self._place
        while self.token is not None and (self.token[0].isalnum() or self.token in {r"\pi"}):
            product *= self._power()
        if self._place == start or self.token in {"(", "{", "/", r"\frac", r"\sqrt", *_TIMES}:
            raise _Ambiguous
        return product

    def _group(self) -> complex:
        opening = self._next()
        if opening not in _CLOSING:
            raise _Ambiguous
        value = self.expression()
        if self._next() != _CLOSING[opening]:
            raise _Ambiguous
        return value

    def _letter(self, name: str) -> complex:
        """i and e are what they are in MATH; any other name is a number of its own."""
        if name == "i":
            if self._real:
                raise _Ambiguous
            return 1j
        return math.e if name == "e" else self._point(name)

    def _next(self) -> str:
        token = self.token
        if token is None:
            raise _Ambiguous
        self._place += 1
        return token

    def _seen(self, value: complex) -> complex:
        size = abs(value)
        self.largest = max(self.largest, size)
        self.smallest = min(self.smallest, size or math.inf)
        return value
