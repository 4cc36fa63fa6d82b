"""Rows as a source holds them in, rows in columns out; a row that cannot be used is named.

    lines of JSON | values of a JSON array | a table -> Pairs | Chats | Tokens

Arrow reads a block at once. Where it finds anything odd, the block is read again row by row by
Python's json, whose verdict counts and which knows the row and what is wrong with it.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from mcore_sft.config import SourceConfig
from mcore_sft.data import json_text
from mcore_sft.data.conversation import checked
from mcore_sft.data.errors import DataError
from mcore_sft.data.foreign import is_bridge, read_bridge
from mcore_sft.data.rows import Chats, Pairs, Tokens, text_offsets

MAX_ROW_BYTES = 10_000_000
"""A longer row is no example but an accident, such as a whole file in one line."""

VOTES = ("majority_votes", "total_votes")
ANSWER = "expected_answer"
"""Columns beside problem and solution, as NeMo-Skills and OpenMathInstruct-2 name them."""

_BOM = b"\xef\xbb\xbf"
_TOO_LONG = f"a row of more than {MAX_ROW_BYTES // 1_000_000} MB; mend or remove it"
_PACKED = ("input_ids", "loss_mask", "seq_start_id")

# First bytes of characters that are white space: of a text that begins otherwise, no more is asked.
_SPACE = np.zeros(256, dtype=np.bool_)
_SPACE[[chr(code).encode()[0] for code in range(0x3001) if chr(code).isspace()]] = True


class BadRow(Exception):
    """Why a row cannot be used."""


class MissingColumn(BadRow):
    """A row lacks a column, which in the first row means that the configuration is wrong."""


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Makes rows of what a block holds. `first` is the number of its first line or row.

    A row that cannot be used is a `DataError`, or with `skip_bad` a sentence in `Rows.bad`.
    `eos` is the token that Megatron-Bridge pads with.
    """

    source: SourceConfig
    name: str
    first: int
    skip_bad: bool
    eos: int | None = None

    def lines(self, data: bytes) -> Pairs | Chats:
        """Lines of JSON, an object each; blank ones are none."""
        if self.first == 1:
            data = data.removeprefix(_BOM)
        if self.source.messages is None:
            table = _parse_lines(data, _schema(self.source))
            pairs = None if table is None else self._pairs(table)
            if pairs is not None:
                return pairs
        lines = enumerate(data.split(b"\n"), start=self.first)
        return self._each(((n, line) for n, line in lines if line.strip()), self._parse_line)

    def values(self, values: Sequence[Any]) -> Pairs | Chats:
        """Values of a JSON array."""
        return self._each(enumerate(values, start=self.first), _require_object)

    def table(self, table: pa.Table) -> Pairs | Chats | Tokens:
        """A table with the columns of `wanted_columns`."""
        if _is_packed(self.source, table.schema):
            examples = read_bridge(table, name=self.name, first=self.first, eos=self.eos)
            return Tokens(name=self.name, numbers=self._numbers(len(table)), examples=examples)
        if self.source.messages is None and (pairs := self._pairs(table)) is not None:
            return pairs
        columns = {name: _whole(table.column(name)) for name in table.column_names}
        rows = ((self.first + i, i) for i in range(len(table)))
        return self._each(rows, lambda i: _row_of(columns, i))

    def unread(self) -> Pairs | Chats:
        """A line that is too long to be looked at."""
        return self._each([(self.first, None)], _refuse_length)

    def _parse_line(self, line: bytes) -> Mapping[str, Any]:
        try:
            return _parse_line(line)
        except BadRow:
            # Arrow alone reads some numbers, such as Inf, and any depth, in columns that are not
            # read. A row that is good in a block of good rows is so among bad ones too.
            if self.source.messages is None:
                table = _parse_lines(line, _schema(self.source))
                if table is not None and self._pairs(table) is not None:
                    return dict(table.to_pylist()[0])
            raise

    def _numbers(self, count: int) -> npt.NDArray[np.int64]:
        return np.arange(self.first, self.first + count, dtype=np.int64)

    def _pairs(self, table: pa.Table) -> Pairs | None:
        """The rows of a table in which each is good; None if one is not."""
        problems = _texts(table, self.source.problem)
        solutions = _texts(table, self.source.solution)
        if problems is None or solutions is None:
            return None
        try:
            answers = _answers(table)
            votes = _votes(table)
        except (pa.ArrowInvalid, UnicodeError, BadRow):
            return None
        return Pairs(
            name=self.name,
            numbers=self._numbers(len(table)),
            problems=problems,
            solutions=solutions,
            votes=votes,
            answers=answers,
        )

    def _each(
        self, rows: Iterable[tuple[int, Any]], parse: Callable[[Any], Mapping[str, Any]]
    ) -> Pairs | Chats:
        """Numbered rows, one after another."""
        pick = _pair if self.source.messages is None else _chat
        numbers: list[int] = []
        picked: list[tuple[Any, ...]] = []
        bad: dict[int, str] = {}
        for number, raw in rows:
            try:
                picked.append(pick(parse(raw), self.source))
            except BadRow as error:
                said = f"{self.name}:{number}: {error}"
                wrong_source = isinstance(error, MissingColumn) and self.first == 1 and not picked
                if wrong_source or not self.skip_bad:
                    raise DataError(said) from None
                bad[number] = said
            else:
                numbers.append(number)
        make = _make_pairs if self.source.messages is None else _make_chats
        return make(picked, name=self.name, numbers=np.array(numbers, dtype=np.int64), bad=bad)


