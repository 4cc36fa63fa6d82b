r"""Bounds of a letter in, or a set in words, the intervals of its numbers out, as a union.

"x < 1 or x \ge 2"  ->  "(-\infty, 1) \cup [2, \infty)"
"all positive reals", "\mathbb{R}^+"  ->  "(0, \infty)"
"""

import re
from itertools import pairwise

from mcore_sft.evaluation.grading.compare.series import read_series
from mcore_sft.evaluation.grading.read.value import value_at_a_point

_SIDE = r"([^<>\\,]*(?:\\(?:frac|sqrt|pi|infty)[^<>\\,]*)*)"
_RELATION = r"(<|>|\\[lg]e(?![a-zA-Z]))"
_BETWEEN = re.compile(rf"{_SIDE}\s*{_RELATION}\s*([a-zA-Z])\s*{_RELATION}\s*{_SIDE}")
_BOUND = re.compile(rf"([a-zA-Z])\s*{_RELATION}\s*{_SIDE}")
_BOUND_BEHIND = re.compile(rf"{_SIDE}\s*{_RELATION}\s*([a-zA-Z])")
_UNEQUAL = re.compile(rf"([a-zA-Z])\s*\\ne\s*{_SIDE}")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_ALL = r"(?:the (?:set|collection) of )?(?:all|every|any|each)?\s*(?:of\s+)?(?:the )?"
_REALS = re.compile(
    rf"{_ALL}(?:reals?(?: (?:numbers?|values?)| [a-z](?![a-z]))?|\\mathbb\s*\{{?R\}}?)",
    re.IGNORECASE,
)
_SIGNED = re.compile(
    rf"{_ALL}(?:strictly )?(?P<sign>positive|negative|non-?negative|non-?positive|non-?zero)"
    r"\s+(?:reals?|numbers?|values?)(?: (?:numbers?|values?))?"
    r"|\\mathbb\s*\{?R\}?\s*[\^_]\s*\{?\s*(?P<mark>[+\-]|\\cdot|>\s*0|<\s*0|\\[gln]e\s*0)\s*\}?",
    re.IGNORECASE,
)
_BY_SIGN = {
    "positive": r"(0, \infty)", "negative": r"(-\infty, 0)", "nonnegative": r"[0, \infty)",
    "nonpositive": r"(-\infty, 0]", "nonzero": r"(-\infty, 0) \cup (0, \infty)",
}  # fmt: skip
_BY_MARK = {
    "+": "positive", "-": "negative", ">0": "positive", "<0": "negative", r"\ge0": "nonnegative",
    r"\le0": "nonpositive", r"\ne0": "nonzero", r"\cdot": "nonzero",
}  # fmt: skip
_WITHOUT = re.compile(
    rf"(?:{_REALS.pattern})(?:\s+[a-z])?\s*,?\s*"
    r"(?:except(?: for)?|excluding|other than|but(?: not)?|without|minus|"
    r"apart from|besides|\\setminus|\\backslash|-|(?:that are )?not equal to)\s*(?:for )?"
    r"(?:[a-z]\s*=\s*)?(?:(?P<gap>[(\[][^()\[\]]+,[^()\[\]]+[)\]])|\\?\{(?P<set>[^{}]+?)\\?\}|(?P<one>[^{}\s,]+(?:\s*,\s*[^{}\s,]+)*))",
    re.IGNORECASE,
)
_COMPARED = re.compile(
    rf"(?:{_REALS.pattern}|{_ALL}numbers?|{_ALL}values?)\s*(?:[a-z]\s+)?(?:that are\s+)?"
    r"(?:(?P<more>greater|larger|more|bigger)|(?P<less>less|smaller|lower)|at (?P<end>least|most))"
    r"(?:\s+than)?(?P<equal>\s*(?:,|or)\s*equal to)?\s+(?P<bound>[^\s,]+)",
    re.IGNORECASE,
)


def _set_in_words(text: str) -> str | None:
    """The intervals of a set that words or signs name; none of others."""
    if _REALS.fullmatch(text):
        return r"(-\infty, \infty)"
    if found := _SIGNED.fullmatch(text):
        mark = re.sub(r"\s", "", found["mark"] or "")
        return _BY_SIGN[_BY_MARK[mark] if mark else found["sign"].lower().replace("-", "")]
    if (found := _WITHOUT.fullmatch(text)) and (gap := found["gap"]):
        low, high = (end.strip() for end in gap[1:-1].split(",", 1))
        ends = ")" if gap[0] == "[" else "]", "(" if gap[-1] == "]" else "["
        return rf"(-\infty, {low}{ends[0]} \cup {ends[1]}{high}, \infty)"
    if found:
        return _all_but(re.split(r"\s*[,;]\s*", (found["set"] or found["one"]).strip()))
    if found := _COMPARED.fullmatch(text):
        above = found["more"] or (found["end"] or "").lower() == "least"
        closed = bool(found["equal"] or found["end"])
        if above:
            return rf"{'[' if closed else '('}{found['bound']}, \infty)"
        return rf"(-\infty, {found['bound']}{']' if closed else ')'}"
    return None


def _all_but(points: list[str]) -> str | None:
    points = ["0" if point == "zero" else point for point in points]
    values = list(map(value_at_a_point, points))
    if any(value is None or value.imag for value in values):
        return None
    order = sorted(range(len(points)), key=lambda place: values[place].real)  # type: ignore[union-attr]
    ends = [r"-\infty", *(points[place] for place in order), r"\infty"]
    return r" \cup ".join(f"({a}, {b})" for a, b in pairwise(ends))


def as_intervals(text: str) -> str | None:
    r"""`x < 1, x \ge 2` -> `(-\infty, 1) \cup [2, \infty)`; none of all but bounds of a letter."""
    if named := _set_in_words(text.strip()):
        return named
    text = re.sub(
        r"^(?:all\s+|[a-z]\s*\\in\s*\\mathbb\s*\{?R\}?\s*,\s*)(?=[a-z]\b)", "", text.strip()
    )
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
