"""The names of a source's columns in, which of them are read out: as configured, or as known.

SourceConfig, first row -> Columns
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mcore_sft.config import SourceConfig
from mcore_sft.data.errors import DataError

PAIRS = (
    ("problem", "generated_solution"),
    ("problem", "solution"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
)
"""Names of a problem and its solution that are known, as they stand together."""

MESSAGES, TOOLS = ("messages", "conversations"), "tools"
"""Names of conversations and of their tools that are known."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns are read: problem and solution, or messages and perhaps tools; else ""."""

    problem: str = ""
    solution: str = ""
    messages: str = ""
    tools: str = ""
    tools_known: bool = False
    """Whether tools go by their usual name and were not asked for: files and rows may lack them."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of messages that are not read."""

    @property
    def roles(self) -> dict[str, str]:
        """What each column holds, by its name."""
        found: dict[str, str] = {}
        for role in ("problem", "solution", "messages", "tools"):
            if column := getattr(self, role):
                found.setdefault(column, role)
        return found

    def __str__(self) -> str:
        if self.tools_known:
            return f"column {self.messages}, and {self.tools} where a row has any"
        names = list(self.roles)
        return f"column{'s' * (len(names) > 1)} {' and '.join(names)}"


def configured(source: SourceConfig, *, alone: bool) -> Columns | None:
    """The columns that `source` names; None where it leaves them to be recognised.

    `alone`: problems are read and nothing else.
    """
    if alone:
        return Columns(problem=source.problem, solution=source.problem) if source.problem else None
    if source.messages:
        return Columns(
            messages=source.messages, tools=source.tools or "", ignore_keys=source.ignore_keys
        )
    if source.problem and source.solution:
        return Columns(problem=source.problem, solution=source.solution)
    return None


def recognise(
    source: SourceConfig, row: Mapping[str, Any], *, alone: bool, where: str
) -> Columns | None:
    """The columns that are known, or named, of a source whose first row is `row`.

    None if there are none: `require_known` says what to do then. `where` is FILE:NUMBER.
    """
    talks = [name for name in MESSAGES if name in row and not alone]
    if talks and not source.problem and not source.solution:
        if "system" in row:
            raise DataError(
                f"{where}: the columns system and {talks[0]} are not read by themselves, as the "
                f"system text would be left out. Fix: make it the first message of {talks[0]}; or "
                f"leave it out with messages: {talks[0]}"
            )
        return Columns(
            messages=talks[0],
            tools=TOOLS,
            tools_known=True,
            ignore_keys=source.ignore_keys,
        )
    for problem, solution in PAIRS:
        problem = source.problem or problem
        solution = problem if alone else source.solution or solution
        if problem in row and solution in row:
            if problem == "instruction" and "input" in row and not (source.problem or alone):
                raise DataError(
                    f"{where}: the columns instruction, input and output are not read by "
                    "themselves, as the input would be left out. Fix: join it to the instruction; "
                    "or leave it out with problem: instruction and solution: output"
                )
            return Columns(problem=problem, solution=solution)
    return None


def require_known(
    source: SourceConfig, row: Mapping[str, Any], *, alone: bool, where: str
) -> Columns:
    """The columns that are read; `DataError` proposes keys where they cannot be told."""
    found = configured(source, alone=alone) or recognise(source, row, alone=alone, where=where)
    if found is not None:
        return found
    for role, column in (("problem", source.problem), ("solution", source.solution)):
        if column and column not in row:
            raise DataError(f"{where}: {missing(row, column, role)}")
    known = ", ".join([*MESSAGES, *(" and ".join(pair) for pair in PAIRS)])
    raise DataError(
        f"{where}: no columns that are known ({known}); columns: {_names(row)}; "
        f"{_proposal(source, row, alone)}"
    )


def missing(row: Iterable[str], column: str, role: str) -> str:
    """What to say of a row, or of the names of columns, that lacks `column`."""
    names = list(map(str, row))
    near = difflib.get_close_matches(column, names, n=1) or [
        name for name in names if name in column or column in name
    ]
    if not near and isinstance(row, Mapping):
        near = _conversations(row) if role == "messages" else []
    hint = f"did you mean {role}: {near[0]}?" if near else f"name it with {role}: COLUMN"
    return f"no column {column!r} for the {role}; columns: {_names(names)}; {hint}"


def _proposal(source: SourceConfig, row: Mapping[str, Any], alone: bool) -> str:
    """The keys that fit what a row holds."""
    if alone:
        return "name the problem with problem: COLUMN"
    if talks := _conversations(row):
        return f"name the conversations with messages: {talks[0]}"
    if source.problem:
        return "name the solution with solution: COLUMN"
    texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
    if len(texts) == 2:
        return f"name them with problem: {texts[0]} and solution: {texts[1]}"
    return "name them with problem: COLUMN and solution: COLUMN, or messages: COLUMN"


def _conversations(row: Mapping[str, Any]) -> list[str]:
    """Columns that hold a list of messages, or the JSON text of one."""
    return [name for name, value in row.items() if _is_conversation(value)]


def _is_conversation(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else None
        except (ValueError, RecursionError):
            return False
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({"role", "from"} & set(first))


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