def wanted_columns(source: SourceConfig, schema: pa.Schema, name: str) -> list[str]:
    """Columns of a table that are read; `DataError` if one is missing, or is there twice."""
    wanted = _wanted(source, schema, name)
    for column in wanted:
        if (count := schema.names.count(column)) > 1:
            raise DataError(
                f"{name}:1: {count} columns are named {column!r}, expected one; write the table "
                "again without the others"
            )
    return wanted


def _wanted(source: SourceConfig, schema: pa.Schema, name: str) -> list[str]:
    if _is_packed(source, schema):
        return list(_PACKED)
    if source.messages is None:
        needed = {source.problem: "problem", source.solution: "solution"}
    else:
        needed = {source.messages: "messages"} | ({source.tools: "tools"} if source.tools else {})
    for column, role in needed.items():
        if column not in schema.names:
            raise DataError(f"{name}:1: {_missing(schema.names, column, role)}")
    extra = () if source.messages else (*VOTES, ANSWER)
    return [column for column in schema.names if column in needed or column in extra]


def _is_packed(source: SourceConfig, schema: pa.Schema) -> bool:
    """Whether the table holds tokens, and not the columns that the source names."""
    texts = {source.messages} if source.messages else {source.problem, source.solution}
    return not texts & set(schema.names) and is_bridge(schema)


# --- a whole block by Arrow ---


def _schema(source: SourceConfig) -> pa.Schema:
    texts = dict.fromkeys((ANSWER, source.problem, source.solution), pa.large_string())
    return pa.schema(dict.fromkeys(VOTES, pa.float64()) | texts)


def _parse_lines(data: bytes, schema: pa.Schema) -> pa.Table | None:
    """The lines as a table with a row for each; None unless Arrow can be trusted with them."""
    count = _count_plain(data)
    if not count:
        return None
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(data),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowException:
        return None
    return table if len(table) == count else None


def _count_plain(data: bytes) -> int:
    """Number of lines if each begins with `{`, ends with `}` and is clean; otherwise 0.

    Arrow takes line breaks for any white space, and values that are no objects for rows or even for
    a reason to crash. Where no line break lies within an object, as many rows as lines mean that
    each line is one object.
    """
    if not data or b"\0" in data or not _is_utf8(data):
        return 0
    bytes_ = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(bytes_ == ord("\n"))
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    begins = np.append(0, ends[:-1] + 1)
    lasts = ends - 1
    lasts = lasts - (bytes_[lasts] == ord("\r"))
    plain = (bytes_[begins] == ord("{")).all() and (bytes_[lasts] == ord("}")).all()
    return len(ends) if plain and (ends - begins).max() <= MAX_ROW_BYTES else 0


