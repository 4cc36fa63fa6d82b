"""Blocks: some consecutive rows of a source, small to hand to a worker process, which reads them.

    Block.read -> Pairs | Chats | Tokens

A block says where its rows lie, or holds them where only one process can get at them in order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import xxhash

from mcore_sft.config import SourceConfig
from mcore_sft.data.columns import MAX_ROW_BYTES, RowReader, wanted_columns
from mcore_sft.data.errors import DataError
from mcore_sft.data.foreign import read_megatron
from mcore_sft.data.rows import Chats, Pairs, Tokens


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when the sources were surveyed."""

    path: Path
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> "SourceFile":
        """The file as it is now."""
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    @property
    def kind(self) -> str:
        """The ending of its name in lower case, which says what it is read as."""
        return self.path.suffix.lower()

    def require_unchanged(self) -> None:
        """`DataError` if the file is not what it was."""
        try:
            unchanged = SourceFile.of(self.path) == self
        except OSError:
            unchanged = False
        if not unchanged:
            raise changed(self.path)


def changed(path: Path) -> DataError:
    """The error for a file that is not what it was."""
    return DataError(
        f"{path}: it changed while it was read; run again when nothing writes to it any more"
    )


@dataclass(frozen=True, kw_only=True)
class Block(ABC):
    """Some rows of one source.

    name: the file or dataset; first: number of the first line or row there, from 1; size: bytes of
    the source; rows: how many of them are to be read, None where nobody has counted.
    """

    source: SourceConfig
    name: str
    first: int
    size: int
    rows: int | None = None

    def read(self, *, skip_bad: bool, eos: int | None = None) -> Pairs | Chats | Tokens:
        """Its rows. One that cannot be used is a `DataError`, or with `skip_bad` in `Rows.bad`.

        `eos` is the tokenizer's end of a sequence, with which Megatron-Bridge pads; without it no
        token is taken for padding.
        """
        return self._read(
            RowReader(
                source=self.source, name=self.name, first=self.first, skip_bad=skip_bad, eos=eos
            )
        )

    @abstractmethod
    def _read(self, reader: RowReader) -> Pairs | Chats | Tokens: ...


@dataclass(frozen=True, kw_only=True)
class LineBlock(Block):
    """Whole lines from byte `start` of a file; `digest` is their xxh3."""

    file: SourceFile
    start: int
    digest: int

    def _read(self, reader: RowReader) -> Pairs | Chats:
        if self.size > 2 * MAX_ROW_BYTES:  # more than a block can have, unless it is one line
            return reader.unread()
        try:
            with self.file.path.open("rb") as opened:
                opened.seek(self.start)
                data = opened.read(self.size)
                size = opened.seek(0, 2)
        except OSError:
            raise changed(self.file.path) from None
        if size != self.file.size or xxhash.xxh3_64_intdigest(data) != self.digest:
            raise changed(self.file.path)
        return reader.lines(data)


@dataclass(frozen=True, kw_only=True)
class TextBlock(Block):
    """Whole lines of a file that can only be read from its beginning on."""

    data: bytes

    def _read(self, reader: RowReader) -> Pairs | Chats:
        return reader.lines(self.data)


@dataclass(frozen=True, kw_only=True)
class ValueBlock(Block):
    """Values of a JSON array."""

    values: tuple[Any, ...]

    def _read(self, reader: RowReader) -> Pairs | Chats:
        return reader.values(self.values[: self.rows])


@dataclass(frozen=True, kw_only=True)
class ParquetBlock(Block):
    """Some row groups of a Parquet file."""

    file: SourceFile
    groups: tuple[int, ...]

    def _read(self, reader: RowReader) -> Pairs | Chats | Tokens:
        with open_parquet(self.file) as opened:
            columns = wanted_columns(self.source, opened.schema_arrow, self.name)
            table = opened.read_row_groups(self.groups, columns=columns, use_threads=False)
        return reader.table(table.slice(0, self.rows))


