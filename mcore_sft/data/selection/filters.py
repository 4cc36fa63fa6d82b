"""Rows in, the rows worth training on out, by NeMo-Skills' filters of May 2025.

Row -> Row, or the name of the filter that drops it
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mcore_sft.base import json_text
from mcore_sft.config import FilterConfig
from mcore_sft.data.errors import DataError
from mcore_sft.data.selection.arithmetic import has_wrong_equation, spell_out

TokenCounter = Callable[[Sequence[str]], Sequence[int]]
"""Tokens of each text, without special tokens."""

PREFIX = "My solution:\n"
"""What trim_prefix takes away."""

_BRACE = re.compile(r"[{}]")
# An empty box is the first alternative, an escaped brace the third, so that neither opens anything.
_BOX_MARK = re.compile(r"\\boxed\s*+\{\s*+\}|(?P<open>\\boxed\s*+\{|\{)|\\[{}]|\\\\(?!boxed)|\}")
_FORMULA_MARK = re.compile(
    r"\\\\|(?P<open>\\[\[(]|\\begin\b)|(?P<close>\\[\])]|\\end\b)|(?P<both>\$\$)"
)


class Row(NamedTuple):
    """What the filters see of a row."""

    problem: str
    solution: str
    majority_votes: float | None = None
    total_votes: float | None = None


RowFilter = Callable[[Row], Row | str]
"""The row, perhaps changed, or the name of the filter that drops it."""


class Filters:
    """The filters of one configuration in NeMo-Skills' order; made anew in each process.

    `count_tokens` is needed by remove_len_outlier_* alone. Raises `DataError` for a contamination
    file that cannot be used.
    """

    def __init__(self, config: FilterConfig, count_tokens: TokenCounter | None = None) -> None:
        self._filters = row_filters(config)
        self._config = config
        self._count_tokens = count_tokens

    @property
    def active(self) -> bool:
        """Whether any filter is on."""
        c = self._config
        lengths = c.remove_len_outlier_problems or c.remove_len_outlier_solutions
        return bool(self._filters) or lengths

    def apply(self, rows: Sequence[Row]) -> list[Row | str]:
        """For each row what is left of it, or the name of the filter that drops it."""
        made = [self._filter(row) for row in rows]
        c = self._config
        if c.remove_len_outlier_problems:
            shortest = c.min_problem_length
            made = self._drop_outliers(made, "problem", shortest, c.max_problem_length, False)
        if c.remove_len_outlier_solutions:
            shortest, in_chars = c.min_solution_length, c.use_chars_for_min_length
            made = self._drop_outliers(made, "solution", shortest, c.max_solution_length, in_chars)
        return made

    def _filter(self, row: Row) -> Row | str:
        for one in self._filters:
            made = one(row)
            if isinstance(made, str):
                return made
            row = made
        return row

    def _drop_outliers(
        self, made: list[Row | str], column: str, shortest: int, longest: int, in_chars: bool
    ) -> list[Row | str]:
        assert self._count_tokens is not None, "remove_len_outlier_* without a tokenizer"
        texts = {i: getattr(row, column) for i, row in enumerate(made) if not isinstance(row, str)}
        counts = self._count_tokens(list(texts.values()))
        for (i, text), tokens in zip(texts.items(), counts, strict=True):
            if (len(text) if in_chars else tokens) < shortest or tokens > longest:
                made[i] = f"remove_len_outlier_{column}s"
        return made


def row_filters(config: FilterConfig) -> list[RowFilter]:
    """The filters that are on and see one row alone, but for those that count tokens."""
    c = config
    file = c.contamination_file if c.remove_contaminated else None
    problems = read_contaminated(file) if file else frozenset()
    votes, portion = c.min_majority_votes, c.min_majority_percentage
    chain: list[tuple[object, RowFilter]] = [
        (c.drop_multi_boxed, partial(drop_multi_boxed, way=c.drop_multi_boxed)),
        (c.remove_contaminated, partial(remove_contaminated, problems=problems)),
        (c.drop_if_contains, partial(drop_if_contains, strings=c.drop_if_contains)),
        (c.drop_if_missing, partial(drop_if_missing, strings=c.drop_if_missing)),
        (c.majority_filter, partial(majority_filter, min_votes=votes, min_percentage=portion)),
        (c.trim_prefix, trim_prefix),
        (c.trim_solutions, partial(trim_solutions, way=c.trim_solutions)),
        (
            c.drop_incorrect_arithmetic,
            partial(drop_incorrect_arithmetic, way=c.drop_incorrect_arithmetic),
        ),
        (c.split_arithmetic, partial(split_arithmetic, way=c.split_arithmetic)),
    ]
    return [one for wanted, one in chain if wanted]


def drop_multi_boxed(row: Row, *, way: bool | str = True) -> Row | str:
    r"""Drop a solution with two `\boxed{` up to the next `}`, whatever braces lie between.

    So NeMo-Skills takes `\boxed{\text{a}, \boxed{3}}` for two and `\boxed {3}` for none, and counts
    `\boxed{}` where it is quoted; `balanced` counts closed boxes that hold something.
    """
    text = row.solution
    if text.count("\\boxed") < 2:
        return row
    boxes = len(_closed_boxes(text)) if way == "balanced" else _boxes_up_to_a_brace(text)
    return "drop_multi_boxed" if boxes > 1 else row


def remove_contaminated(row: Row, *, problems: frozenset[str]) -> Row | str:
    """Drop a problem that is in `problems`, to the letter: a space more, and it stays."""
    return "remove_contaminated" if row.problem in problems else row


def drop_if_contains(row: Row, *, strings: Sequence[str]) -> Row | str:
    """Drop a solution that holds one of `strings` (plain text, not patterns)."""
    return "drop_if_contains" if any(one in row.solution for one in strings) else row


def drop_if_missing(row: Row, *, strings: Sequence[str]) -> Row | str:
    """Drop a solution in which one of `strings` is missing: all must be there."""
    return row if all(one in row.solution for one in strings) else "drop_if_missing"


def majority_filter(row: Row, *, min_votes: float = 0, min_percentage: float = 0.0) -> Row | str:
    """Drop an answer with fewer votes, or a smaller portion of all; keep those without votes."""
    votes, total = row.majority_votes, row.total_votes
    if votes is None or total is None:
        return row
    return "majority_filter" if votes < min_votes or votes < total * min_percentage else row


def trim_prefix(row: Row) -> Row:
    """Take one leading "My solution:" with its line break away."""
    return row._replace(solution=row.solution.removeprefix(PREFIX))


def trim_solutions(row: Row, *, way: bool | str = True) -> Row:
    r"""Cut what follows the line on which the last `\boxed{...}` ends.

    NeMo-Skills leaves the row alone if that last box is not closed or written `\boxed {3}`, and
    cuts a `\]` away that stands on the next line; `balanced` takes the last closed box that holds
    something, and goes on to the line that closes the formula around it.
    """
    text = row.solution
    if way == "balanced":
        boxes = _closed_boxes(text)
        end = _end_of_formula(text, boxes[-1][1]) if boxes else -1
    else:
        box_end = _end_of_last_box(text)
        end = text.find("\n", box_end) if box_end else -1
    return row if end < 0 else row._replace(solution=text[:end])


def drop_incorrect_arithmetic(row: Row, *, way: bool | str = True) -> Row | str:
    """Drop a solution with a wrong equation; what counts as one, arithmetic.py says."""
    wrong = has_wrong_equation(row.solution, standalone=way == "standalone")
    return "drop_incorrect_arithmetic" if wrong else row


def split_arithmetic(row: Row, *, way: bool | str = True) -> Row:
    """Solve right equations step by step; how, arithmetic.py says."""
    solution = spell_out(row.solution, standalone=way == "standalone")
    return row._replace(solution=solution)


def read_contaminated(file: Path) -> frozenset[str]:
    """Problems of a contamination file: those of rows whose `contaminated` is true."""
    problems = set()
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                problem, contaminated = _contamination(line, f"{file}:{number}")
                if contaminated:
                    problems.add(problem)
    except OSError as error:
        raise DataError(
            f"{file}: the contamination file cannot be read: {error.strerror}"
        ) from None
    return frozenset(problems)


def _contamination(line: bytes, where: str) -> tuple[str, bool]:
    try:
        row = json_text.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: the contamination file is not valid JSON: {error}") from None
    match row:
        case {"problem": str(problem), "contaminated": bool(contaminated)}:
            return problem, contaminated
    raise DataError(
        f"{where}: expected an object with `problem` (text) and `contaminated` (true or false), "
        "as NeMo-Skills' check writes them; run that check, or leave remove_contaminated off"
    )


def _end_of_last_box(text: str) -> int | None:
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.end()
    return None


def _boxes_up_to_a_brace(text: str) -> int:
    boxes, end = 0, 0
    while (start := text.find("\\boxed{", end)) >= 0 and (end := text.find("}", start)) >= 0:
        boxes += 1
    return boxes


def _closed_boxes(text: str) -> list[tuple[int, int]]:
    """Start and end of each box that is closed, holds something and stands in no other."""
    first = text.find("\\boxed")
    if first < 0:
        return []
    opened: list[int] = []  # where each box begins that is open, and -1 for any other brace
    closed: list[tuple[int, int]] = []
    for mark in _BOX_MARK.finditer(text, first):
        if mark["open"]:
            opened.append(-1 if mark["open"] == "{" else mark.start())
        elif mark.group() == "}" and opened and (start := opened.pop()) >= 0:
            while closed and closed[-1][0] > start:
                closed.pop()
            closed.append((start, mark.end()))
    return closed


def _end_of_formula(text: str, box_end: int) -> int:
    """End of the line that closes the formula around a box; -1 where that is the last line."""
    line_end = text.find("\n", box_end)
    if line_end < 0:
        return line_end
    depth, dollars = 0, 0
    for mark in _FORMULA_MARK.finditer(text):
        after_line = mark.start() > line_end
        if after_line and not depth + dollars:
            return line_end
        if mark["open"]:
            depth += 1
        elif mark["close"]:
            depth = max(0, depth - 1)
        elif mark["both"]:
            dollars = 1 - dollars
        if after_line and not depth + dollars:
            return text.find("\n", mark.end())
    return line_end
