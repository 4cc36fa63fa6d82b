r"""Answers of several parts taken apart: tuples, sets, lists, intervals, matrices, unions.

"(1, 2)"  ->  ordered, "1" and "2"
"""

import re
from dataclasses import dataclass
from itertools import chain

_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True, kw_only=True)
class Series:
    """The parts of an answer and the brackets around them, "" where there are none."""

    opening: str
    closing: str
    parts: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        """Whether the place of a part means something."""
        return self.opening in {"(", "["}

    @property
    def is_singleton(self) -> bool:
        """Whether it is a set of one element."""
        return self.opening == "{" and len(self.parts) == 1

    @property
    def is_interval(self) -> bool:
        """Whether the brackets may be those of an interval."""
        return self.ordered and len(self.parts) == 2


def read_series(text: str) -> Series | None:
    """`text` as a bracketed or bare series, a single thing as one of one; none if unbalanced."""
    body, opening, closing = text.strip(), "", ""
    if body.startswith(r"\{") and body.endswith(r"\}") and _one_group(body.replace("\\", "")):
        body, opening, closing = body[2:-2], "{", "}"
    elif body[:1] in {"(", "["} and body[-1:] in {")", "]"} and _one_group(body):
        body, opening, closing = body[1:-1], body[0], body[-1]
    parts = split(body)
    return None if parts is None else Series(opening=opening, closing=closing, parts=parts)


def split(text: str, separators: str = ",;") -> tuple[str, ...] | None:
    """`text` at the separators outside of all brackets; none if unbalanced or a part is empty."""
    parts, depth, start = [], 0, 0
    for position, sign in enumerate(text):
        depth += (sign in _OPENING) - (sign in _CLOSING)
        if depth < 0:
            return None
        if depth == 0 and sign in separators:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return None if depth or not all(parts) else tuple(parts)


_RELATION = re.compile(r"<|>|\\[lg]e(?![a-zA-Z])")


