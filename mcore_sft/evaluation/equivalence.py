r"""Two answers in, whether they mean the same out, with the rule that decided.

    gold, prediction  ->  canonical spelling  ->  exact rules  ->  (else) math-verify

The exact rules need no sympy, evaluate nothing and are quick on any short text. `symbolic` can take
forever or all memory on a hostile answer, so it is for a process that can be killed (`grade`).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from mcore_sft.evaluation.inequalities import as_intervals, bounded_letters
from mcore_sft.evaluation.normalize import in_radians, normalize, without_degrees
from mcore_sft.evaluation.number import read_number, same_number
from mcore_sft.evaluation.series import (
    Series,
    both_signs,
    columns_as_tuples,
    read_matrix,
    read_series,
    split,
    split_union,
    without_names,
)
from mcore_sft.evaluation.symbolic import Unreadable, same_meaning, silence
from mcore_sft.evaluation.value import agree, differ, value_at_a_point

Outcome = Literal[
    "equal", "different", "no_answer", "unparsable", "timeout", "unsafe", "not_graded"
]
NOT_GRADED: Outcome = "not_graded"
"""Nothing is known of the answer: its grading was ended from outside. It is never counted."""

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


def verdict_of(same: bool, rule: str) -> Verdict:
    """Equal or different, as `rule` found."""
    return Verdict(outcome="equal" if same else "different", rule=rule)


def judge(gold: str, prediction: str) -> Verdict:
    """Decide by the exact rules, else symbolically. Only for a process that can be killed."""
    return judge_exactly(gold, prediction) or symbolic(gold, prediction)


def judge_exactly(gold: str, prediction: str) -> Verdict | None:
    """Decide without sympy; none where only symbolic mathematics can tell."""
    if not prediction.strip():
        return Verdict(outcome="no_answer", rule="empty")
    if len(prediction) <= MAX_LENGTH and _squeeze(gold) == _squeeze(prediction):
        return verdict_of(True, "same_text")
    if reason := danger(prediction):
        return Verdict(outcome="unsafe", rule=reason)
    return _decide(*_comparable(gold, prediction), _by_value)


def symbolic(gold: str, prediction: str) -> Verdict:
    """Decide by math-verify, both sides in a math environment. May hang: run it to be killed."""
    silence()
    return _decide(*_comparable(gold, prediction), _by_meaning) or Verdict(
        outcome="unparsable", rule="prediction"
    )


# --- what never reaches a parser ---------------------------------------------------------------


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
    bare = re.sub(r"\s+|\\left|\\right", "", prediction)
    # brackets go where a power is of a power, and part what they hold where it is not
    flat = re.sub(r"[{}()]", " ", re.sub(r"(?<=\^)[{(]+|[})]+(?=\^)", "", bare))
    if re.search(r"\d\^-?\d+\^-?\d+\^-?\d", flat):
        return "tower"
    for low, high in re.findall(r"\^-?(\d+)\^-?(\d+)", flat):
        if int(low[:6]) ** min(int(high[:6]), 40) > _MAX_EXPONENT:
            return "tower"
    if any(int(power[:12]) > _MAX_EXPONENT for power in re.findall(r"\^-?(\d+)", flat)):
        return "exponent"
    factorials = re.findall(r"(\d+)!", re.sub(r"[{}()]", "", bare))
    if any(int(number[:12]) > _MAX_FACTORIAL for number in factorials):
        return "factorial"
    return None


# --- two texts that can be compared ------------------------------------------------------------

_LETTER = re.compile(r"\(?([A-H])[).]?")
_LETTERED = re.compile(r"(?:\(([A-H])\)|([A-H])[).:])\s+(?![-+*/^=,])(\S.*)")
_OPTION = re.compile(r"(?:option|choice)\s+(?=\(?[A-H]\b)", re.IGNORECASE)


def _comparable(gold: str, prediction: str) -> tuple[str, str]:
    """Both in canonical spelling, without the names of what is answered and letters of choices."""
    left, right = normalize(gold), normalize(prediction)
    # 200,100 is a list where the other is one
    if "," in left and "," in prediction and "," not in right:
        right = _as_list(prediction, right, like=left)
    elif right.count(",") > 1 and "," in gold and "," not in left:
        left = _as_list(gold, left, like=right)
    if _bare_angles(left) != _bare_angles(right):
        left, right = in_radians(left), in_radians(right)
    else:  # many leave the degrees of an angle out
        left = right = without_degrees(left)
    left, right = without_names(*_without_choices(left, right))
    if _is_region(left) or _is_region(right):
        letters = bounded_letters(left), bounded_letters(right)
        if not (letters[0] and letters[1]) or letters[0] == letters[1]:
            left, right = as_intervals(left) or left, as_intervals(right) or right
    left, right = (re.sub(r"\s*\\l(?:and|or)(?![a-zA-Z])", ",", text) for text in (left, right))
    return _without_set(*_points(left, right))


def _without_set(gold: str, prediction: str) -> tuple[str, str]:
    """The set of one thing that is no set stands for the thing."""
    left, right = read_series(gold), read_series(prediction)
    if left and right and left.is_singleton != right.is_singleton:
        inner = (left if left.is_singleton else right).parts[0]
        other = right if left.is_singleton else left
        if "\\{" not in inner and r"\emptyset" not in inner and other.opening != "{":
            return (inner, prediction) if left.is_singleton else (gold, inner)
    return gold, prediction


def _bare_angles(text: str) -> str:
    bare = _squeeze(without_degrees(text))
    return re.sub(r"(\\(?:sin|cos|tan|cot|sec|csc))\((\d+)\)", r"\1\2", bare)


def _is_region(text: str) -> bool:
    """Whether `text` is an interval, a union, or inequalities that only a union can be."""
    series = read_series(text)
    interval = bool(series and series.is_interval)
    return interval or "\\cup" in text or bool(re.search(r"[<>]|\\[lgn]e\b|\\mathbb", text))


_POINT = re.compile(r"(?:[Tt]he )?(?:point )?(?:[A-Z]\s*)?(\([^()]*,[^()]*\))")


def _points(gold: str, prediction: str) -> tuple[str, str]:
    """`P(1, 2)` and `the point (1, 2)` are (1, 2) where a tuple stands on the other side."""
    left, right = _POINT.fullmatch(gold), _POINT.fullmatch(prediction)
    if left and right and (left[0] == left[1] or right[0] == right[1]):
        return left[1], right[1]
    return gold, prediction


def _as_list(answer: str, number: str, *, like: str) -> str:
    """`answer` with commas that part elements, if those are as many as in `like`; else `number`."""
    listed = normalize(answer, thousands=False)
    parts, wanted = read_series(listed), read_series(like)
    if not parts or not wanted or len(parts.parts) != len(wanted.parts):
        return number
    return number if any(re.match(r"0\d", part) for part in parts.parts) else listed


def _without_choices(gold: str, prediction: str) -> tuple[str, str]:
    """`(C) 5` is C where a letter is asked for, and 5 where it is not."""
    prediction = _OPTION.sub("", prediction, count=1)
    left, right = _LETTERED.fullmatch(gold), _LETTERED.fullmatch(prediction)
    if left and not right:
        gold = (left[1] or left[2]) if _LETTER.fullmatch(prediction) else left[3]
    if right and not left:
        prediction = (right[1] or right[2]) if _LETTER.fullmatch(gold) else right[3]
    return gold, prediction


# --- exact rules -------------------------------------------------------------------------------

# What decides a pair that no exact rule does; none where it cannot.
Leaf = Callable[[str, str], Verdict | None]


def _by_value(gold: str, prediction: str) -> Verdict | None:
    """The leaf of the exact rules: values that differ; what may be equal is not decided here."""
    return verdict_of(False, "value") if differ(gold, prediction) else None


def _by_meaning(gold: str, prediction: str) -> Verdict:
    """The leaf of the symbolic stage."""
    if verdict := _by_value(gold, prediction):
        return verdict
    try:
        if same_meaning(gold, prediction):
            return verdict_of(True, "math_verify")
        if agree(gold, prediction):
            return verdict_of(True, "real_functions")
        return verdict_of(False, "math_verify")
    except Unreadable as error:
        return Verdict(outcome="unparsable", rule=str(error))
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        # sympy raises nearly anything on nearly-mathematics; the name of it is the rule
        return Verdict(outcome="unparsable", rule=type(error).__name__)


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
        _by_chain(gold, prediction, leaf)
        or _by_ratio(gold, prediction, leaf)
        or _by_union(gold, prediction, leaf)
        or _by_entries(gold, prediction, leaf)
        or _by_elements(*columns_as_tuples(gold, prediction), leaf)
        or leaf(gold, prediction)
    )


def _squeeze(text: str) -> str:
    """`text` without blanks, except that digits do not become one number."""
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", re.sub(r"\s+", " ", text))


_NUMERAL = r"[+-]?[\dA-Za-z]*\d[\dA-Za-z]*"
_BASE = re.compile(rf"({_NUMERAL}|[A-Fa-f]{{2,}}(?=\s*_\s*\{{1[1-6]\}}))\s*_\s*\{{(\d{{1,3}})\}}")


def _numeral(text: str) -> re.Match[str] | None:
    """A numeral with its base, whose digits are digits of that base."""
    found = _BASE.fullmatch(text)
    try:
        return found if found and int(found[1], int(found[2])) is not None else None
    except ValueError:
        return None


def _by_base(gold: str, prediction: str) -> Verdict | None:
    """Numerals with a base: digits and base both count; a base that is left out is understood."""
    left, right = _numeral(gold), _BASE.fullmatch(prediction)
    if not left:
        if not right or not read_number(gold):
            return None
        return verdict_of(right.groups() == (gold, "10"), "base")
    if right:
        same = left[1].casefold().lstrip("+0") == right[1].casefold().lstrip("+0")
        return verdict_of(same and left[2] == right[2], "base")
    if left[1].lower() == prediction.lower() or read_number(prediction):
        return verdict_of(left[1].lower() == prediction.lower(), "base_understood")
    return None


def _by_number(gold: str, prediction: str) -> Verdict | None:
    left, right = read_number(gold), read_number(prediction)
    if left and right is None:
        right = read_number(_with_point(prediction))
    if left is None and right and (right.decimals or 0) >= 2:
        left = read_number(_with_point(gold))
    if left is None or right is None:
        return None
    return verdict_of(same_number(left, right), "number")


def _with_point(text: str) -> str:
    """A decimal comma read as a point; three digits after it may be thousands and are left."""
    return re.sub(r"^(-?\d+),(\d{1,2}|\d{4,})$", r"\1.\2", text)


_WORDS = re.compile(r"[A-Za-z](?:[A-Za-z ']|(?<=[A-Za-z])-(?=[A-Za-z]))*")


_NOTHING = re.compile(
    r"(?:there (?:is|are) )?no (?:real )?solutions?|(?:the )?empty set|\\(?:emptyset|varnothing)|"
    r"\\\{\s*\\\}|none",
    re.IGNORECASE,
)


def _by_text(gold: str, prediction: str) -> Verdict | None:
    """Choices and words: case, punctuation and articles do not count."""
    if _NOTHING.fullmatch(gold) and _NOTHING.fullmatch(prediction):
        return verdict_of(True, "empty_set")
    if not _is_prose(gold):
        return None
    left, right = _words(gold), _words(prediction)
    if left and left == right:
        return verdict_of(True, "text")
    if _same_members(gold, prediction):
        return verdict_of(True, "list")
    if left and right and sorted(left) == sorted(right) and re.fullmatch("[a-z]{1,4}", left):
        return None  # abc and cab may be products
    if (choice := _LETTER.fullmatch(gold)) and choice[1] not in prediction:
        return verdict_of(False, "text")
    return verdict_of(False, "text") if left and (right or read_number(prediction)) else None


def _same_members(gold: str, prediction: str) -> bool:
    """Whether both are lists of the same words, whatever their order."""
    left, right = (
        sorted(part.casefold() for part in re.split(r"\s*,\s*(?:and )?| and ", text))
        for text in (gold, prediction)
    )
    return len(left) > 1 and left == right


def _words(text: str) -> str | None:
    bare = re.sub(r"[()\[\]{}.,:;\"'!?]", " ", text)
    bare = re.sub(r"^(?:an?|the) (?=[A-Za-z])", "", re.sub(r"\s+", " ", bare).strip())
    if _WORDS.fullmatch(bare):
        return bare.casefold()
    # 4:30 p.m. and the like: figures with words, without mathematics
    figures = re.fullmatch(r"[\w \-]+", bare) and re.search(r"\d", bare)
    if figures and re.search(r"[A-Za-z]{2,}|\b[ap] m\b", bare):
        return bare.casefold().replace("p m", "pm").replace("a m", "am")
    return None


def _is_prose(text: str) -> bool:
    """Words and not a product of variables: a run of letters that has a vowel and some length."""
    return bool(
        re.search(r"(?<!\\)\b(?=[A-Za-z]*[aeiouyAEIOUY])[A-Za-z]{3,}\b", text)
        or re.fullmatch(r"\(?[A-H]\)?|[Nn]o", text)
        or re.search(r"\d\s*[aApP]\.?\s?[mM]\b", text)
    )


_NO_CHAIN = re.compile(r"[<>,]|\\(?:[lgn]e|in|equiv|approx)\b|\bnot\b|n't\b")


def _asks(side: str) -> bool:
    """Whether `side` is an expression of one variable and not its name, so that it is to solve."""
    if re.search(r"\\(?:sum|prod|int|lim|max|min)(?![a-zA-Z])|'|\^\{-1\}|\b[fghpq]\(", side):
        return False
    bare = re.sub(r"\\[a-zA-Z]+|_\{?\w+\}?", "", side)
    return (
        len(letters := re.findall("[a-z]", bare)) == 1
        and bare.strip() != letters[0]
        and (not re.search("[A-Z]", bare))
    )


def _by_chain(gold: str, prediction: str, leaf: Leaf) -> Verdict | None:
    """`2^3 = 8` where 8 is asked for: the last side counts, and no other may be another value."""
    sides = split(prediction, "=")
    if not sides or len(sides) == 1 or re.search(r"[=<>,]|\\[lg]e\b|\\in\b", gold):
        return None
    if _NO_CHAIN.search(re.sub(r"\([^()]*\)", "", prediction)):
        return None
    closed = [side for side in sides[:-1] if not _has_letters(side)]
    to_solve = any(map(_asks, sides[:-1])) or (
        sides[-1] == "0" and any(re.search(r"[a-z]\s*[-+]|[-+]\s*\d*[a-z]", s) for s in sides)
    )
    if not _has_letters(gold) and to_solve:
        return verdict_of(False, "chain")  # says what x is by another number: 2x = 5, x - 5 = 0
    verdicts = [_decide(gold, side, leaf) for side in (*closed, sides[-1])]
    if any(verdict and verdict.outcome == "different" for verdict in verdicts):
        return verdict_of(False, "chain")
    undecided = any(verdict is None for verdict in verdicts)
    last = verdicts[-1]
    return None if undecided or not (last and last.correct) else verdict_of(True, "chain")


def _by_ratio(gold: str, prediction: str, leaf: Leaf) -> Verdict | None:
    """`2:4:6` is `1:2:3`."""
    left, right = gold.split(":"), prediction.split(":")
    if max(len(left), len(right)) < 3:
        return None
    if len(left) != len(right):
        known = all(map(read_number, (*left, *right)))
        return verdict_of(False, "ratio") if known else None
    a, b = [read_number(part.strip()) for part in left], [read_number(p.strip()) for p in right]
    if not all((*a, *b)) or not (a[0] and b[0] and a[0].value and b[0].value):
        return _by_position(left, right, leaf)
    same = [x.value / a[0].value for x in a if x] == [y.value / b[0].value for y in b if y]
    return verdict_of(same, "ratio")


def _has_letters(text: str) -> bool:
    return bool(re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)))


# --- answers of several parts ------------------------------------------------------------------


def _by_union(gold: str, prediction: str, leaf: Leaf) -> Verdict | None:
    """Unions of intervals and finite sets: by their parts, or by where they end on the line."""
    left, right = split_union(gold), split_union(prediction)
    if len(left) == len(right) == 1:
        return None
    # intervals with "or" between them
    left = left if len(left) > 1 else split(gold) or left
    right = right if len(right) > 1 else split(prediction) or right
    verdict = _in_any_order(left, right, leaf) if len(left) == len(right) else None
    if verdict and verdict.correct:
        return verdict_of(True, "union")
    a, b = _extent(left), _extent(right)
    return verdict_of(False, "union") if a and b and _ends_differ(a, b) else None


# Start and end on the real line, and whether each belongs to it.
_Interval = tuple[float, bool, float, bool]


def _extent(parts: Sequence[str]) -> list[_Interval] | None:
    """The union of intervals and finite sets of numbers, merged and in order."""
    pieces: list[_Interval] = []
    for part in parts:
        series = read_series(part)
        if series is None or not (series.is_interval or series.opening == "{"):
            return None
        ends = [_real(end) for end in series.parts]
        if any(math.isnan(end) for end in ends):
            return None
        if series.is_interval:
            pieces.append((ends[0], series.opening == "[", ends[1], series.closing == "]"))
        else:
            pieces += [(end, True, end, True) for end in ends]
    merged: list[_Interval] = []
    for piece in sorted(pieces, key=lambda piece: (piece[0], not piece[1])):
        if merged and _touch(merged[-1], piece):
            last = merged.pop()
            end, closed = max((last[2], last[3]), (piece[2], piece[3]))
            piece = (last[0], last[1], end, closed)
        merged.append(piece)
    return merged


def _real(text: str) -> float:
    """The number that `text` is, infinity too; not a number where it is none."""
    if match := re.fullmatch(r"([+-]?)\s*\\infty", text.strip()):
        return -math.inf if match[1] == "-" else math.inf
    value = value_at_a_point(text)
    return value.real if value is not None and not value.imag else math.nan


def _touch(left: _Interval, right: _Interval) -> bool:
    return right[0] < left[2] or (right[0] == left[2] and (left[3] or right[1]))


def _ends_differ(left: Sequence[_Interval], right: Sequence[_Interval]) -> bool:
    if len(left) != len(right):
        return True
    return any(
        (a[1], a[3]) != (b[1], b[3])
        or not math.isclose(a[0], b[0], rel_tol=1e-4, abs_tol=1e-9)
        or not math.isclose(a[2], b[2], rel_tol=1e-4, abs_tol=1e-9)
        for a, b in zip(left, right, strict=True)
    )


def _by_entries(gold: str, prediction: str, leaf: Leaf) -> Verdict | None:
    """Matrices by shape and entry."""
    left, right = read_matrix(gold), read_matrix(prediction)
    if left is None or right is None:
        return None
    if [len(row) for row in left] != [len(row) for row in right]:
        return verdict_of(False, "shape")
    return _by_position([*chain(*left)], [*chain(*right)], leaf)


# Comparing lists in any order takes up to this squared many symbolic comparisons.
_MAX_SYMBOLIC_LIST = 12
_MAX_LIST = 100


def _by_elements(gold: str, prediction: str, leaf: Leaf) -> Verdict | None:
    """Tuples and intervals by position, lists and sets in any order."""
    left, right = _spread(gold), _spread(prediction)
    if left is None or right is None:
        return None
    if max(len(left.parts), len(right.parts)) == 1:
        a_set = (left.opening == "{", right.opening == "{")  # {1} is not 1 within a set
        return verdict_of(False, "set_and_element") if any(a_set) and not all(a_set) else None
    if len(left.parts) != len(right.parts):
        known = all(map(_is_value, (*left.parts, *right.parts)))
        return verdict_of(False, "count") if known else None
    if left.ordered and right.ordered:
        ends = (left.opening, left.closing) == (right.opening, right.closing)
        if left.is_interval and not ends:
            return verdict_of(False, "interval_ends")
        return _by_position(left.parts, right.parts, leaf)
    if left.ordered or right.ordered:
        if "{" in (left.opening, right.opening):
            return verdict_of(False, "set_and_tuple")
        # a tuple whose brackets were left out
        return _by_position(left.parts, right.parts, leaf)
    return _in_any_order(left.parts, right.parts, leaf)


def _spread(text: str) -> Series | None:
    series = read_series(text)
    if series is None or not series.ordered:
        return series and replace(series, parts=both_signs(series.parts))
    points = both_signs((text,))
    return series if len(points) == 1 else Series(opening="", closing="", parts=points)


def _is_value(part: str) -> bool:
    return (
        read_number(part) is not None
        or value_at_a_point(part) is not None
        or not math.isnan(_real(part))
    )


def _by_position(left: Iterable[str], right: Iterable[str], leaf: Leaf) -> Verdict | None:
    verdicts = [_decide(a, b, leaf) for a, b in zip(left, right, strict=True)]
    if any(v is not None and v.outcome == "different" for v in verdicts):
        return verdict_of(False, "elements")
    same = all(v is not None and v.correct for v in verdicts)
    return verdict_of(True, "elements") if same else None


def _in_any_order(left: Sequence[str], right: Sequence[str], leaf: Leaf) -> Verdict | None:
    if Counter(map(_squeeze, left)) == Counter(map(_squeeze, right)):
        return verdict_of(True, "list")
    numbers = all(map(read_number, (*left, *right)))
    if len(left) > (_MAX_LIST if numbers else _MAX_SYMBOLIC_LIST):
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
