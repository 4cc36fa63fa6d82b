r"""An expression in canonical spelling in, its value at a point out; no sympy, nothing evaluated as
code.

    "\frac{x}{2} + \sqrt{3}"  ->  value at x = 0.7...

It serves to tell expressions apart: those whose values differ at one point are different, which
settles most wrong answers in microseconds. That values agree proves nothing here. What has more
than one reading (`1/2x`, `x^10`, `\sin x(y)`) has no value.
"""

import cmath
import math
import re
import zlib
from collections.abc import Callable

# Values further apart than this part of the larger are different; rounding is far below it, and
# decimals that stand for an exact number may be off by less.
_APART = 1e-4
# Error of the sums: this part of the largest number that was met on the way.
_NOISE = 1e-9
_MAX_TOKENS = 400

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
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", left + right):
        return False  # words, not products
    a, b = _value(left), _value(right)
    if a is None or b is None:
        return False
    size = max(abs(a[0]), abs(b[0]))
    return abs(a[0] - b[0]) > _APART * size + _NOISE * max(a[1], b[1])


def _value(text: str) -> tuple[complex, float] | None:
    """Value, and the largest magnitude on the way to it; none where there is no one reading."""
    try:
        reader = _Reader(text)
        value = reader.expression()
        if reader.token is not None or not cmath.isfinite(value):
            return None
        return value, reader.largest
    except (_Ambiguous, ArithmeticError, ValueError):
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

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        place, end = 0, len(text.rstrip())
        while place < end:
            found = _TOKEN.match(text, place)
            if not found or len(self._tokens) > _MAX_TOKENS:
                raise _Ambiguous
            self._tokens.append(found[1])
            place = found.end()
        self._place = 0
        self.largest = 0.0

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
        if exponent.imag or exponent.real % 1:
            _require_positive(base)
        return self._seen(base**exponent)

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
            return self._seen(_require_positive(self._group()) ** (1 / degree))
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
            return 1j
        if name == "e":
            return math.e
        return 0.4 + (zlib.crc32(name.encode()) % 99991) / 49999

    def _next(self) -> str:
        token = self.token
        if token is None:
            raise _Ambiguous
        self._place += 1
        return token

    def _seen(self, value: complex) -> complex:
        self.largest = max(self.largest, abs(value))
        return value