def split_relations(text: str) -> list[str] | None:
    r"""`1 < x \le 2` as 1, <, x, \le, 2; none where nothing is related, or several things are."""
    signs = [sign[0].strip() for sign in _RELATION.finditer(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    if not signs or not all(sides) or any(split(side, ",;=") != (side,) for side in sides):
        return None
    return [sides[0], *chain(*zip(signs, sides[1:], strict=True))]


def split_union(text: str) -> tuple[str, ...]:
    r"""`text` at each `\cup`."""
    return tuple(part.strip() for part in re.split(r"\\cup(?![a-zA-Z])", text))


def _one_group(text: str) -> bool:
    """Whether the first bracket closes only at the end."""
    depth = 0
    for position, sign in enumerate(text):
        depth += (sign in _OPENING) - (sign in _CLOSING)
        if depth == 0:
            return position == len(text) - 1
    return False


_MATRIX = re.compile(
    r"(.*?)\s*(?:\\cdot|\\times)?\s*"
    r"\\begin\{pmatrix\}((?:(?!\\begin).)*?)\\end\{pmatrix\}\s*"
    r"(?P<turned>\^\s*\{?\s*(?:T|\\top)\s*\}?)?\s*(?:/\s*(?P<divisor>\d+))?",
    re.DOTALL,
)


def read_matrix(text: str) -> list[list[str]] | None:
    """The entries of a matrix by row, each times what stands before it; none of anything else."""
    found = _MATRIX.fullmatch(text)
    if text.startswith("[["):
        return _nested(text)
    if not found or re.search(r"[=<>,\n]|\\(?:end|in|cup)", found[1]):
        return None
    rows = [_cells(row) for row in found[2].split(r"\\") if row.strip()]
    while rows and all(len(row) > 1 and not row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    if found["turned"] and len({len(row) for row in rows}) == 1:
        rows = [list(column) for column in zip(*rows, strict=True)]
    return [[_times(found[1].strip(), cell, found["divisor"]) for cell in row] for row in rows]


def _nested(text: str) -> list[list[str]] | None:
    """`[[1, 2], [3, 4]]`: a list of rows of one length."""
    series = read_series(text)
    rows = [read_series(part) for part in series.parts] if series else []
    cells = [list(row.parts) for row in rows if row and (row.opening, row.closing) == ("[", "]")]
    return cells if len(cells) == len(rows) and len({len(row) for row in cells}) == 1 else None


def _cells(row: str) -> list[str]:
    return [entry.strip() for entry in row.split("&")]


def _times(factor: str, entry: str, divisor: str | None) -> str:
    """An entry times a scalar, a sign or nothing."""
    if not factor and not divisor:
        return entry
    whole = entry if factor in {"", "+"} else f"-({entry})" if factor == "-" else ""
    whole = whole or rf"({factor}) \cdot ({entry})"
    return rf"\frac{{{whole}}}{{{divisor}}}" if divisor else whole


def as_tuples(gold: str, prediction: str) -> tuple[str, str]:
    """A vector against a tuple, or a vector written otherwise, is a tuple: the same point."""
    gold, prediction = _multiplied(gold), _multiplied(prediction)
    left, right = _column(gold), _column(prediction)
    if left and right:
        return gold, prediction
    if left or gold.startswith("("):
        other = right or _of_ijk(prediction, width=len(left or split(gold[1:-1]) or ()))
        return as_tuple(left) if left else gold, as_tuple(other) if other else prediction
    if right or prediction.startswith("("):
        other = _of_ijk(gold, width=len(right or split(prediction[1:-1]) or ()))
        return as_tuple(other) if other else gold, as_tuple(right) if right else prediction
    return gold, prediction


_MULTIPLE = re.compile(r"(-|[-\d.]+|-?\\frac\{[^{}]+\}\{[^{}]+\})\s*(?:\\cdot|\\times)?\s*(\(.*\))")


def _multiplied(text: str) -> str:
    r"""`\frac{1}{5}(1, 2)` as a tuple."""
    found = _MULTIPLE.fullmatch(text)
    series = read_series(found[2]) if found else None
    if not found or not series or len(series.parts) < 2 or series.closing != ")":
        return text
    return as_tuple([_times(found[1], part, None) for part in series.parts])


def _column(text: str) -> list[str] | None:
    """The entries of a matrix of one column."""
    rows = read_matrix(text)
    return [row[0] for row in rows] if rows and all(len(row) == 1 for row in rows) else None


_UNIT_VECTOR = re.compile(
    r"\\(?:hat|vec|mathbf|boldsymbol|widehat)\s*\{?\s*\\?([ijk])(?:math)?(?![a-z])\s*\}?"
)
_TERM = re.compile(
    r"\s*([+-]?)\s*((?:[^+\-{}()]|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\([^()]*\))*?)\s*([ijk])\s*"
    r"(?=[+-]|$)"
)


def _of_ijk(text: str, *, width: int) -> list[str] | None:
    """The `width` coefficients in a sum of multiples of i, j and k; none of anything else."""
    text, marked = _UNIT_VECTOR.subn(r"\1", text)
    terms = list(_TERM.finditer(text))
    if width not in {2, 3} or "".join(term[0] for term in terms) != text:
        return None
    found = {term[3]: f"{term[1]}{term[2].strip() or '1'}".lstrip("+") for term in terms}
    if len(found) < len(terms) or (width == 2 and "k" in found):
        return None
    if not marked and not {"j", "k"} & found.keys():  # a complex number
        return None
    return [found.get(name, "0") for name in "ijk"[:width]]


def as_tuple(parts: list[str]) -> str:
    """`(a, b)`."""
    return f"({', '.join(parts)})"


def both_signs(parts: tuple[str, ...]) -> tuple[str, ...]:
    r"""`a \pm b` is two parts, `a + b` and `a - b`."""
    spread: list[str] = []
    for part in parts:
        if len(re.findall(r"\\(?:pm|mp)(?![a-zA-Z])", part)) == 1:
            spread += [_with_sign(part, plus="+", minus="-"), _with_sign(part, plus="-", minus="+")]
        else:
            spread.append(part)
    return tuple(spread)


def _with_sign(part: str, *, plus: str, minus: str) -> str:
    signed = re.sub(r"\\pm(?![a-zA-Z])", plus, part)
    return re.sub(r"^\s*\+\s*", "", re.sub(r"\\mp(?![a-zA-Z])", minus, signed))
