"""A file of rows in columns in, its rows out: Parquet by row groups, Arrow by record batches.

    file, part -> record batches from there on -> the rows of a block

A part is a row group or a record batch. Rows are numbered from 1 on, as in messages.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from mcore_sft.data.errors import DataError, first_line
from mcore_sft.data.sources.columns import wanted_columns
from mcore_sft.data.sources.known_columns import Columns
from mcore_sft.data.sources.source_file import SourceFile

ROWS_AT_ONCE = 64
"""Rows of Parquet that are decoded together: where a text is repeated, each may take megabytes."""


class Parquet:
    """A Parquet file that is open."""

    sequential = False

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self.schema = opened.schema_arrow
        self.num_groups: int = opened.metadata.num_row_groups
        self.num_rows: int = opened.metadata.num_rows

    def batches(self, part: int, columns: Sequence[str], end: int | None = None) -> Iterator[Any]:
        """Record batches of the row groups from `part` to `end`, or to the last."""
        # Group by group: some nested types are not read over the end of one.
        for group in range(part, self.num_groups if end is None else end):
            for batch in self._opened.iter_batches(
                ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False
            ):
                yield batch.select(columns)  # the name of one may be the beginning of another's


class Arrow:
    """An Arrow file or stream that is open. sequential: whether it is a stream."""

    def __init__(self, mapped: Any) -> None:
        self._mapped = mapped
        self.sequential = mapped.read(6) != b"ARROW1"
        self._open = pa.ipc.open_stream if self.sequential else pa.ipc.open_file
        mapped.seek(0)
        self.schema = self._open(mapped).schema

    def batches(self, part: int, columns: Sequence[str]) -> Iterator[Any]:
        """Record batches from number `part` on."""
        mapped = self._mapped
        mapped.seek(0)
        fields = [self.schema.get_field_index(column) for column in columns]
        options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        reader = self._open(mapped, options=options)
        if not self.sequential:
            for number in range(part, reader.num_record_batches):
                yield reader.get_batch(number)
            return
        end = mapped.tell()
        for number, batch in enumerate(reader):
            end = mapped.tell()
            if number >= part:
                yield batch
        # Arrow takes the end of the file for that of the stream, also where messages are missing.
        if mapped.tell() - end not in (4, 8):  # bytes of the marker, before Arrow 0.15 and since
            raise pa.ArrowInvalid("it ends without the end-of-stream marker: it was cut short")
        if left := mapped.size() - mapped.tell():
            raise pa.ArrowInvalid(f"{left} bytes follow the end of its stream")


@contextmanager
def open_table(file: SourceFile) -> Iterator[Parquet | Arrow]:
    """The table in `file`; `DataError` if it cannot be read, or changes meanwhile."""
    with ExitStack() as opened, _reading(file):
        yield _open(file, opened)


class OpenTable:
    """The table that blocks are read from, which stays open: the next one often goes on there."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._of: tuple[SourceFile, Columns] | None = None
        self._table: Any = None
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._at = 0  # number of the first row of that batch

    def read(
        self,
        file: SourceFile,
        columns: Columns,
        name: str,
        *,
        part: int,
        skip: int,
        first: int,
        rows: int,
    ) -> pa.Table:
        """`rows` rows from row `skip` of `part` on, which is row number `first`."""
        same, self._of = self._of == (file, columns), None
        with _reading(file):
            if not same:
                self._opened.close()
                self._table = _open(file, self._opened)
            begin = first - skip
            ahead = begin <= self._at or self._table.sequential
            if not (same and ahead and self._at <= first):
                wanted = wanted_columns(columns, self._table.schema, name)
                self._batches = self._table.batches(part, wanted)
                self._batch, self._at = next(self._batches, None), begin
            taken = self._take(first, rows)
        self._of = file, columns
        return pa.Table.from_batches(taken)

    def _take(self, first: int, rows: int) -> list[Any]:
        """So many rows from number `first` on; what the last batch has behind them is kept."""
        taken: list[Any] = []
        while rows:
            if self._batch is None:
                raise pa.ArrowInvalid("it has fewer rows than it had")
            before = first - self._at
            if before >= len(self._batch):
                self._at += len(self._batch)
                self._batch = next(self._batches, None)
                continue
            taken.append(self._batch.slice(before, rows))
            first, rows = first + len(taken[-1]), rows - len(taken[-1])
        return taken


def _open(file: SourceFile, opened: ExitStack) -> Parquet | Arrow:
    if file.kind == ".parquet":
        return Parquet(opened.enter_context(pyarrow.parquet.ParquetFile(file.path)))
    return Arrow(opened.enter_context(pa.memory_map(str(file.path))))


@contextmanager
def _reading(file: SourceFile) -> Iterator[None]:
    """`DataError` if the file cannot be read or has changed."""
    file.require_unchanged()  # before as well: what is mapped and cut short ends the process
    try:
        yield
    except DataError:
        file.require_unchanged()
        raise
    except (pa.ArrowException, OSError) as error:
        file.require_unchanged()
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{file.path}: cannot be read ({os.strerror(error.errno)})") from None
        form, more = "an Arrow file or stream", "; Feather is read in its version 2"
        if file.kind == ".parquet":
            form, more = "a Parquet file", ""
        raise DataError(
            f"{file.path}: not {form} that can be read ({first_line(error)}){more}"
        ) from None
    file.require_unchanged()
