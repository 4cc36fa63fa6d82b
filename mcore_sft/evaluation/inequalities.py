r"""Bounds of a letter in, the intervals that it may be in out, as a union.

"x < 1 or x \ge 2"  ->  "(-\infty, 1) \cup [2, \infty)"
"""

import re

from mcore_sft.evaluation.series import read_series
from mcore_sft.evaluation.value import value_at_a_point

_SIDE = r"([^<>\\,]*(?:\\(?:frac|sqrt|pi|infty)[^<>\\,]*)*)"
_RELATION = r"(<|>|\\[lg]e(?![a-zA-Z]))"
_BETWEEN = re.compile(rf"{_SIDE}\s*{_RELATION}\s*([a-zA-Z])\s*{_RELATION}\s*{_SIDE}")
_BOUND = re.compile(rf"([a-zA-Z])\s*{_RELATION}\s*{_SIDE}")
_BOUND_BEHIND = re.compile(rf"{_SIDE}\s*{_RELATION}\s*([a-zA-Z])")
_UNEQUAL = re.compile(rf"([a-zA-Z])\s*\\ne\s*{_SIDE}")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_REALS = re.compile(r"(?:all (?:the )?reals?(?: numbers?)?|\\mathbb\s*\{?R\}?)", re.IGNORECASE)


def as_intervals(text: str) -> str | None:
    r"""`x < 1, x \ge 2` -> `(-\infty, 1) \cup [2, \infty)`; none of all but bounds of a letter."""
    if _REALS.fullmatch(text.strip()):
        return r"(-\infty, \infty)"
    pieces, letters = [], set()
    for part in text.split(r"\lor"):
        bounds = [_bounds(bound.strip()) for bound in re.split(r"\\land|,", part)]
        read = [bound for bound in bounds if bound]
        if len(read) < len(bounds):
            return None
        letters |= {letter for letter, _ in read}
        intervals = [interval for _, interval in read]
        both = _both(intervals)
        if "," in part and both and not _is_between(both):
            pieces += intervals  # x < 1, x > 2
        elif both:
            pieces.append(both)
        else:
            return None
    return r" \cup ".join(pieces) if len(letters) == 1 else None


def bounded_letters(text: str) -> set[str]:
    """The letters that the inequalities of `text` bound."""
    read = [_bounds(bound.strip()) for bound in re.split(r",|\\land|\\lor", text)]
    return {bound[0] for bound in read if bound}


def _both(intervals: list[str]) -> str | None:
    r"""`(1, \infty)` and `(-\infty, 2)` -> `(1, 2)`; none of all but a lower and an upper bound."""
    if len(intervals) == 1:
        return intervals[0]
    low = [each for each in intervals if each.endswith(r", \infty)")]
    high = [each for each in intervals if each.startswith(r"(-\infty,")]
    if len(intervals) != 2 or len(low) != 1 or len(high) != 1 or r"\cup" in low[0] + high[0]:
        return None
    return low[0].removesuffix(r"\infty)") + high[0].removeprefix(r"(-\infty,").lstrip()


def _is_between(interval: str) -> bool:
    series = read_series(interval)
    ends = [value_at_a_point(end) for end in series.parts] if series else []
    known = [end.real for end in ends if end is not None]
    return len(known) == 2 and known[0] < known[1]


def _bounds(part: str) -> tuple[str, str] | None:
    """The letter that an inequality bounds, and the intervals that it may be in."""
    if match := _BETWEEN.fullmatch(part):
        low, first, letter, second, high = match.groups()
        if first in {">", r"\ge"}:
            low, first, second, high = high, _TURNED[second], _TURNED[first], low
        if second in {">", r"\ge"} or not low.strip() or not high.strip():
            return None
        opening, closing = "[" if first == r"\le" else "(", "]" if second == r"\le" else ")"
        return letter, f"{opening}{low.strip()}, {high.strip()}{closing}"
    if match := _BOUND.fullmatch(part):
        letter, relation, bound = match.groups()
    elif match := _BOUND_BEHIND.fullmatch(part):
        bound, relation, letter = match[1], _TURNED[match[2]], match[3]
    elif match := _UNEQUAL.fullmatch(part):
        letter, bound = match[1], match[2].strip()
        return letter, rf"(-\infty, {bound}) \cup ({bound}, \infty)"
    else:
        return None
    if not (bound := bound.strip()):
        return None
    ends = {
        "<": rf"(-\infty, {bound})",
        r"\le": rf"(-\infty, {bound}]",
        ">": rf"({bound}, \infty)",
        r"\ge": rf"[{bound}, \infty)",
    }
    return letter, ends[relation]
