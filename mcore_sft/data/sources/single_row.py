"""One row in, what is used of it out, or why it cannot be used.

line of JSON | JSON value | row of a table -> (problem, solution, ...) | (messages, tools)
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from mcore_sft.base import json_text
from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.conversation import checked
from mcore_sft.data.sources.known_columns import Columns, missing

MAX_ROW_BYTES = 10_000_000
"""A longer row is no example but an accident, such as a whole file in one line."""

VOTES = ("majority_votes", "total_votes")
ANSWER = "expected_answer"
"""Columns beside problem and solution, as NeMo-Skills and OpenMathInstruct-2 name them."""

TOO_LONG = f"a row of more than {MAX_ROW_BYTES // 1_000_000} MB; mend or remove it"


class BadRow(Exception):
    """Why a row cannot be used."""


class MissingColumn(BadRow):
    """A row lacks a column, which in the first row means that the configuration is wrong."""


def parse_line(line: bytes) -> Mapping[str, Any]:
    """The object that a line of JSON spells."""
    if len(line) > MAX_ROW_BYTES:
        raise BadRow(TOO_LONG)
    if b"\0" in line:
        raise BadRow(
            f"a NUL byte (byte {line.index(0) + 1} of the line), expected text; the file is "
            "damaged, or is not UTF-8: write it again"
        )
    try:
        return require_object(json_text.loads(line.decode()))
    except UnicodeDecodeError as error:
        raise BadRow(
            f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x}); mend or "
            "remove the row, or save the file as UTF-8"
        ) from None
    except ValueError as error:
        raise BadRow(f"broken JSON ({error}); expected one JSON object a line") from None


def require_object(row: Any) -> Mapping[str, Any]:
    """`row`, which must be an object."""
    if not isinstance(row, dict):
        raise BadRow(f"expected a JSON object, found {type(row).__name__}")
    return row


def pair(row: Mapping[str, Any], columns: Columns) -> tuple[Any, ...]:
    """Problem, solution, two votes or NaN, expected answer or none."""
    problem = _text(row, columns.problem, "problem")
    solution = _text(row, columns.solution, "solution")
    return problem, solution, *(_number_of_votes(row, name) for name in VOTES), _answer(row)


def chat(row: Mapping[str, Any], columns: Columns) -> tuple[Any, ...]:
    """Messages, and tools or none."""
    if columns.messages not in row:
        raise MissingColumn(missing(row, columns.messages, "messages"))
    messages = _objects(row[columns.messages], columns.messages, "messages (role, content)")
    if not messages:
        raise BadRow(
            f"column {columns.messages!r} holds nothing, expected a list of messages "
            "(role, content); mend or remove the row"
        )
    tools = _objects(row.get(columns.tools), columns.tools, "tools") if columns.tools else None
    try:
        return checked(messages, columns.ignore_keys), tools or None
    except DataError as error:
        fix = "; mend or remove the row"
        said = str(error).removesuffix(fix)
        raise BadRow(f"column {columns.messages!r}: {said}{fix}") from None


def _text(row: Mapping[str, Any], column: str, role: str) -> str:
    if column not in row:
        raise MissingColumn(missing(row, column, role))
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        found = "nothing" if text is None else _shown(text)
        if isinstance(text, str):
            found = "only blanks"
        raise BadRow(
            f"column {column!r} holds {found}, expected the text of the {role}; "
            "mend or remove the row"
        )
    if _size(text, column) > MAX_ROW_BYTES:
        raise BadRow(TOO_LONG)
    return text


def _size(text: str, column: str) -> int:
    """Bytes of the text as UTF-8."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise BadRow(
            f"column {column!r} is not valid Unicode (position {error.start}); "
            "mend or remove the row"
        ) from None


def _number_of_votes(row: Mapping[str, Any], column: str) -> float:
    """NaN where there is none, as pandas has it too."""
    value = row.get(column)
    if value is None:
        return np.nan
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else np.inf
    except OverflowError:
        number = np.inf
    if np.isinf(number):
        raise BadRow(
            f"column {column!r} holds {_shown(value)}, expected a number of votes; "
            "mend or remove the row"
        )
    return number


def _answer(row: Mapping[str, Any]) -> str | None:
    value = row.get(ANSWER)
    if value is None:
        return None
    answer = str(value)
    _size(answer, ANSWER)
    return answer


def _objects(value: Any, column: str, what: str) -> list[Mapping[str, Any]] | None:
    """A list of objects, which some datasets hold as JSON text; None if there is none, or ""."""
    found = value
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            found = json_text.loads(value)
        except ValueError:
            found = value
        if found is None:
            return None
    if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
        raise BadRow(
            f"column {column!r} holds {_shown(value)}, expected a list of {what}; "
            "mend or remove the row"
        )

    def refuse(number: Decimal) -> None:
        raise BadRow(
            f"column {column!r} holds a number of {len(number.as_tuple().digits):,} digits, which "
            "cannot be written again; remove the row, or write the number as text"
        )

    if _size(json.dumps(found, ensure_ascii=False, default=refuse), column) > MAX_ROW_BYTES:
        raise BadRow(TOO_LONG)
    return found


def _shown(value: Any) -> str:
    """A value as messages show it."""
    shown = str(value) if isinstance(value, Decimal) else repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
