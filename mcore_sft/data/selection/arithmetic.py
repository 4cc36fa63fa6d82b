"""Text in, its arithmetic judged or spelt out: `1 + 2 + 3 = 6` -> `1 + 2 + 3 = 3 + 3 = 6`.

The text was written by a model: it is parsed, never run, and its numbers cannot grow beyond bounds.

Each function reads a text in one of two ways. NeMo-Skills' (May 2025) takes any run of digits,
spaces and `.+-/*=()`: it goes on over the end of a line, cuts `1,000` in two, loses the x of
`x + 1 + 2`, and passes over what cannot be solved, such as a division by zero. `standalone` takes
an equation that stands by itself in one line, compares all its sides, and counts a division by zero
as wrong. Both look at equations with two operators at least.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from math import isclose

Number = int | float

TOLERANCE = 1e-4
"""Relative difference up to which the sides of an equation are equal."""

_LONGEST = 300  # characters of an expression that is looked at
_MOST = 1000  # expressions of one text that are looked at
_BITS = 4096  # of an integer on the way
# NeMo-Skills asks str.isdigit, which knows these beside the decimal digits of \d.
_DIGITS = (
    r"\d\u00b2\u00b3\u00b9\u1369-\u1371\u19da\u2070\u2074-\u2079\u2080-\u2089\u2460-\u2468"
    r"\u2474-\u247c\u2488-\u2490\u24ea\u24f5-\u24fd\u24ff\u2776-\u277e\u2780-\u2788\u278a-\u2792"
    r"\U00010a40-\U00010a43\U00010e60-\U00010e68\U00011052-\U0001105a\U0001f100-\U0001f10a"
)
_RUN = re.compile(rf"[{_DIGITS}()+*/-][{_DIGITS}\s()+*/=.-]*+")
_RUN_BACKWARDS = re.compile(rf"[{_DIGITS}\s()+*/=.-]*+")
_LOOSE_POINT = re.compile(rf"(?<![{_DIGITS}])\.")
_TOKEN = re.compile(r"(?P<number>(?<!\d)-\d+(?:\.\d+)?|\d+(?:\.\d+)?)|\*\*|[+*/()-]")
_NEGATIVE = re.compile(r"(?<!\d)(-\d+(?:\.\d+)?)")
_OPERAND = re.compile(r"(?<=[+*/-])( ?)(-\d+(?:\.\d+)?)")
_BINDING = {"(": 0, ")": 1, "+": 2, "-": 2, "*": 3, "/": 3, "**": 4}

_STANDALONE = re.compile(r"(?:\d|-(?=[\d(])|(?<!\\)\()[\d \t()+*/=.-]*+", re.ASCII)
_STANDALONE_BACKWARDS = re.compile(r"[\d \t()+*/=.-]*+", re.ASCII)
# What makes an equation part of a formula ends with its first character ...
_SIGNS = r"\u00b7\u00d7\u00f7\u2013\u2212"
_TIED_BEFORE = re.compile(
    r"[\w)\]}%!][ \t]*-$|(?:[\w)\]}^%!,.\\\u221a]"
    rf"|[+*/{_SIGNS}-][ \t]*|(?:\\[a-zA-Z]+|\b[a-zA-Z])[ \t]+).$"
)
# ... or follows its last one: a factor, a unit, a thousands separator; a word does not.
_TIED_AFTER = re.compile(
    rf"[ \t]*(?:[_^{{%!{_SIGNS}]|,\d|\\[a-zA-Z])|[^\W\d_]|[ \t]+[^\W\d_](?![^\W\d_])"
)
_PLAIN = re.compile(r" *[1-9][0-9]* *")
_ONE_NUMBER = re.compile(r"\s*-?\d+(?:\.\d+)?\s*", re.ASCII)
_UNWRITABLE = re.compile(r"\.\d{7}")

_OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


class NotArithmetic(ValueError):
    """The text is not an expression of numbers, or its value is out of bounds."""


def has_wrong_equation(text: str, *, standalone: bool = False) -> bool:
    """Whether an equation in `text` does not hold; NeMo-Skills compares its first and last side."""
    if "=" not in text:
        return False
    if standalone:
        return any(not _holds(sides) for sides, _, _ in _equations(text))
    for run, _ in _runs(text):
        first, *rest = run.split("=")
        if not rest:
            continue
        try:
            if not isclose(evaluate(steps(first)[-1]), evaluate(rest[-1]), rel_tol=TOLERANCE):
                return True
        except (NotArithmetic, ArithmeticError):
            continue
    return False


def spell_out(text: str, *, standalone: bool = False) -> str:
    """`text` with each right equation of two sides solved step by step.

    NeMo-Skills' way writes an equation twice where a point follows that is no decimal point, and
    joins lines; `standalone` changes an equation only if every step equals the first.
    """
    if "=" not in text:
        return text
    written, done = [], 0
    for new, start, end in _standalone_chains(text) if standalone else _chains(text):
        written += [text[done:start], new]
        done = end
    return "".join([*written, text[done:]])


def evaluate(text: str) -> Number:
    """Value of an expression in Python's grammar of numbers, + - * / // ** and parentheses.

    `NotArithmetic` where there is none, or where an integer passes 4096 bits; ZeroDivisionError.
    """
    if len(text) > 4 * _LONGEST:
        raise NotArithmetic("too long")
    if _PLAIN.fullmatch(text):
        return int(text)
    try:
        return _value(ast.parse(text.lstrip(" \t"), mode="eval").body)
    except ZeroDivisionError:
        raise
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
        raise NotArithmetic(text) from None


def steps(expression: str) -> list[str]:
    """`expression` and what is left of it after each operation, as NeMo-Skills solves it.

    It works on the text, in floating point: `**` binds to the left, a minus before a digit is a
    sign (so `10 -3` cannot be solved), and `1e-05` is read as two numbers. `NotArithmetic` where
    it comes to no end, a division by zero too.
    """
    done = [expression]
    while len(tokens := list(_TOKEN.finditer(expression))) > 1:
        left, sign, right = _first_operation(tokens)
        before, after = expression[: left.start()], expression[right.end() :]
        if before.endswith("(") and after.startswith(")"):
            before, after = before[:-1], after[1:]
        expression = before + _calculate(left.group(), sign, right.group()) + after
        done.append(expression)
    return done


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            a, b = _value(left), _value(right)
            if isinstance(sign, ast.Pow) and isinstance(a, int) and a.bit_length() * b > _BITS:
                raise NotArithmetic("too large")
            result = _BINARY[type(sign)](a, b)
            if isinstance(result, complex):
                raise NotArithmetic("not real")
            if isinstance(result, int) and result.bit_length() > _BITS:
                raise NotArithmetic("too large")
            return result
    raise NotArithmetic(type(node).__name__)


def _first_operation(tokens: list[re.Match[str]]) -> tuple[re.Match[str], str, re.Match[str]]:
    """The operation that comes first in postfix order: left operand, operator, right operand."""
    postfix: list[re.Match[str]] = []
    waiting: list[re.Match[str]] = []
    for token in tokens:
        if token["number"]:
            postfix.append(token)
            continue
        sign = token.group()
        while sign != "(" and waiting and _BINDING[waiting[-1].group()] >= _BINDING[sign]:
            postfix.append(waiting.pop())
        if sign != ")":
            waiting.append(token)
        elif waiting:
            waiting.pop()
        else:
            raise NotArithmetic("a parenthesis that was not opened")
    postfix += reversed(waiting)
    at = next((at for at, token in enumerate(postfix) if not token["number"]), 0)
    if at < 2 or postfix[at].group() == "(":
        raise NotArithmetic("an operator without its operands")
    return postfix[at - 2], postfix[at].group(), postfix[at - 1]


def _calculate(left: str, sign: str, right: str) -> str:
    try:
        result = _OPERATIONS[sign](float(left), float(right))
    except ArithmeticError:
        raise NotArithmetic(f"{left} {sign} {right}") from None
    if isinstance(result, complex):
        raise NotArithmetic("not real")
    return str(int(result) if result.is_integer() else result)


def _runs(text: str) -> Iterator[tuple[str, int]]:
    """NeMo-Skills' expressions, and where they start: runs with two operators at least.

    A point after anything but a digit is left out of the run; what stands before it is given once
    already, however few its operators are.
    """
    for run, start in _around_equals(text, _RUN, _RUN_BACKWARDS):
        *early, whole = accumulate(_LOOSE_POINT.split(run)) if "." in run else [run]
        for part in early:
            yield part.rstrip(), start
        if _operators(whole) >= 2:
            yield whole.rstrip(), start


def _around_equals(
    text: str, run: re.Pattern[str], backwards: re.Pattern[str]
) -> Iterator[tuple[str, int]]:
    """Matches of `run` that hold "=", from the "=" on to both sides, for most runs hold none."""
    done = found = 0
    while found < _MOST and (at := text.find("=", done)) >= 0:
        before = backwards.match(text[max(done, at - _LONGEST) : at][::-1])
        first = run.search(text, at - (before.end() if before else 0), at)
        whole = run.match(text, first.start()) if first else None
        if whole and len(whole.group()) <= _LONGEST:
            found += 1
            yield whole.group(), whole.start()
        done = whole.end() if whole else at + 1


def _operators(text: str) -> int:
    return text.count("+") + text.count("-") + text.count("*") + text.count("/")


def _chains(text: str) -> Iterator[tuple[str, int, int]]:
    """What NeMo-Skills writes in place of text[start:end]; nothing, at the end of other runs."""
    for run, start in _runs(text):
        end = start + len(run)
        sides = run.split("=")
        try:
            chain = steps(sides[0]) if len(sides) == 2 else []
            right = bool(chain) and evaluate(chain[-1]) == evaluate(sides[1])
        except (NotArithmetic, ArithmeticError):
            right = False
        if right:
            signed = [_NEGATIVE.sub(r"(\1)", step) for step in chain[:-1]]
            yield re.sub(r"\s+", " ", " = ".join([*signed, chain[-1].strip()])), start, end
        else:
            yield "", end, end


def _standalone_chains(text: str) -> Iterator[tuple[str, int, int]]:
    for sides, start, end in _equations(text):
        if len(sides) != 2 or not _ONE_NUMBER.fullmatch(sides[1]):
            continue
        try:
            chain = [step.strip() for step in steps(sides[0])]
            values = [evaluate(side) for side in [*chain, sides[1]]]
        except (NotArithmetic, ArithmeticError):
            continue
        if any(_UNWRITABLE.search(step) for step in chain):
            continue
        if all(isclose(value, values[-1]) for value in values):
            signed = [_OPERAND.sub(r"\1(\2)", step) for step in chain[1:-1]]
            yield " = ".join([chain[0], *signed, sides[1].strip()]), start, end


def _equations(text: str) -> Iterator[tuple[list[str], int, int]]:
    """Sides of each equation that stands by itself, as text[start:end]."""
    for run, start in _around_equals(text, _STANDALONE, _STANDALONE_BACKWARDS):
        run = run.rstrip(" \t")
        if _operators(run) < 2:
            continue
        if _TIED_BEFORE.search(text, max(0, start - 40), start + 1) or _TIED_AFTER.match(
            text, start + len(run)
        ):
            continue
        run = run.rstrip(" \t.")
        first = run.partition("=")[0]
        if run.startswith("(") and first.count("(") > first.count(")"):
            start, run = start + 1, run[1:]
        if run.count(")") > run.count("("):
            run = run.removesuffix(")")
        yield run.split("="), start, start + len(run)


def _holds(sides: list[str]) -> bool:
    """Whether all sides are equal; a side that is no arithmetic says nothing."""
    try:
        values = [evaluate(side) for side in sides]
        return all(isclose(a, b, rel_tol=TOLERANCE) for a, b in pairwise(values))
    except ZeroDivisionError:
        return False
    except (NotArithmetic, OverflowError):
        return True
