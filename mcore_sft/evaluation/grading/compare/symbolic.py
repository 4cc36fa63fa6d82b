r"""Two answers in canonical spelling in, whether sympy finds them the same out.

math-verify reads and compares; what it is known to get wrong is decided here: equations written
otherwise, i as a number, tiny numbers that it rounds to zero, primes that its reader drops. Any of
this may take forever or all memory on a hostile answer: call it where it can be killed.
"""

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

# Numbers are the same only if they agree in this part of the larger.
_EXACT = 1e-30
_DIGITS = 40


class Unreadable(Exception):
    """An answer that sympy's reader makes nothing of; says which of both."""


# Capitals side by side are the name of something, or what came up in a row, and not a product.
_RUN = re.compile(r"(?<![a-zA-Z\\])[A-Z]{2,}(?![a-zA-Z])")


# What sympy's reader leaves out and what says another thing.
_SIGNS = (re.compile(r"\\ldots"), re.compile(r"\bnot\b|n't\b"))


def silence() -> None:
    """math-verify and its parser log every answer that they cannot read."""
    for name in ("math_verify", "latex2sympy2_extended", "sympy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


_DECIMAL = re.compile(r"(?<![\d.])\d*\.\d+(?![\d.]|\s*\\overline)")
# A subscript of a number is read over, and 2!! taken for (2!)!.
_MISREAD = re.compile(r"\d\s*_|!!")


@cache
def prepare() -> None:
    """Import what is needed, silently, and compare once, so that no answer waits for that."""
    silence()
    same_meaning("2^x + 1", "1 + 2^x")


def same_meaning(gold: str, prediction: str) -> bool:
    """Whether math-verify, corrected, takes both for the same; raises `Unreadable`."""
    left, right = _parse(gold), _parse(prediction)
    if left is None:
        raise Unreadable("gold")
    if right is None:
        raise Unreadable("prediction")
    if _marks(gold) != _marks(prediction):
        return False
    if gold.casefold() == prediction.casefold() and gold != prediction:
        return False  # N is not n; sympy's reader takes some for the same
    if any(bool(sign.search(gold)) != bool(sign.search(prediction)) for sign in _SIGNS):
        return False
    if _is_equation(left) and not _is_equation(right) and _is_of_several(gold):
        return False  # a curve, and no value with a name
    if _is_equation(left) and _is_equation(right):
        return _same_equation(left, right)
    named = "=" in gold + prediction  # AB = 5 is 5
    if not named and sorted(_RUN.findall(gold)) != sorted(_RUN.findall(prediction)):
        return False
    if _verify(left, right):
        return not _far_apart(left, right)
    return _has_i(left, right) and _verify(*_with_imaginary_unit(left, right))


def rounds_exactly_to(exact: str, decimals: str, half: Callable[[str], Fraction]) -> bool:
    """What `value.rounds_to` says, to as many digits as it takes."""
    from sympy import Expr, Rational

    numbers = [found.span() for found in _DECIMAL.finditer(decimals)]
    moved = [
        decimals[:start] + _fraction(Fraction(digits) + half(digits)) + decimals[end:]
        for start, end in numbers
        if half(digits := decimals[start:end])
    ]
    read: list[Any] = [_parse(text) for text in (exact, decimals, *moved)]
    if not moved or not all(isinstance(each, Expr) for each in read):
        return False
    names = sorted(set().union(*(each.free_symbols for each in read)), key=str)
    for scale in (1, Rational(1, 64), -1024):
        point = {
            name: scale * Rational(7 + 2 * place, 5 + place) for place, name in enumerate(names)
        }
        left, right, *others = (each.subs(point).evalf(_DIGITS) for each in read)
        if not abs(left - right) <= sum(abs(other - right) for other in others):
            return False
    return True


def _parse(text: str) -> Any | None:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    if _MISREAD.search(text):
        return None
    # units=False: stripping them there eats variables (m, c); malformed_operators=False: it reads
    # on beyond a brace. `normalize` has done both already
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=False, nits=True, boxed="none"
    )
    exact = _DECIMAL.sub(lambda digits: _fraction(Fraction(digits[0])), text)
    found = parse(
        f"${exact}$",
        extraction_config=[LatexExtractionConfig(normalization_config=spelling)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _verify(gold: Any, prediction: Any) -> bool:
    from math_verify import verify

    return bool(verify(gold, prediction, timeout_seconds=None, allow_set_relation_comp=True))


def _marks(text: str) -> list[str]:
    """Primes and stars: `x'` is not `x`."""
    return re.findall(r"(?<=[a-zA-Z\d}])(?:'+|\^\s*\{?\s*(?:\\prime|\\ast|\\star)\s*\}?)", text)


def _far_apart(gold: Any, prediction: Any) -> bool:
    """Whether numbers, or functions at a point, differ by less than math-verify looks at."""
    from sympy import Expr, Rational

    if not (isinstance(gold, Expr) and isinstance(prediction, Expr)):
        return False
    names = sorted(gold.free_symbols | prediction.free_symbols, key=str)
    point = {name: Rational(7 + 2 * place, 5 + place) for place, name in enumerate(names)}
    left, right = (each.subs(point).evalf(_DIGITS) for each in (gold, prediction))
    size = max(abs(left), abs(right))
    if not getattr(size, "is_comparable", False):
        return False
    return bool(abs(left - right) > size * _EXACT)


def _is_equation(parsed: Any) -> bool:
    from sympy import Eq

    return isinstance(parsed, Eq)


def _is_of_several(equation: str) -> bool:
    """Whether its left side has several variables."""
    left = re.sub(r"\\[a-zA-Z]+|_\{?\w+\}?", "", equation.partition("=")[0])
    return len(set(re.findall("[a-z]", left))) > 1


def _same_equation(gold: Any, prediction: Any) -> bool:
    """Whether one equation is the other times a number, denominators cleared."""
    from sympy import cancel, fraction, together

    left, right = (fraction(together(each.lhs - each.rhs))[0] for each in (gold, prediction))
    if left.free_symbols != right.free_symbols:
        return False
    ratio = cancel(left / right)
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def _has_i(*parsed: Any) -> bool:
    return any("i" in map(str, getattr(each, "free_symbols", ())) for each in parsed)


def _with_imaginary_unit(*parsed: Any) -> list[Any]:
    from sympy import I

    return [
        each.subs({s: I for s in getattr(each, "free_symbols", ()) if str(s) == "i"})
        for each in parsed
    ]
