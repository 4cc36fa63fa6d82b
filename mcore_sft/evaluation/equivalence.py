r"""Two answers in, whether they mean the same out, with the rule that decided.

    gold, prediction  ->  canonical spelling  ->  exact rules  ->  (else) math-verify

The exact rules need no sympy, evaluate nothing and are quick on any short text. `symbolic` can take
forever or all memory on a hostile answer, so it is for a process that can be killed (`grade`).
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any, Literal

from mcore_sft.evaluation.normalize import normalize
from mcore_sft.evaluation.value import differ

Outcome = Literal["equal", "different", "no_answer", "unparsable", "timeout", "unsafe"]

MAX_LENGTH = 2000
_MAX_DIGITS = 400
_MAX_NESTING = 60
_MAX_EXPONENT = 100_000
_MAX_FACTORIAL = 10_000


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was decided about one answer, and by which rule."""

    outcome: Outcome
    rule: str

    @property
    def correct(self) -> bool:
        """Whether the answer counts as right."""
        return self.outcome == "equal"


def judge(gold: str, prediction: str) -> Verdict:
    """Decide by the exact rules, else symbolically. Only for a process that can be killed."""
    return judge_exactly(gold, prediction) or symbolic(gold, prediction)


def judge_exactly(gold: str, prediction: str) -> Verdict | None:
    """Decide without sympy; none where only symbolic mathematics can tell."""
    if not prediction.strip():
        return Verdict(outcome="no_answer", rule="empty")
    if reason := danger(prediction):
        same = _squeeze(gold) == _squeeze(prediction) and len(prediction) <= MAX_LENGTH
        return verdict_of(True, "same_text") if same else Verdict(outcome="unsafe", rule=reason)
    left, right = _without_names(normalize(gold), normalize(prediction))
    return _decide(left, right, _by_value)


def danger(prediction: str) -> str | None:
    """Why `prediction` must not reach a parser; none where it may."""
    if len(prediction) > MAX_LENGTH:
        return "length"
    if re.search(rf"\d{{{_MAX_DIGITS}}}", prediction):
        return "digits"
    depth = deepest = 0
    for sign in prediction:
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    if deepest > _MAX_NESTING:
        return "nesting"
    return _explosion(prediction)


def _explosion(prediction: str) -> str | None:
    flat = re.sub(r"[\s{}()]|\\left|\\right", "", prediction)
    if re.search(r"\d\^-?\d+\^-?\d+\^-?\d", flat):
        return "tower"
    for low, high in re.findall(r"\^-?(\d+)\^(\d+)", flat):
        if int(low[:6]) ** min(int(high[:6]), 40) > _MAX_EXPONENT:
            return "tower"
    if any(int(power[:12]) > _MAX_EXPONENT for power in re.findall(r"\^-?(\d+)", flat)):
        return "exponent"
    if any(int(number[:12]) > _MAX_FACTORIAL for number in re.findall(r"(\d+)!", flat)):
        return "factorial"
    return None


# --- exact rules -------------------------------------------------------------------------------


# What decides a pair that no exact rule does, or none.
Leaf = Callable[[str, str], Verdict | None]


def _by_value(gold: str, prediction: str) -> Verdict | None:
    """The leaf of the exact rules: values that differ; what may be equal is not decided here."""
    return verdict_of(False, "value") if differ(gold, prediction) else None


def _decide(gold: str, prediction: str, leaf: Leaf) -> Verdict | None:
    """By the first exact rule that applies, to the elements too, and by `leaf` where none does."""
    if _squeeze(gold) == _squeeze(prediction):
        return verdict_of(True, "same_text")
    if not prediction:
        return Verdict(outcome="different", rule="nothing_left")
    for rule in (_by_base, _by_number, _by_text):
        if verdict := rule(gold, prediction):
            return verdict
    return (
        _by_entries(gold, prediction, leaf)
        or _by_elements(*_as_tuples(gold, prediction), leaf)
        or leaf(gold, prediction)
    )


