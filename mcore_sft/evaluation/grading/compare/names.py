"""Names of what is answered taken off, where they say nothing that is asked for.

"x = 1 or x = 2"  ->  of x, "1, 2"        "(x, y) = (1, 2)"  ->  of x and y, "(1, 2)"
"""

import re
from dataclasses import dataclass
from itertools import pairwise

from mcore_sft.evaluation.grading.compare.series import as_tuple, read_series, split

_FUNCTION = r"\\(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp|max|min|det|gcd|lcm)(?![A-Za-z])"
_NO_NAME = r"(?:frac|sqrt|binom|sum|prod|int|lim|pm|mp|cdot|times|begin|end|not|in)"
_MARKED = r"'*(?:\^\{-1\})?(?:_\{?\w+\}?)?"
_NAME = (
    # a letter, a segment, a word, a command; xy is a product
    rf"(?:(?:[A-Za-z]|[A-Z]{{2,}}|[A-Za-z]{{4,}}"
    rf"|(?!{_FUNCTION})\\(?!{_NO_NAME}(?![A-Za-z]))[A-Za-z]+(?:\s*\{{?[A-Z]{{1,}}\}}?)?){_MARKED}"
    r"(?:\s*\(\s*(?:\d+|[A-Za-z](?:\s*,\s*[A-Za-z])*)\s*\))?"
    r"|[fghpqFGHPQ]\s*\([^()=]*\)"
    rf"|{_FUNCTION}(?:\s*\^\s*\{{?\d\}}?|_\{{?\w+\}}?)*\s*(?:\([^()=]*\)|\\?[A-Za-z]+)"
    r"|\\frac\s*\{d[a-z]?\}\s*\{d[a-z]\})"
)
_NAMED = re.compile(
    rf"({_NAME}|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\))\s*(?:=|\\in(?![a-zA-Z]))\s*([^=<>]+)"
)
_NAMED_BEHIND = re.compile(rf"([^=<>]+?)\s*=\s*({_NAME})")
_LETTERS = re.compile(r"\(\s*([A-Za-z](?:\s*,\s*[A-Za-z])+)\s*\)")


@dataclass(frozen=True, kw_only=True)
class _Named:
    names: tuple[str, ...]
    values: str
    series: bool = False
    """One value for each of several names: a tuple, or a list of such tuples."""

    @property
    def roots(self) -> bool:
        """Whether the names are those of x_1, x_2 and so on, whose order means nothing."""
        return len({_letter(name) for name in self.names}) == 1

    @property
    def alone(self) -> str:
        """The values where the other side has no names."""
        if self.roots:
            series = read_series(self.values)
            return ", ".join(series.parts) if series else self.values
        return _in_order(self, _alphabetical(self.names))


def without_names(gold: str, prediction: str) -> tuple[str, str]:
    r"""Drop `x =`, `f(x) =`, `(x, y) =`, `x \in`, values being in the order of their names.

    Two variables that are not the same keep their names. Against values without names, those of
    neighbouring letters (x, y, z) are meant in the order of the alphabet.
    """
    left, right = _named(gold), _named(prediction)
    if left.series and right.series and sorted(left.names) == sorted(right.names):
        return left.values, _in_order(right, left.names)
    if _is_equation_in(prediction, left.names) or _is_equation_in(gold, right.names):
        return gold, prediction
    if left.names and right.names and _contradict(left.names, right.names):
        return gold, prediction
    if left.series and not right.names:
        return left.alone, right.values
    if right.series and not left.names:
        return left.values, right.alone
    return left.values, right.values


def _is_equation_in(text: str, names: tuple[str, ...]) -> bool:
    """Whether `text` is an equation of the named variable that is not solved for a name."""
    left, sign, right = text.partition("=")
    if not sign or "=" in right or len(names) != 1 or re.fullmatch(_NAME, left.strip()):
        return False
    return bool(re.fullmatch("[a-zA-Z]", names[0])) and names[0] in (*left, right.strip())


