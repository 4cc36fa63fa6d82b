"""Blocks: some consecutive rows of a source, small to hand to a worker process, which reads them.

    Block.read -> Pairs | Chats | Tokens

A block says where its rows lie, or holds them where only one process can get at them in order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash

from mcore_sft.data.rows import Chats, Pairs, Tokens
from mcore_sft.data.sources.columns import RowReader
from mcore_sft.data.sources.foreign import read_megatron
from mcore_sft.data.sources.known_columns import Columns
from mcore_sft.data.sources.open_table import OpenTable
from mcore_sft.data.sources.single_row import MAX_ROW_BYTES
from mcore_sft.data.sources.source_file import SourceFile, changed


@dataclass(frozen=True, kw_only=True)
class Block(ABC):
    """Some rows of one source.

    columns: which are read; name: the file or dataset; first: number of the first line or row
    there, from 1; size: bytes of the source; rows: how many of them are to be read, None where
    nobody has counted.
    """

    columns: Columns
    name: str
    first: int
    size: int
    rows: int | None = None

    def read(
        self, *, skip_bad: bool, eos: int | None = None, table: OpenTable | None = None
    ) -> Pairs | Chats | Tokens:
        """Its rows. One that cannot be used is a `DataError`, or with `skip_bad` in `Rows.bad`.

        `eos` is the tokenizer's end of a sequence, with which Megatron-Bridge pads; without it no
        token is taken for padding. `table` stays open between blocks that are read in order.
        """
        reader = RowReader(
            columns=self.columns, name=self.name, first=self.first, skip_bad=skip_bad, eos=eos
        )
        return self._read(reader, OpenTable() if table is None else table)

    @abstractmethod
    def _read(self, reader: RowReader, table: OpenTable) -> Pairs | Chats | Tokens: ...


@dataclass(frozen=True, kw_only=True)
class LineBlock(Block):
    """Whole lines from byte `start` of a file; `digest` is their xxh3."""

    file: SourceFile
    start: int
    digest: int

    def _read(self, reader: RowReader, _: OpenTable) -> Pairs | Chats:
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

    def _read(self, reader: RowReader, _: OpenTable) -> Pairs | Chats:
        return reader.lines(self.data)


@dataclass(frozen=True, kw_only=True)
class ValueBlock(Block):
    """Values of a JSON array."""

    values: tuple[Any, ...]

    def _read(self, reader: RowReader, _: OpenTable) -> Pairs | Chats:
        return reader.values(self.values[: self.rows])


@dataclass(frozen=True, kw_only=True)
class FileBlock(Block):
    """Rows of a Parquet or Arrow file, from row `skip` of its row group or batch `part` on."""

    file: SourceFile
    part: int
    skip: int

    def _read(self, reader: RowReader, table: OpenTable) -> Pairs | Chats | Tokens:
        assert self.rows is not None
        rows = table.read(
            self.file,
            self.columns,
            self.name,
            part=self.part,
            skip=self.skip,
            first=self.first,
            rows=self.rows,
        )
        return reader.table(rows)


@dataclass(frozen=True, kw_only=True)
class TableBlock(Block):
    """Rows as an Arrow stream in memory."""

    data: bytes

    def _read(self, reader: RowReader, _: OpenTable) -> Pairs | Chats | Tokens:
        return reader.table(pa.ipc.open_stream(self.data).read_all().slice(0, self.rows))


@dataclass(frozen=True, kw_only=True)
class TokenBlock(Block):
    """Documents of a token file of Megatron-LM, given its .idx."""

    files: tuple[SourceFile, ...]
    mask: Path | Literal["all"]

    def _read(self, reader: RowReader, _: OpenTable) -> Tokens:
        assert self.rows is not None
        for file in self.files:
            file.require_unchanged()
        start, stop = self.first - 1, self.first - 1 + self.rows
        return Tokens(
            name=self.name,
            numbers=np.arange(start + 1, stop + 1, dtype=np.int64),
            examples=read_megatron(self.files[0].path, self.mask, start, stop),
        )


Part = Callable[[int | None], Iterator[Block]]
"""The blocks of one file, of which so many rows are wanted; where that is not None, or the file is
no plain text, each block says how many rows it has."""