def verdict_of(same: bool, rule: str) -> Verdict:
    """Equal or different, as `rule` found."""
    return Verdict(outcome="equal" if same else "different", rule=rule)


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


_BASE = re.compile(r"([+-]?[\dA-Za-z]*\d[\dA-Za-z]*)\s*_\s*\{(\d{1,3})\}")
_DIGITS = re.compile(r"[+-]?[\dA-Za-z]*\d[\dA-Za-z]*")


def _by_base(gold: str, prediction: str) -> Verdict | None:
    """Numerals with a base: digits and base both count; a base that is left out is understood."""
    left, right = _BASE.fullmatch(gold), _BASE.fullmatch(prediction)
    if not left:
        return verdict_of(False, "base") if right and _number(gold) else None
    if right:
        same = left[1].lower().lstrip("+0") == right[1].lower().lstrip("+0")
        return verdict_of(same and left[2] == right[2], "base")
    if _DIGITS.fullmatch(prediction):
        return verdict_of(left[1].lower() == prediction.lower(), "base_understood")
    return None


@dataclass(frozen=True, kw_only=True)
class _Number:
    value: Fraction
    decimals: int | None  # digits after the point where written as a decimal
    significant: int
    percent: bool


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


def _number(text: str) -> _Number | None:
    """The rational number that `text` spells, or none."""
    percent = text.endswith(r"\%")
    body = text.removesuffix(r"\%").strip()
    body = body[1:-1].strip() if re.fullmatch(r"\{[^{}]*\}", body) else body
    if match := _DECIMAL.fullmatch(body):
        digits = match[2].partition(".")[2]
        return _Number(
            value=_sign(match[1]) * Fraction("0" + match[2].rstrip(".")),
            decimals=len(digits) if "." in match[2] else None,
            significant=len(match[2].replace(".", "").lstrip("0")),
            percent=percent,
        )
    value = _quotient(body)
    if value is None and (match := _SCIENTIFIC.fullmatch(body) or _EXPONENT.fullmatch(body)):
        value = (
            _sign(match[1]) * Fraction("0" + match[2].rstrip(".")) * Fraction(10) ** int(match[3])
        )
    return value if value is None else _exact(value, percent)


def _exact(value: Fraction, percent: bool) -> _Number:
    return _Number(value=value, decimals=None, significant=0, percent=percent)


def _quotient(body: str) -> Fraction | None:
    match = _QUOTIENT.fullmatch(body)
    if not match:
        return None
    sign, *parts = match.groups()
    top_sign, top, bottom_sign, bottom = parts[:4] if parts[1] else parts[4:]
    below = Fraction("0" + bottom.rstrip("."))
    if not below:
        return None
    signs = _sign(sign) * _sign(top_sign) * _sign(bottom_sign)
    return signs * Fraction("0" + top.rstrip(".")) / below


def _sign(text: str | None) -> int:
    return -1 if text == "-" else 1


def _by_number(gold: str, prediction: str) -> Verdict | None:
    left, right = _number(gold), _number(prediction)
    if left and left.decimals and right is None:
        right = _number(_with_point(prediction))
    if right and right.decimals and left is None:
        left = _number(_with_point(gold))
    if left is None or right is None:
        return None
    same = _same_number(left, right)
    if left.percent != right.percent:
        # 5 % of something is asked for as 5 or as 0.05; both are right, 500 is not
        same = same or _same_number(_as_ratio(left), _as_ratio(right))
    return verdict_of(same, "number")


def _with_point(text: str) -> str:
    """A decimal comma read as a point; three digits after it may be thousands and are left."""
    return re.sub(r"^(-?\d+),(\d{1,2}|\d{4,})$", r"\1.\2", text)


def _as_ratio(number: _Number) -> _Number:
    if not number.percent:
        return number
    decimals = None if number.decimals is None else number.decimals + 2
    return _Number(
        value=number.value / 100,
        decimals=decimals,
        significant=number.significant,
        percent=False,
    )


