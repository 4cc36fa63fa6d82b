"""Rows as a source holds them in, rows in columns out; a row that cannot be used is named.

    lines of JSON | values of a JSON array | a table -> Pairs | Chats | Tokens

Arrow reads a block at once. Where it finds anything odd, the block is read again row by row
(single_row.py), whose verdict counts and which knows the row and what is wrong with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import Chats, Pairs, Tokens, text_offsets
from mcore_sft.data.sources.arrow_values import EXTENSION, Values, json_values
from mcore_sft.data.sources.foreign import BRIDGE, is_bridge, read_bridge
from mcore_sft.data.sources.known_columns import Columns, missing
from mcore_sft.data.sources.single_row import (
    ANSWER,
    MAX_ROW_BYTES,
    TOO_LONG,
    VOTES,
    BadRow,
    MissingColumn,
    chat,
    pair,
    parse_line,
    require_object,
)

MESSAGE_TEXTS = frozenset({"content", "reasoning_content", "thinking"})
"""Keys of a message that hold text."""

_BOM = b"\xef\xbb\xbf"

# First bytes of characters that are white space: of a text that begins otherwise, no more is asked.
_SPACE = np.zeros(256, dtype=np.bool_)
_SPACE[[chr(code).encode()[0] for code in range(0x3001) if chr(code).isspace()]] = True


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Makes rows of what a block holds. `first` is the number of its first line or row.

    A row that cannot be used is a `DataError`, or with `skip_bad` a sentence in `Rows.bad`.
    `eos` is the token that Megatron-Bridge pads with.
    """

    columns: Columns
    name: str
    first: int
    skip_bad: bool
    eos: int | None = None

    def lines(self, data: bytes) -> Pairs | Chats:
        """Lines of JSON, an object each; blank ones are none."""
        if self.first == 1:
            data = data.removeprefix(_BOM)
        if not self.columns.messages:
            table = _parse_lines(data, _schema(self.columns))
            pairs = None if table is None else self._pairs(table)
            if pairs is not None:
                return pairs
        lines = enumerate(data.split(b"\n"), start=self.first)
        return self._each(((n, line) for n, line in lines if line.strip()), self._parse_line)

    def values(self, values: Sequence[Any]) -> Pairs | Chats:
        """Values of a JSON array."""
        return self._each(enumerate(values, start=self.first), require_object)

    def table(self, table: pa.Table) -> Pairs | Chats | Tokens:
        """A table with the columns of `wanted_columns`."""
        if _is_packed(self.columns, table.schema):
            examples = read_bridge(table, name=self.name, first=self.first, eos=self.eos)
            return Tokens(name=self.name, numbers=self._numbers(len(table)), examples=examples)
        if not self.columns.messages and (pairs := self._pairs(table)) is not None:
            return pairs
        own = frozenset((self.columns.problem, self.columns.solution, ANSWER))
        texts = MESSAGE_TEXTS if self.columns.messages else own
        try:
            rows = _rows_of(table, texts)
        except BadRow:  # one by one, to tell which it is
            return self._each(
                enumerate(range(len(table)), start=self.first),
                lambda i: _rows_of(table.slice(i, 1), texts)[0],
            )
        return self._each(enumerate(rows, start=self.first), lambda row: row)

    def unread(self) -> Pairs | Chats:
        """A line that is too long to be looked at."""
        return self._each([(self.first, None)], _refuse_length)

    def _parse_line(self, line: bytes) -> Mapping[str, Any]:
        try:
            return parse_line(line)
        except BadRow:
            # Arrow alone reads some numbers, such as Inf, and any depth, in columns that are not
            # read. A row that is good in a block of good rows is so among bad ones too.
            if not self.columns.messages:
                table = _parse_lines(line, _schema(self.columns))
                if table is not None and self._pairs(table) is not None:
                    return dict(table.to_pylist()[0])
            raise

    def _numbers(self, count: int) -> npt.NDArray[np.int64]:
        return np.arange(self.first, self.first + count, dtype=np.int64)

    def _pairs(self, table: pa.Table) -> Pairs | None:
        """The rows of a table in which each is good; None if one is not."""
        problems = _texts(table, self.columns.problem)
        solutions = _texts(table, self.columns.solution)
        if problems is None or solutions is None:
            return None
        try:
            answers = _answers(table)
            votes = _votes(table)
        except (ValueError, BadRow):
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
        pick = chat if self.columns.messages else pair
        numbers: list[int] = []
        picked: list[tuple[Any, ...]] = []
        bad: dict[int, str] = {}
        names: set[str] = set()  # of all rows
        for number, raw in rows:
            try:
                row = parse(raw)
                names.update(row)
                picked.append(pick(row, self.columns))
            except BadRow as error:
                said = f"{self.name}:{number}: {error}"
                wrong_source = isinstance(error, MissingColumn) and self.first == 1 and not picked
                if wrong_source or not self.skip_bad:
                    raise DataError(said) from None
                bad[number] = said
            else:
                numbers.append(number)
        asked = "" if self.columns.tools_known else self.columns.tools
        if asked and asked not in names and self.first == 1 and picked:  # a slip of the pen
            raise DataError(f"{self.name}:1: {missing(sorted(names), asked, 'tools')}")
        make = _make_chats if self.columns.messages else _make_pairs
        return make(picked, name=self.name, numbers=np.array(numbers, dtype=np.int64), bad=bad)


