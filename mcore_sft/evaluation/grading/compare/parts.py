r"""Rules for answers of several parts: chains, ratios, unions, matrices, tuples, sets and lists.

Each takes gold and prediction in canonical spelling, and what decides their parts; it says whether
they are the same, or nothing where it is not its matter.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from mcore_sft.evaluation.grading.compare.scalars import Same
from mcore_sft.evaluation.grading.compare.series import (
    Series,
    as_tuples,
    both_signs,
    read_matrix,
    read_series,
    split,
    split_relations,
    split_union,
)
from mcore_sft.evaluation.grading.read.normalize import squeeze
from mcore_sft.evaluation.grading.read.number import has_decimal, last_half, read_number
from mcore_sft.evaluation.grading.read.value import rounds_to, value_at_a_point

# --- chains --------------------------------------------------------------------------------------

_NO_CHAIN = re.compile(r"[<>,]|\\(?:[lgn]e|in|equiv|approx)\b|\bnot\b|n't\b")


def by_chain(gold: str, prediction: str, same: Same) -> bool | None:
    """`2^3 = 8` where 8 is asked for: the last side counts, and no other may be another value."""
    sides = split(prediction, "=")
    if not sides or len(sides) == 1 or re.search(r"[=<>,]|\\[lg]e\b|\\in\b", gold):
        return None
    if _NO_CHAIN.search(re.sub(r"\([^()]*\)", "", prediction)):
        return None
    sides = _without_rounded(sides)
    closed = [side for side in sides[:-1] if not _has_letters(side)]
    to_solve = any(map(_asks, sides[:-1])) or (
        sides[-1] == "0" and any(re.search(r"[a-z]\s*[-+]|[-+]\s*\d*[a-z]", s) for s in sides)
    )
    if not _has_letters(gold) and to_solve:
        return False  # says what x is by another number: 2x = 5, x - 5 = 0
    found = [same(gold, side) for side in (*closed, sides[-1])]
    if False in found:
        return False
    return True if all(found) else None


def _without_rounded(sides: tuple[str, ...]) -> tuple[str, ...]:
    """The sides but for decimals that others round to: `22/7 = 3.14`."""
    exact = [side for side in sides if not has_decimal(side) and not _has_letters(side)]
    return tuple(
        side
        for side in sides
        if not (has_decimal(side) and any(rounds_to(other, side, last_half) for other in exact))
    )


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


def _has_letters(text: str) -> bool:
    return bool(re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)))


def by_ratio(gold: str, prediction: str, same: Same) -> bool | None:
    """`2:4:6` is `1:2:3`."""
    left, right = gold.split(":"), prediction.split(":")
    if max(len(left), len(right)) < 3:
        return None
    if len(left) != len(right):
        return False if all(map(read_number, (*left, *right))) else None
    a, b = [read_number(part.strip()) for part in left], [read_number(p.strip()) for p in right]
    if not all((*a, *b)) or not (a[0] and b[0] and a[0].value and b[0].value):
        return _by_position(left, right, same)
    return [x.value / a[0].value for x in a if x] == [y.value / b[0].value for y in b if y]


_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def by_relations(gold: str, prediction: str, same: Same) -> bool | None:
    r"""`-1 < g(x) \le 2` is `2 \ge g(x) > -1`; what looks different may be so, or not."""
    left, right = split_relations(gold), split_relations(prediction)
    if not left or not right or len(left) != len(right):
        return None
    turned = [_TURNED.get(side, side) for side in reversed(right)]
    for sides in (right, turned):
        if sides[1::2] == left[1::2] and _by_position(left[::2], sides[::2], same):
            return True
    return None


# --- unions --------------------------------------------------------------------------------------


def by_union(gold: str, prediction: str, same: Same) -> bool | None:
    """Unions of intervals and finite sets: by their parts, or by where they end on the line."""
    left, right = split_union(gold), split_union(prediction)
    if len(left) == len(right) == 1:
        return None
    # intervals with "or" between them
    left = left if len(left) > 1 else split(gold) or left
    right = right if len(right) > 1 else split(prediction) or right
    if len(left) == len(right) and _in_any_order(left, right, same):
        return True
    a, b = _extent(left), _extent(right)
    return False if a and b and _ends_differ(a, b) else None


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


# --- matrices, tuples, sets and lists ------------------------------------------------------------


def by_entries(gold: str, prediction: str, same: Same) -> bool | None:
    """Matrices by shape and entry."""
    left, right = read_matrix(gold), read_matrix(prediction)
    if left is None or right is None:
        return None
    if [len(row) for row in left] != [len(row) for row in right]:
        return False
    return _by_position([*chain(*left)], [*chain(*right)], same)


# Comparing lists in any order takes up to this squared many symbolic comparisons.
_MAX_SYMBOLIC_LIST = 12
_MAX_LIST = 100


def by_elements(gold: str, prediction: str, same: Same) -> bool | None:
    """Tuples and intervals by position, lists and sets in any order."""
    left, right = map(_spread, as_tuples(gold, prediction))
    if left is None or right is None:
        return None
    if max(len(left.parts), len(right.parts)) == 1:
        # {1} is not 1 within a set
        return False if (left.opening == "{") != (right.opening == "{") else None
    if len(left.parts) != len(right.parts):
        return False if all(map(_is_counted, (*left.parts, *right.parts))) else None
    if left.ordered and right.ordered:
        if left.is_interval and (left.opening, left.closing) != (right.opening, right.closing):
            return False
        return _by_position(left.parts, right.parts, same)
    if left.ordered or right.ordered:
        if "{" in (left.opening, right.opening):
            return False
        # a tuple whose brackets were left out
        return _by_position(left.parts, right.parts, same)
    return _in_any_order(left.parts, right.parts, same)


def _spread(text: str) -> Series | None:
    series = read_series(text)
    if series is None or not series.ordered:
        return series and replace(series, parts=both_signs(series.parts))
    points = both_signs((text,))
    return series if len(points) == 1 else Series(opening="", closing="", parts=points)


def _is_counted(part: str) -> bool:
    """Whether a part is one thing: a value, or an equation of several variables."""
    if len(set(re.findall("[a-z]", re.sub(r"\\[a-zA-Z]+", "", part)))) > 1 and part.count("=") == 1:
        return True
    return (
        read_number(part) is not None
        or value_at_a_point(part) is not None
        or not math.isnan(_real(part))
    )


def _by_position(left: Iterable[str], right: Iterable[str], same: Same) -> bool | None:
    found = [same(a, b) for a, b in zip(left, right, strict=True)]
    if False in found:
        return False
    return True if all(found) else None


def _in_any_order(left: Sequence[str], right: Sequence[str], same: Same) -> bool | None:
    if Counter(map(squeeze, left)) == Counter(map(squeeze, right)):
        return True
    numbers = all(map(read_number, (*left, *right)))
    if len(left) > (_MAX_LIST if numbers else _MAX_SYMBOLIC_LIST):
        return None
    rest = list(right)
    for part in left:
        found = [same(part, other) for other in rest]
        if True not in found:
            return False if None not in found else None
        del rest[found.index(True)]
    return True