def _same_number(left: _Number, right: _Number) -> bool:
    if left.value == right.value:
        return True
    if left.decimals is None and right.decimals is None:
        return False
    coarse, fine = sorted((left, right), key=lambda n: (n.decimals is None, n.decimals or 0))
    return _rounds_to(coarse, fine.value)


def _rounds_to(decimal: _Number, exact: Fraction) -> bool:
    """A decimal of at least six significant digits stands for what rounds, or is cut, to it."""
    if decimal.decimals is None or decimal.significant < 6 or exact.denominator == 1:
        return _almost(decimal, exact)
    unit = Fraction(1, 10**decimal.decimals)
    error = abs(exact) - abs(decimal.value)
    same_sign = (exact < 0) == (decimal.value < 0)
    return same_sign and (abs(error) <= unit / 2 or 0 <= error < unit or _almost(decimal, exact))


def _almost(decimal: _Number, exact: Fraction) -> bool:
    """The noise of floating point: twelve digits right."""
    return abs(decimal.value - exact) <= abs(exact) / 10**12


_WORDS = re.compile(r"[A-Za-z][A-Za-z \-']*")


def _by_text(gold: str, prediction: str) -> Verdict | None:
    """Choices and words: case and punctuation do not count."""
    left, right = _words(gold), _words(prediction)
    if left and left == right:
        return verdict_of(True, "text")
    if not left or not _is_prose(gold):
        return None
    if right or _number(prediction):
        return verdict_of(False, "text")
    return None


def _words(text: str) -> str | None:
    bare = re.sub(r"[()\[\]{}.,:;\"'!?]", " ", text)
    bare = re.sub(r"\s+", " ", bare).strip()
    if _WORDS.fullmatch(bare):
        return bare.casefold()
    # 4:30 p.m. and the like: figures with words, without mathematics
    if re.fullmatch(r"[\w \-]+", bare) and re.search(r"[A-Za-z]{2,}|\b[ap] m\b", bare):
        return bare.casefold().replace("p m", "pm").replace("a m", "am")
    return None


def _is_prose(text: str) -> bool:
    """Words and not a product of variables: a run of letters that has a vowel and some length."""
    return bool(re.search(r"(?<!\\)\b(?=[A-Za-z]*[aeiouyAEIOUY])[A-Za-z]{3,}\b", text)) or bool(
        re.fullmatch(r"\(?[A-H]\)?", text)
    )


# --- structures --------------------------------------------------------------------------------

_BRACKETS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, kw_only=True)
class _Elements:
    opening: str  # "" where there is no bracket
    closing: str
    parts: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.opening in {"(", "["}


_MATRIX = re.compile(r"\\begin\{pmatrix\}((?:(?!\\begin).)*?)\\end\{pmatrix\}", re.DOTALL)


def _matrix(text: str) -> list[list[str]] | None:
    """The entries of a matrix by row; none of anything else."""
    found = _MATRIX.fullmatch(text)
    if not found:
        return None
    rows = [row.strip() for row in found[1].split(r"\\")]
    return [[entry.strip() for entry in row.split("&")] for row in rows if row]


def _by_entries(gold: str, prediction: str, leaf: Leaf) -> Verdict | None:
    """Matrices by shape and entry."""
    left, right = _matrix(gold), _matrix(prediction)
    if left is None or right is None:
        return None
    if [len(row) for row in left] != [len(row) for row in right]:
        return verdict_of(False, "shape")
    return _by_position([*chain(*left)], [*chain(*right)], leaf)


def _as_tuples(gold: str, prediction: str) -> tuple[str, str]:
    """A column vector against a tuple is a tuple: the same point, written otherwise."""
    left, right = _matrix(gold), _matrix(prediction)
    if left and prediction.startswith("(") and all(len(row) == 1 for row in left):
        return _tuple_of(left), prediction
    if right and gold.startswith("(") and all(len(row) == 1 for row in right):
        return gold, _tuple_of(right)
    return gold, prediction


def _tuple_of(column: list[list[str]]) -> str:
    return f"({', '.join(row[0] for row in column)})"