@dataclass(frozen=True, kw_only=True)
class ArrowBlock(Block):
    """Rows of an Arrow file or stream, from row `skip` of its record batch `batch` on."""

    file: SourceFile
    batch: int
    skip: int

    def _read(self, reader: RowReader) -> Pairs | Chats | Tokens:
        assert self.rows is not None
        pieces, left = [], self.skip + self.rows
        with open_arrow(self.file, self.source, self.name, start=self.batch) as batches:
            for batch in batches:
                pieces.append(batch)
                left -= len(batch)
                if left <= 0:
                    break
            return reader.table(pa.Table.from_batches(pieces).slice(self.skip, self.rows))


@dataclass(frozen=True, kw_only=True)
class TableBlock(Block):
    """Rows as an Arrow stream in memory."""

    data: bytes

    def _read(self, reader: RowReader) -> Pairs | Chats | Tokens:
        return reader.table(pa.ipc.open_stream(self.data).read_all().slice(0, self.rows))


@dataclass(frozen=True, kw_only=True)
class TokenBlock(Block):
    """Documents of a token file of Megatron-LM, given its .idx."""

    files: tuple[SourceFile, ...]
    mask: Path | Literal["all"]

    def _read(self, reader: RowReader) -> Tokens:
        assert self.rows is not None
        for file in self.files:
            file.require_unchanged()
        start, stop = self.first - 1, self.first - 1 + self.rows
        return Tokens(
            name=self.name,
            numbers=np.arange(start + 1, stop + 1, dtype=np.int64),
            examples=read_megatron(self.files[0].path, self.mask, start, stop),
        )


@contextmanager
def open_parquet(file: SourceFile) -> Iterator[Any]:
    """The Parquet file; `DataError` if it cannot be read or has changed."""
    try:
        with pyarrow.parquet.ParquetFile(file.path) as opened:
            yield opened
        file.require_unchanged()
    except DataError:
        file.require_unchanged()
        raise
    except (pa.ArrowException, OSError) as error:
        file.require_unchanged()
        raise DataError(
            f"{file.path}: not a Parquet file that can be read ({_first_line(error)})"
        ) from None


@contextmanager
def open_arrow(
    file: SourceFile, source: SourceConfig, name: str, *, start: int = 0
) -> Iterator[Iterator[Any]]:
    """Record batches of an Arrow file or stream from number `start` on, with the columns needed."""
    file.require_unchanged()  # before as well: what is mapped and cut short ends the process
    try:
        with pa.memory_map(str(file.path)) as mapped:
            yield _batches(mapped, source, name, start)
        file.require_unchanged()
    except DataError:
        file.require_unchanged()
        raise
    except (pa.ArrowException, OSError) as error:
        file.require_unchanged()
        raise DataError(
            f"{file.path}: not an Arrow file or stream that can be read ({_first_line(error)}); "
            "Feather is read in its version 2"
        ) from None


def _batches(mapped: Any, source: SourceConfig, name: str, start: int) -> Iterator[Any]:
    is_file = mapped.read(6) == b"ARROW1"
    open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
    mapped.seek(0)
    schema = open_reader(mapped).schema
    fields = [schema.get_field_index(column) for column in wanted_columns(source, schema, name)]
    mapped.seek(0)
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    reader = open_reader(mapped, options=options)
    if is_file:
        for number in range(start, reader.num_record_batches):
            yield reader.get_batch(number)
    else:
        end = mapped.tell()
        for number, batch in enumerate(reader):
            end = mapped.tell()
            if number >= start:
                yield batch
        # Arrow takes the end of the file for that of the stream, also where messages are missing.
        if mapped.tell() - end not in (4, 8):  # bytes of the marker, before Arrow 0.15 and since
            raise pa.ArrowInvalid("it ends without the end-of-stream marker: it was cut short")
        if left := mapped.size() - mapped.tell():
            raise pa.ArrowInvalid(f"{left} bytes follow the end of its stream")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


Part = Callable[[int | None], Iterator[Block]]
"""The blocks of one file, of which so many rows are wanted; where that is not None, or the file is
no plain text, each block says how many rows it has."""