def _is_utf8(data: bytes) -> bool:
    offsets = pa.py_buffer(np.array([0, len(data)], dtype=np.int64))
    text = pa.LargeStringArray.from_buffers(1, offsets, pa.py_buffer(data))
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _texts(table: pa.Table, column: str) -> pa.LargeStringArray | None:
    """A column of texts; None if one of them cannot be used."""
    index = table.schema.get_field_index(column)
    if index < 0:
        return None
    try:
        texts = _as_strings(_whole(table.column(index)))
    except pa.ArrowInvalid:
        return None
    if texts is None or texts.null_count:
        return None
    lengths = np.diff(text_offsets(texts))
    if not len(texts):
        return texts
    return None if lengths.max() > MAX_ROW_BYTES or _has_blank(texts, lengths) else texts


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _as_strings(values: pa.Array) -> pa.LargeStringArray | None:
    """Strings that are valid UTF-8, or `ArrowInvalid`; None if the values are no strings at all."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    of_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    of_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if not any(is_one(kind) for is_one in (*of_text, *of_bytes)):
        return None
    strings = values if pa.types.is_large_string(kind) else values.cast(pa.large_string())
    strings.validate(full=True)
    return strings


def _has_blank(texts: pa.LargeStringArray, lengths: npt.NDArray[np.int64]) -> bool:
    if not lengths.min():
        return True
    characters = np.frombuffer(texts.buffers()[2], dtype=np.uint8)
    perhaps = _SPACE[characters[text_offsets(texts)[:-1]]]
    return any(not texts[int(index)].as_py().strip() for index in np.flatnonzero(perhaps))


def _votes(table: pa.Table) -> npt.NDArray[np.float64] | None:
    """Votes [N, 2], NaN where a row has none; None if none has; `BadRow` if one is no number."""
    columns = [table.column(name) for name in VOTES if name in table.column_names]
    given = [column for column in columns if column.null_count < len(table)]
    votes = [_numbers_of(column) for column in given]
    return _both_or_none(np.stack(votes, axis=1)) if len(given) == len(VOTES) else None


def _numbers_of(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    if not any(is_one(column.type) for is_one in kinds):
        raise BadRow(f"{column.type} is no number")
    numbers: npt.NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy()
    if np.isinf(numbers).any():
        raise BadRow("an infinity is no number of votes")
    return numbers


def _both_or_none(votes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Votes [N, 2] of which a row has both or none."""
    lacking = np.isnan(votes).any(axis=1, keepdims=True)
    return None if lacking.all() else np.where(lacking, np.nan, votes)


def _answers(table: pa.Table) -> pa.LargeStringArray | None:
    """Expected answers, null where a row has none; None if no row has any."""
    if ANSWER not in table.column_names:
        return None
    column = _whole(table.column(ANSWER))
    if column.null_count == len(column):
        return None
    answers = _as_strings(column)
    if answers is None:
        shown = [None if value is None else str(value) for value in column.to_pylist()]
        answers = pa.array(shown, pa.large_string())
    return answers


# --- row by row ---


def _parse_line(line: bytes) -> Mapping[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise BadRow(_TOO_LONG)
    if b"\0" in line:
        raise BadRow(
            f"a NUL byte (byte {line.index(0) + 1} of the line), expected text; the file is "
            "damaged, or is not UTF-8: write it again"
        )
    try:
        return _require_object(json_text.loads(line.decode()))
    except UnicodeDecodeError as error:
        raise BadRow(
            f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x}); mend or "
            "remove the row, or save the file as UTF-8"
        ) from None
    except ValueError as error:
        raise BadRow(f"broken JSON ({error}); expected one JSON object a line") from None


