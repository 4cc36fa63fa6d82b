r"""An expression in, a residue out that is the same for all ways of writing it.

    "(x+1)^2", "x^2+2x+1"  ->  one residue        "2^{5000}", "(1+i)^{10000}"  ->  one residue

Arithmetic with rational numbers, their square roots, i and variables is done in the field of P^2
elements, P a prime of 62 bits, where each variable, e and pi are elements chosen once (Gonnet,
1984). Expressions that are the same have the same residue; others have another, but for a chance of
their degree in 2^61. So both are decided exactly, however large the numbers, in microseconds. What
is no such expression, as a cube root or a sine, has no signature.
"""

import hashlib
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial

from mcore_sft.evaluation.grading.read.expression import Ambiguous, Arithmetic, evaluate, is_words

# A prime that leaves 3 when divided by 4, and that nobody writes: digits of pi, but for the last.
_P = 3141592653589793239
# Beyond them a number is known by its residue alone.
_MAX_BITS = 256
_MAX_FACTORIAL, _SHORT_FACTORIAL = 10_000, 50
_MAX_UNDER_ROOT = 10**9
# Letters that are functions where a bracket follows; capitals side by side are a name.
_NO_PRODUCT = re.compile(r"[fghpqFGHPQ]\s*\(|(?<![a-zA-Z\\])[A-Z]{2,}")


def same_value(left: str, right: str) -> bool | None:
    """Whether both are one number or function; none where a signature does not tell."""
    a = signature(left)
    b = signature(right) if a else None
    return None if a is None or b is None else (a.re, a.im) == (b.re, b.im)


def proportional(left: str, right: str) -> bool:
    """Whether one equation is the other times a number, as far as signatures tell."""
    ratios = []
    for salt in ("", "again"):
        (a, b), (c, d) = (
            [signature(side, salt) for side in equation.split("=")] for equation in (left, right)
        )
        if a is None or b is None or c is None or d is None:
            return False
        below = c + -d
        if not (below.re or below.im):
            return False
        ratios.append((a + -b) / below)
    first, second = ratios
    return (first.re, first.im) == (second.re, second.im) != (0, 0)


@dataclass(frozen=True)
class Residue:
    """re + im * i modulo P, and the rational number itself where that is one and is known."""

    re: int
    im: int
    exact: Fraction | None

    @classmethod
    def of(cls, number: Fraction) -> "Residue":
        """That of a rational number."""
        residue = number.numerator * pow(number.denominator, -1, _P) % _P
        small = max(number.numerator.bit_length(), number.denominator.bit_length()) <= _MAX_BITS
        return cls(residue, 0, number if small else None)

    def __add__(self, other: "Residue") -> "Residue":
        if self.exact is not None and other.exact is not None:
            return Residue.of(self.exact + other.exact)
        return Residue((self.re + other.re) % _P, (self.im + other.im) % _P, None)

    def __neg__(self) -> "Residue":
        exact = None if self.exact is None else -self.exact
        return Residue(-self.re % _P, -self.im % _P, exact)

    def __mul__(self, other: "Residue") -> "Residue":
        if self.exact is not None and other.exact is not None:
            return Residue.of(self.exact * other.exact)
        re = self.re * other.re - self.im * other.im
        im = self.re * other.im + self.im * other.re
        return Residue(re % _P, im % _P, None)

    def __truediv__(self, other: "Residue") -> "Residue":
        if not (other.re or other.im):
            raise ZeroDivisionError
        if self.exact is not None and other.exact is not None:
            return Residue.of(self.exact / other.exact)
        scale = pow(other.re * other.re + other.im * other.im, -1, _P)
        return self * Residue(other.re * scale % _P, -other.im * scale % _P, None)

    def __pow__(self, exponent: int) -> "Residue":
        if exponent < 0:
            return (_ONE / self) ** -exponent
        power, square = _ONE, self
        while exponent:
            power = power * square if exponent & 1 else power
            square = square * square
            exponent >>= 1
        return power


_ONE = Residue(1, 0, Fraction(1))


@lru_cache(maxsize=4096)
def signature(text: str, salt: str = "") -> Residue | None:
    """The residue of `text`; none of what is no expression of such numbers.

    Another `salt` is another choice of what variables are.
    """
    if is_words(text) or _NO_PRODUCT.search(text):
        return None
    try:
        return evaluate(text, _Residues(salt))
    except (Ambiguous, ArithmeticError, ValueError, RecursionError):
        return None


class _Residues(Arithmetic[Residue]):
    def __init__(self, salt: str) -> None:
        self._salt = salt

    def number(self, digits: str) -> Residue:
        return Residue.of(Fraction(digits))

    def letter(self, name: str) -> Residue:
        if name == "i":
            return Residue(0, 1, None)
        chosen = hashlib.blake2b(f"{name} {self._salt}".encode(), digest_size=8).digest()
        return Residue(int.from_bytes(chosen, "big") % _P, 0, None)

    def power(self, base: Residue, exponent: Residue) -> Residue:
        if exponent.exact is None:
            raise Ambiguous
        if exponent.exact.denominator == 1:
            return base ** int(exponent.exact)
        if exponent.exact.denominator != 2 or base.exact is None or base.exact <= 0:
            raise Ambiguous
        return self.root(base, None) ** exponent.exact.numerator

    def root(self, number: Residue, degree: Residue | None) -> Residue:
        if number.exact is None or (degree is not None and degree.exact != 2):
            raise Ambiguous
        if number.exact < 0:
            return Residue(0, 1, None) * self.root(-number, None)
        return _root(number.exact.numerator) / _root(number.exact.denominator)

    def call(self, function: str, argument: Residue) -> Residue:
        raise Ambiguous

    def factorial(self, number: Residue) -> Residue:
        return _factorial(_small(number))

    def binomial(self, above: Residue, below: Residue) -> Residue:
        return Residue.of(Fraction(comb(_small(above), _small(below))))


def _small(number: Residue) -> int:
    """A whole number that is not too large to count to."""
    if number.exact is None or number.exact.denominator != 1:
        raise Ambiguous
    if not 0 <= number.exact <= _MAX_FACTORIAL:
        raise Ambiguous
    return int(number.exact)


@lru_cache(maxsize=256)
def _factorial(number: int) -> Residue:
    if number <= _SHORT_FACTORIAL:
        return Residue.of(Fraction(factorial(number)))
    product = 1
    for factor in range(2, number + 1):
        product = product * factor % _P
    return Residue(product, 0, None)


@lru_cache(maxsize=4096)
def _root(number: int) -> Residue:
    """The square root by those of its prime factors, so that it is that of products too."""
    if number > _MAX_UNDER_ROOT:
        raise Ambiguous
    whole, rest, odd = 1, number, []
    factor = 2
    while factor * factor <= rest:
        while rest % (factor * factor) == 0:
            whole, rest = whole * factor, rest // (factor * factor)
        if rest % factor == 0:
            odd.append(factor)
            rest //= factor
        factor += 1
    product = Residue.of(Fraction(whole if number else 0))
    for prime in (*odd, rest) if rest > 1 else odd:
        product = product * _prime_root(prime)
    return product


def _prime_root(prime: int) -> Residue:
    root = pow(prime, (_P + 1) // 4, _P)  # of the prime or, where that has none, of its negative
    return Residue(root, 0, None) if root * root % _P == prime else Residue(0, root, None)