# Comparing lists in any order takes up to this squared many symbolic comparisons.
_MAX_SYMBOLIC_LIST = 12


def _by_elements(gold: str, prediction: str, leaf: Leaf) -> Verdict | None:
    """Tuples and intervals by position, lists and sets in any order."""
    left, right = _elements(gold), _elements(prediction)
    if left is None or right is None:
        return None
    if max(len(left.parts), len(right.parts)) == 1:
        return None
    if len(left.parts) != len(right.parts):
        return _counts_differ(left, right)
    if left.ordered and right.ordered:
        if (left.opening, left.closing) != (right.opening, right.closing):
            return verdict_of(False, "interval_ends") if len(left.parts) == 2 else None
        return _by_position(left.parts, right.parts, leaf)
    if left.ordered:
        # a tuple whose brackets were left out; a set never is a tuple
        return None if right.opening else _by_position(left.parts, right.parts, leaf)
    if right.ordered:
        return None
    return _in_any_order(left.parts, right.parts, leaf)


def _counts_differ(left: _Elements, right: _Elements) -> Verdict | None:
    atoms = all(_number(part) for part in (*left.parts, *right.parts))
    # one comma between digits may be a decimal comma
    lonely = min(len(left.parts), len(right.parts)) == 1 and len(left.parts + right.parts) == 3
    return verdict_of(False, "count") if atoms and not lonely else None


def _by_position(left: Sequence[str], right: Sequence[str], leaf: Leaf) -> Verdict | None:
    verdicts = [_decide(a, b, leaf) for a, b in zip(left, right, strict=True)]
    if any(v is not None and v.outcome == "different" for v in verdicts):
        return verdict_of(False, "elements")
    same = all(v is not None and v.correct for v in verdicts)
    return verdict_of(True, "elements") if same else None


def _in_any_order(left: Sequence[str], right: Sequence[str], leaf: Leaf) -> Verdict | None:
    if Counter(map(_squeeze, left)) == Counter(map(_squeeze, right)):
        return verdict_of(True, "list")
    if not all(_number(part) for part in (*left, *right)) and len(left) > _MAX_SYMBOLIC_LIST:
        return None
    rest = list(right)
    for part in left:
        verdicts = [_decide(part, other, leaf) for other in rest]
        match = next((place for place, v in enumerate(verdicts) if v and v.correct), None)
        if match is None:
            decided = all(v is not None and v.outcome == "different" for v in verdicts)
            return verdict_of(False, "list") if decided else None
        del rest[match]
    return verdict_of(True, "list")


def _elements(text: str) -> _Elements | None:
    """`text` as a bracketed or bare series, a single thing as one of one; none if unbalanced."""
    body, opening, closing = text.strip(), "", ""
    if body.startswith(r"\{") and body.endswith(r"\}"):
        body, opening, closing = body[2:-2], "{", "}"
    elif body[:1] in {"(", "["} and body[-1:] in {")", "]"} and _one_group(body):
        body, opening, closing = body[1:-1], body[0], body[-1]
    parts = _split(body)
    return None if parts is None else _Elements(opening=opening, closing=closing, parts=parts)


def _one_group(text: str) -> bool:
    """Whether the first bracket closes only at the end."""
    depth = 0
    for position, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _split(text: str) -> tuple[str, ...] | None:
    parts, depth, start = [], 0, 0
    for position, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return None
        if depth == 0 and sign in ",;":
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return None if depth or not all(parts) else tuple(parts)


# --- names of what is answered -----------------------------------------------------------------

_NAME = r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?"
_NAMED = re.compile(
    rf"({_NAME}|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\))\s*(?:=|\\in(?![a-zA-Z]))\s*([^=<>]+)"
)