def _require_object(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(f"expected a JSON object, found {type(row).__name__}")
    return row


def _refuse_length(_: None) -> Mapping[str, Any]:
    raise BadRow(_TOO_LONG)


def _row_of(columns: Mapping[str, pa.Array], index: int) -> Mapping[str, Any]:
    """One row of a table. Arrow gives all structs the same keys: a key without a value is none."""
    row = {}
    for name, column in columns.items():
        try:
            row[name] = _without_nulls(column[index].as_py())
        except UnicodeDecodeError as error:
            raise BadRow(
                f"column {name!r} is not UTF-8 ({error}); mend or remove the row"
            ) from None
    return row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _pair(row: Mapping[str, Any], source: SourceConfig) -> tuple[Any, ...]:
    """Problem, solution, two votes or NaN, expected answer or none."""
    problem = _text(row, source.problem, "problem")
    solution = _text(row, source.solution, "solution")
    return problem, solution, *(_number_of_votes(row, name) for name in VOTES), _answer(row)


def _make_pairs(picked: Sequence[tuple[Any, ...]], **rest: Any) -> Pairs:
    problems, solutions, majority, total, answers = (
        zip(*picked, strict=True) if picked else [()] * 5
    )
    votes = np.array([majority, total], dtype=np.float64).reshape(2, -1).T
    some = any(answer is not None for answer in answers)
    return Pairs(
        problems=pa.array(problems, pa.large_string()),
        solutions=pa.array(solutions, pa.large_string()),
        votes=_both_or_none(votes),
        answers=pa.array(answers, pa.large_string()) if some else None,
        **rest,
    )


def _text(row: Mapping[str, Any], column: str, role: str) -> str:
    if column not in row:
        raise MissingColumn(_missing(row, column, role))
    text = row[column]
    if isinstance(text, bytes):
        text = _decoded(text, column)
    if not isinstance(text, str) or not text.strip():
        found = "nothing" if text is None else _shown(text)
        if isinstance(text, str):
            found = "only blanks"
        raise BadRow(
            f"column {column!r} holds {found}, expected the text of the {role}; "
            "mend or remove the row"
        )
    if _size(text, column) > MAX_ROW_BYTES:
        raise BadRow(_TOO_LONG)
    return text


def _decoded(text: bytes, column: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise BadRow(f"column {column!r} is not UTF-8 ({error}); mend or remove the row") from None


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
    answer = _decoded(value, ANSWER) if isinstance(value, bytes) else str(value)
    _size(answer, ANSWER)
    return answer


def _chat(row: Mapping[str, Any], source: SourceConfig) -> tuple[Any, ...]:
    """Messages, and tools or none."""
    assert source.messages is not None
    if source.messages not in row:
        raise MissingColumn(_missing(row, source.messages, "messages"))
    messages = _objects(row[source.messages], source.messages, "messages (role, content)")
    if not messages:
        raise BadRow(
            f"column {source.messages!r} holds nothing, expected a list of messages "
            "(role, content); mend or remove the row"
        )
    if source.tools and source.tools not in row:
        raise MissingColumn(_missing(row, source.tools, "tools"))
    tools = _objects(row[source.tools], source.tools, "tools") if source.tools else None
    try:
        return checked(messages, source.ignore_keys), tools
    except DataError as error:
        raise BadRow(f"column {source.messages!r}: {error}; mend or remove the row") from None


def _make_chats(picked: Sequence[tuple[Any, ...]], **rest: Any) -> Chats:
    tools = [tools for _, tools in picked]
    some = any(each is not None for each in tools)
    return Chats(messages=[said for said, _ in picked], tools=tools if some else None, **rest)


def _objects(value: Any, column: str, what: str) -> list[Mapping[str, Any]] | None:
    """A list of objects, which some datasets hold as JSON text; None if there is none."""
    found = value
    if isinstance(value, str):
        try:
            found = json_text.loads(value)
        except ValueError:
            found = None
    elif value is None:
        return None
    if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
        raise BadRow(
            f"column {column!r} holds {_shown(value)}, expected a list of {what}; "
            "mend or remove the row"
        )
    if _size(json.dumps(found, ensure_ascii=False, default=str), column) > MAX_ROW_BYTES:
        raise BadRow(_TOO_LONG)
    return found


def _shown(value: Any) -> str:
    """A value as messages show it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _missing(names: Iterable[str], column: str, role: str) -> str:
    names = list(map(str, names))
    near = difflib.get_close_matches(column, names, n=1) or [
        name for name in names if name in column or column in name
    ]
    hint = f"; did you mean {role}: {near[0]}?" if near else f"; name it with {role}: COLUMN"
    return f"no column {column!r} for the {role}; columns: {', '.join(names) or 'none'}{hint}"
