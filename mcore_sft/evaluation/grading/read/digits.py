r"""Two expressions of numbers in, whether they agree in fifty digits out.

    "2\sqrt{141-20\sqrt{41}} + 2\sqrt{20\sqrt{41}+141}", "40"  ->  yes

Roots of roots, cube roots, sines and logarithms of numbers: what people write of them and is not
the same differs long before. Numbers so large or small that this would not hold are not looked at.
"""

from collections.abc import Callable
from typing import Any

from mcore_sft.evaluation.grading.read.expression import Ambiguous, Arithmetic, evaluate, is_words

_DIGITS, _AGREE = 60, 1e-45
_LARGEST, _SMALLEST = 1e15, 1e-15


def agree_in_digits(left: str, right: str) -> bool:
    """Whether both are numbers that agree; false where one is no number, or is not sure."""
    import mpmath

    if is_words(left) or is_words(right):
        return False
    with mpmath.workdps(_DIGITS):
        try:
            a, b = (evaluate(text, _ManyDigits(mpmath.mp)) for text in (left, right))
        except (Ambiguous, ArithmeticError, ValueError, RecursionError):
            return False
        return bool(abs(a - b) < _AGREE)


class _ManyDigits(Arithmetic[Any]):
    def __init__(self, mp: Any) -> None:
        self._mp = mp
        self._functions: dict[str, Callable[[Any], Any]] = {
            rf"\{name}": getattr(mp, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")
        }
        self._functions |= {r"\exp": mp.exp, r"\ln": lambda number: mp.log(_positive(number))}

    def number(self, digits: str) -> Any:
        return self._mp.mpf(digits)

    def letter(self, name: str) -> Any:
        numbers = {"i": self._mp.j, "e": +self._mp.e, r"\pi": +self._mp.pi}
        if name not in numbers:
            raise Ambiguous
        return numbers[name]

    def power(self, base: Any, exponent: Any) -> Any:
        whole = not exponent.imag and exponent.real == int(exponent.real)
        return base ** int(exponent.real) if whole else _positive(base) ** exponent

    def root(self, number: Any, degree: Any | None) -> Any:
        return _positive(number) ** (1 / (self._mp.mpf(2) if degree is None else degree))

    def call(self, function: str, argument: Any) -> Any:
        return self._functions[function](argument)

    def factorial(self, number: Any) -> Any:
        raise Ambiguous

    def binomial(self, above: Any, below: Any) -> Any:
        raise Ambiguous

    def seen(self, number: Any) -> Any:
        """`number`, if it is neither large nor small."""
        size = abs(number)
        if size > _LARGEST or 0 < size < _SMALLEST:
            raise Ambiguous
        return number


def _positive(number: Any) -> Any:
    if number.imag or number.real <= 0:
        raise Ambiguous
    return number.real