def _without_names(gold: str, prediction: str) -> tuple[str, str]:
    """Drop `x =`, `f(x) =`, `(x, y) =`, `x \\in`; two variables that differ keep their names."""
    left, right = _named(gold), _named(prediction)
    if left[0] and right[0] and _contradict(left[0], right[0]):
        return gold, prediction
    if left[0] != right[0] and len(left[0]) > 1 and sorted(left[0]) == sorted(right[0]):
        return left[1], _in_order(right, left[0])
    return left[1], right[1]


def _contradict(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    return left != right and all(re.fullmatch("[a-zA-Z]", name) for name in (*left, *right))


def _in_order(named: tuple[tuple[str, ...], str], names: tuple[str, ...]) -> str:
    """The values of `named`, a bracketed series, in the order of `names`."""
    values = _split(named[1][1:-1])
    if values is None or len(values) != len(names):
        return named[1]
    by_name = dict(zip(named[0], values, strict=True))
    return f"({', '.join(by_name[name] for name in names)})"


def _named(text: str) -> tuple[tuple[str, ...], str]:
    parts = _split(text)
    if parts is None:
        return (), text
    matches = [_NAMED.fullmatch(part) for part in parts]
    if not matches[0]:
        return (), text
    names = tuple(match[1] if match else "" for match in matches)
    values = [
        match[2].strip() if match else part for match, part in zip(matches, parts, strict=True)
    ]
    if len(parts) > 1 and all(matches):
        # p = 5, q = 2, p = 7, q = 2 are two pairs
        distinct = tuple(dict.fromkeys(names))
        width = len(distinct)
        if width > 1 and names == distinct * (len(names) // width):
            groups = [values[start : start + width] for start in range(0, len(values), width)]
            return distinct, ", ".join(f"({', '.join(group)})" for group in groups)
    return tuple(dict.fromkeys(filter(None, names))), ", ".join(values)


# --- symbolic ----------------------------------------------------------------------------------


def symbolic(gold: str, prediction: str) -> Verdict:
    """Decide by math-verify, both sides in a math environment. May hang: run it to be killed."""
    silence()
    left, right = _without_names(normalize(gold), normalize(prediction))
    verdict = _decide(left, right, _leaf) or _by_math_verify(left, right)
    if verdict.outcome == "unparsable" and "=" in right and not re.search("[=<>]", left):
        # 2^3 = 8 where 8 is asked for
        last = right.rpartition("=")[2].strip()
        return _decide(left, last, _leaf) or verdict
    return verdict


def _leaf(gold: str, prediction: str) -> Verdict | None:
    verdict = _by_value(gold, prediction) or _by_math_verify(gold, prediction)
    return None if verdict.outcome == "unparsable" else verdict


def _by_math_verify(gold: str, prediction: str) -> Verdict:
    try:
        parsed_gold, parsed = _parse(gold), _parse(prediction)
        if parsed_gold is None:
            return Verdict(outcome="unparsable", rule="gold")
        if parsed is None:
            return Verdict(outcome="unparsable", rule="prediction")
        return verdict_of(_verify(parsed_gold, parsed), "math_verify")
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        # sympy raises nearly anything on nearly-mathematics; the name of it is the rule
        return Verdict(outcome="unparsable", rule=type(error).__name__)


def silence() -> None:
    """math-verify and its parser log every answer that they cannot read."""
    for name in ("math_verify", "latex2sympy2_extended", "sympy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _parse(text: str) -> Any | None:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # units=False: stripping them there eats variables (m, c); `normalize` has done it already
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    found = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig(normalization_config=spelling)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _verify(gold: Any, prediction: Any) -> bool:
    from math_verify import verify

    same = verify(gold, prediction, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(same) and not _far_apart(gold, prediction)


def _far_apart(gold: Any, prediction: Any) -> bool:
    """Whether tiny numbers differ relatively: math-verify rounds all of them to zero."""
    if not (getattr(gold, "is_number", False) and getattr(prediction, "is_number", False)):
        return False
    left, right = gold.evalf(30), prediction.evalf(30)
    size = max(abs(left), abs(right))
    if not getattr(size, "is_comparable", False) or size > 1e-3:
        return False
    return bool(abs(left - right) > size * 1e-6)