def wanted_columns(columns: Columns, schema: pa.Schema, name: str) -> list[str]:
    """Columns of a table that are read; `DataError` if one is missing, or is there twice."""
    wanted = _wanted(columns, schema, name)
    for column in wanted:
        if (count := schema.names.count(column)) > 1:
            raise DataError(
                f"{name}:1: {count} columns are named {column!r}, expected one; write the table "
                "again without the others"
            )
    return wanted


def _wanted(columns: Columns, schema: pa.Schema, name: str) -> list[str]:
    if _is_packed(columns, schema):
        return list(BRIDGE)
    for column, role in columns.roles.items():
        if column not in schema.names and not (role == "tools" and columns.tools_known):
            raise DataError(f"{name}:1: {missing(schema.names, column, role)}")
    extra = () if columns.messages else (*VOTES, ANSWER)
    return [column for column in schema.names if column in columns.roles or column in extra]


def _is_packed(columns: Columns, schema: pa.Schema) -> bool:
    """Whether the table holds tokens, and not the columns that are read."""
    return columns.roles.keys().isdisjoint(schema.names) and is_bridge(schema)


def texts_in(line: bytes, names: Iterable[str]) -> Mapping[str, Any]:
    """Those of `names` that hold a text in a line which Python's json cannot read, by Arrow."""
    table = _parse_lines(line, pa.schema(dict.fromkeys(names, pa.large_string())))
    row = table.to_pylist()[0] if table is not None else {}
    return {name: text for name, text in row.items() if text is not None}


# --- a whole block by Arrow ---


def _schema(columns: Columns) -> pa.Schema:
    texts = dict.fromkeys((ANSWER, columns.problem, columns.solution), pa.large_string())
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
        texts = _as_strings(table.column(index), table.schema.field(index))
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


def _as_strings(column: pa.ChunkedArray, field: pa.Field) -> pa.LargeStringArray | None:
    """Strings that are valid UTF-8, or `ArrowInvalid`; None if the values are no plain strings."""
    values = _whole(column)
    if field.metadata and EXTENSION in field.metadata:
        return None
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
    column, field = table.column(ANSWER), table.schema.field(ANSWER)
    if column.null_count == len(column):
        return None
    answers = _as_strings(column, field)
    if answers is None:
        values = json_values(_whole(column), field, frozenset({ANSWER}))
        shown = [None if value is None else str(value) for value in values]
        answers = pa.array(shown, pa.large_string())
    return answers


# --- row by row ---


def _refuse_length(_: None) -> Mapping[str, Any]:
    raise BadRow(TOO_LONG)


def _rows_of(table: pa.Table, texts: frozenset[str]) -> list[Mapping[str, Any]]:
    """The rows of a table; `BadRow` if one of them cannot be read."""
    columns: list[Values] = []
    for name in table.column_names:
        try:
            columns.append(json_values(_whole(table[name]), table.schema.field(name), texts))
        except UnicodeDecodeError as error:
            raise BadRow(
                f"column {name!r} is not UTF-8 ({error}); mend or remove the row"
            ) from None
        except (ValueError, OverflowError, NotImplementedError) as error:
            raise BadRow(f"column {name!r}: {error}; mend or remove the row") from None
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


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


def _make_chats(picked: Sequence[tuple[Any, ...]], **rest: Any) -> Chats:
    tools = [tools for _, tools in picked]
    some = any(each is not None for each in tools)
    return Chats(messages=[said for said, _ in picked], tools=tools if some else None, **rest)
