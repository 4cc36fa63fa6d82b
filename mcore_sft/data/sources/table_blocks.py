"""A file of rows in columns in, its blocks out: Parquet, Arrow, and tokens of Megatron-LM."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mcore_sft.config import SourceConfig
from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.arrow_sizes import row_sizes
from mcore_sft.data.sources.blocks import Block, FileBlock, TableBlock, TokenBlock
from mcore_sft.data.sources.columns import wanted_columns
from mcore_sft.data.sources.foreign import count_megatron
from mcore_sft.data.sources.known_columns import Columns
from mcore_sft.data.sources.open_table import Parquet, open_table
from mcore_sft.data.sources.source_file import SourceFile

TABLE_BYTES = 16 << 20
"""Columns of one block of a table, as they are once every row has been read (`row_sizes`)."""

_ROWS_AT_ONCE = 1000
"""Rows of a dataset in memory that are measured together."""


def table_blocks(
    columns: Columns, file: SourceFile, name: str, *, first: int = 1
) -> Iterator[FileBlock]:
    """Row groups or record batches, several small ones together, and a large one in pieces."""
    with open_table(file) as table:
        wanted = wanted_columns(columns, table.schema, name)
        stretches: Iterable[tuple[int, int, int]]
        if isinstance(table, Parquet):
            groups = range(table.num_groups)
            total = table.num_rows
            stretches = _stretches(table.batches(group, wanted, group + 1) for group in groups)
        else:
            stretches = list(_stretches([batch] for batch in table.batches(0, wanted)))
            total = sum(rows for _, _, rows in stretches)
        done = 0
        for part, skip, rows in stretches:
            yield FileBlock(
                columns=columns,
                name=name,
                first=first + done,
                size=_share(file.size, done, done + rows, total),
                rows=rows,
                file=file,
                part=part,
                skip=skip,
            )
            done += rows


def _share(size: int, start: int, stop: int, total: int) -> int:
    """Bytes for the rows `start` to `stop`, of `size` for all; those of all add up to it."""
    return size * stop // total - size * start // total if total else 0


def _stretches(parts: Iterable[Iterable[Any]]) -> Iterator[tuple[int, int, int]]:
    """(part, rows of it before, rows) of each block, given the record batches of each part."""
    begin, rows, size = 0, 0, 0  # of small parts that are together
    for part, batches in enumerate(parts):
        pieces = _pieces(batches)
        whole, more = next(pieces, (0, 0)), next(pieces, None)
        if rows and (more or size + whole[1] > TABLE_BYTES):
            yield begin, 0, rows
            rows, size = 0, 0
        if more is None:
            begin = begin if rows else part
            rows, size = rows + whole[0], size + whole[1]
            continue
        skip = 0
        for count, _ in (whole, more, *pieces):
            yield part, skip, count
            skip += count
    if rows:
        yield begin, 0, rows


def _pieces(batches: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Rows and bytes of each piece: as many rows as have TABLE_BYTES together, or a larger one."""
    rows, size = 0, 0
    for batch in batches:
        ends = np.cumsum(row_sizes(batch))
        start, before = 0, 0
        while start < len(ends):
            stop = int(np.searchsorted(ends, before + TABLE_BYTES - size, side="right"))
            if stop == start and not rows:
                stop += 1
            taken = int(ends[stop - 1]) - before if stop > start else 0
            rows, size = rows + stop - start, size + taken
            start, before = stop, before + taken
            if start < len(ends):
                yield rows, size
                rows, size = 0, 0
    if rows:
        yield rows, size


def token_blocks(source: SourceConfig, files: Sequence[SourceFile], root: Path) -> list[Block]:
    """Documents of a token file of Megatron-LM."""
    path = files[0].path
    if source.mask is None:
        raise DataError(
            f"{path}: Megatron's tokens do not say which of them are trained, and all would be the "
            "prompts too; give the source a mask: an .idx of 0 and 1, or mask: all"
        )
    mask: Path | Literal["all"] = "all" if source.mask == "all" else root / source.mask
    total = count_megatron(path)
    size = sum(file.size for file in files)
    step = max(1, total * TABLE_BYTES // max(size, 1))
    return [
        TokenBlock(
            columns=Columns(),
            name=str(path),
            first=start + 1,
            size=_share(size, start, min(start + step, total), total),
            rows=min(step, total - start),
            files=tuple(files),
            mask=mask,
        )
        for start in range(0, total, step)
    ]


def dataset_blocks(columns: Columns, dataset: Any, name: str) -> Iterator[Block]:
    """Blocks of a dataset that is no file, or whose rows are chosen from one."""
    total, size, done = len(dataset), dataset.data.nbytes, 0
    starts = range(0, total, _ROWS_AT_ONCE)
    for rows, _ in _pieces(dataset[start : start + _ROWS_AT_ONCE] for start in starts):
        sink = pa.BufferOutputStream()
        table = dataset[done : done + rows]
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write(table)
        yield TableBlock(
            columns=columns,
            name=name,
            first=done + 1,
            size=_share(size, done, done + rows, total),
            rows=rows,
            data=sink.getvalue().to_pybytes(),
        )
        done += rows
