"""A file of rows in columns in, its blocks out: Parquet, Arrow, and tokens of Megatron-LM."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mcore_sft.config import SourceConfig
from mcore_sft.data.blocks import (
    ArrowBlock,
    Block,
    ParquetBlock,
    SourceFile,
    TableBlock,
    TokenBlock,
    open_arrow,
    open_parquet,
)
from mcore_sft.data.columns import wanted_columns
from mcore_sft.data.errors import DataError
from mcore_sft.data.foreign import count_megatron

TABLE_BYTES = 16 << 20
"""Columns of one block of a table, uncompressed."""

LARGEST_GROUP = 64 << 20
"""A row group of Parquet that is larger is cut while it is read, as each reader starts afresh."""


def _share(file: SourceFile, start: int, stop: int, total: int) -> int:
    """Bytes of the file for the rows `start` to `stop`; those of all add up to its size."""
    return file.size * stop // total - file.size * start // total if total else 0


def parquet_columns(source: SourceConfig, file: SourceFile) -> list[str]:
    """The columns that are read of a Parquet file; `DataError` if one is missing."""
    with open_parquet(file) as opened:
        return wanted_columns(source, opened.schema_arrow, str(file.path))


def parquet_blocks(
    source: SourceConfig, file: SourceFile, columns: Sequence[str], _: int | None
) -> Iterator[Block]:
    """Row groups, several small ones together; a very large one is read and cut here."""
    with open_parquet(file) as opened:
        groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
        sizes = [_size_of(group, columns) for group in groups]
        share = partial(_share, file, total=opened.metadata.num_rows)
        done = 0
        for together in _gathered(sizes):
            rows = sum(groups[i].num_rows for i in together)
            if sizes[together[0]] <= LARGEST_GROUP:
                yield ParquetBlock(
                    source=source,
                    name=str(file.path),
                    first=done + 1,
                    size=share(done, done + rows),
                    rows=rows,
                    file=file,
                    groups=together,
                )
                done += rows
                continue
            step = max(1, rows * TABLE_BYTES // sizes[together[0]])
            for batch in opened.iter_batches(
                step, row_groups=together, columns=columns, use_threads=False
            ):
                size = share(done, done + len(batch))
                yield _table_block(source, str(file.path), done + 1, size, batch)
                done += len(batch)


def _size_of(group: Any, columns: Sequence[str]) -> int:
    """Uncompressed bytes of the columns of a row group."""
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.split(".")[0] in columns
    )


def _gathered(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Neighbours that together have at most TABLE_BYTES, or one that has more."""
    together: list[int] = []
    size = 0
    for index, each in enumerate(sizes):
        if together and size + each > TABLE_BYTES:
            yield tuple(together)
            together, size = [], 0
        together.append(index)
        size += each
    if together:
        yield tuple(together)


def _table_block(
    source: SourceConfig, name: str, first: int, size: int, table: pa.Table | pa.RecordBatch
) -> TableBlock:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write(table)
    data = sink.getvalue().to_pybytes()
    return TableBlock(source=source, name=name, first=first, size=size, rows=len(table), data=data)


def arrow_blocks(
    source: SourceConfig, file: SourceFile, name: str, *, first: int = 1
) -> list[Block]:
    """Record batches, several small ones together; of a large one some rows at a time."""
    rows, sizes = [], []
    with open_arrow(file, source, name) as batches:
        for batch in batches:
            rows.append(len(batch))
            sizes.append(batch.nbytes)
    pieces = []
    for batches_ in _gathered(sizes):
        count = sum(rows[batch] for batch in batches_)
        size = sum(sizes[batch] for batch in batches_)
        step = max(1, count * TABLE_BYTES // max(size, TABLE_BYTES))
        pieces += [(batches_[0], i, min(step, count - i)) for i in range(0, count, step)]
    blocks: list[Block] = []
    done, total = 0, sum(rows)
    for batch, skip, count in pieces:
        block = ArrowBlock(
            source=source,
            name=name,
            first=first + done,
            size=_share(file, done, done + count, total),
            rows=count,
            file=file,
            batch=batch,
            skip=skip,
        )
        blocks.append(block)
        done += count
    return blocks


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
            source=source,
            name=str(path),
            first=start + 1,
            size=size * min(start + step, total) // total - size * start // total,
            rows=min(step, total - start),
            files=tuple(files),
            mask=mask,
        )
        for start in range(0, total, step)
    ]


def dataset_blocks(source: SourceConfig, dataset: Any, _: int | None) -> Iterator[Block]:
    """Blocks of a dataset that is no file, or whose rows are chosen from one."""
    total, size = len(dataset), dataset.data.nbytes
    step = max(1, total * TABLE_BYTES // max(size, TABLE_BYTES))
    for start in range(0, total, step):
        stop = min(start + step, total)
        share = size * stop // total - size * start // total
        name = f"{source.path}[{source.split}]"
        yield _table_block(source, name, start + 1, share, dataset[start:stop])