_VARIABLE = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?)?|(?:\\[a-z]+\s*\{?)?[A-Z]+\}?"
    rf"|[A-Za-z]\s*\(\s*(?:\d+|[A-Z])\s*\)|{_FUNCTION}.*"
)


def _contradict(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    """Whether both name what they say, and not the same; x may be the x_1 of the other."""
    if len(left) == len(right) == 1 and _MARKS.findall(left[0]) != _MARKS.findall(right[0]):
        both = (left[0], right[0])
        if sum(name.startswith("\\frac") for name in both) == 1:
            return not any("'" in name for name in both)  # dy/dx is y'
        alike = len({"(" in name for name in both}) == 1
        return alike and left[0][0] == right[0][0]
    if len(left) == len(right) == 1 and (a := _CALL.fullmatch(left[0])):
        b = _CALL.fullmatch(right[0])
        if b and a[1] == b[1] and not re.fullmatch(r"[a-z,\s]+", a[2] + b[2]):
            return a[2].replace(" ", "") != b[2].replace(" ", "")
    if [_letter(name) for name in left] == [_letter(name) for name in right]:
        return bool(set(left) - set(right)) and all("_" in name for name in (*left, *right))
    return all(_VARIABLE.fullmatch(name) for name in (*left, *right))


# What makes another function of f: f', its inverse, dy/dx.
_MARKS = re.compile(r"'+|\^\{-1\}|\{d[a-z]?\}")


_CALL = re.compile(r"([A-Za-z])\s*\((.*)\)")


def _letter(name: str) -> str:
    return name.partition("_")[0].strip()


def _alphabetical(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names` in order where they are neighbouring letters; as they are where they are not."""
    if any(len(name) > 1 for name in names):
        return names
    ordered = sorted(names)
    neighbours = all(ord(b) - ord(a) == 1 for a, b in pairwise(ordered))
    return tuple(ordered) if neighbours else names


def _in_order(named: _Named, names: tuple[str, ...]) -> str:
    """The values of `named` with those of each tuple in the order of `names`."""
    ordered = []
    for text in split(named.values) or ():
        series = read_series(text)
        if series is None or len(series.parts) != len(names):
            return named.values
        by_name = dict(zip(named.names, series.parts, strict=True))
        ordered.append(as_tuple([by_name[name] for name in names]))
    return ", ".join(ordered)


def _bare(name: str) -> str:
    r"""`\sin(x)` and `\sin x` are one name."""
    return re.sub(r"[\s(){}]", "", name) if re.match(_FUNCTION, name) else name


def _named(text: str) -> _Named:
    parts = split(text)
    if parts is None:
        return _Named(names=(), values=text)
    matches = [_NAMED.fullmatch(part) for part in parts]
    if not matches[0]:
        behind = _NAMED_BEHIND.fullmatch(text) if len(parts) == 1 else None
        if behind and not re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", behind[1])):
            return _Named(names=(_bare(behind[2]),), values=behind[1].strip())  # 3 = x
        return _Named(names=(), values=text)
    names = tuple(_bare(match[1]) if match else "" for match in matches)
    values = [
        match[2].strip() if match else part for match, part in zip(matches, parts, strict=True)
    ]
    if len(parts) == 1 and (letters := _LETTERS.fullmatch(names[0])):
        return _Named(names=tuple(re.split(r"\s*,\s*", letters[1])), values=values[0], series=True)
    if len(parts) > 1 and all(matches):
        # p = 5, q = 2, p = 7, q = 2 are two pairs
        distinct = tuple(dict.fromkeys(names))
        width = len(distinct)
        if width > 1 and names == distinct * (len(names) // width):
            groups = [values[start : start + width] for start in range(0, len(values), width)]
            return _Named(names=distinct, values=", ".join(map(as_tuple, groups)), series=True)
    return _Named(names=tuple(dict.fromkeys(filter(None, names))), values=", ".join(values))
