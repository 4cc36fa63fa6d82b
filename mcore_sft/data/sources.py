"""Sources in, blocks of rows out: what `path` names is found, read once for checksums, and cut.

    SourceConfig -> survey -> Survey.blocks -> (worker processes) -> Block.read

Where the blocks begin and end depends on the source alone.
"""

import bz2
import codecs
import glob
import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import xxhash

from mcore_sft.config import SourceConfig
from mcore_sft.data.blocks import (
    ArrowBlock,
    Block,
    LineBlock,
    ParquetBlock,
    SourceFile,
    TableBlock,
    TextBlock,
    TokenBlock,
    ValueBlock,
    open_arrow,
    open_parquet,
)
from mcore_sft.data.columns import MAX_ROW_BYTES, wanted_columns
from mcore_sft.data.errors import DataError
from mcore_sft.data.foreign import count_megatron
from mcore_sft.data.json_array import JsonArray
from mcore_sft.data.rows import Pairs

BLOCK_BYTES = 8 << 20
"""Text of one block; at most MAX_ROW_BYTES, as a line may be longer than a block."""

TABLE_BYTES = 16 << 20
"""Columns of one block of a table, uncompressed."""

LARGEST_GROUP = 64 << 20
"""A row group of Parquet that is larger is cut while it is read, as each reader starts afresh."""

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".idx", ".bin")

Part = Callable[[int | None], Iterator[Block]]
"""The blocks of one file, of which so many rows are wanted; where that is not None, or the file is
no plain text, each block says how many rows it has."""


def _nothing(_: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a source holds.

    description: JSON for a manifest, with a checksum of each file; size: bytes of the source, more
    than those of the blocks together where `limit` ends them before.
    """

    source: SourceConfig
    description: dict[str, Any]
    size: int
    parts: Sequence[Part]

    def blocks(self) -> Iterator[Block]:
        """The rows in order, cut to `source.limit`."""
        left = self.source.limit
        for part in self.parts:
            for block in part(left):
                if left is not None:
                    assert block.rows is not None
                    block = replace(block, rows=min(block.rows, left))
                    left -= block.rows or 0
                yield block
                if left == 0:
                    return


def survey(
    source: SourceConfig, *, root: Path, advance: Callable[[int], None] = _nothing
) -> Survey:
    """Look at a source: read each file once, counting its bytes on `advance`."""
    paths = source_files(source, root=root)
    if not paths:
        return _survey_dataset(source)
    described, parts, size = [], [], 0
    for path in paths:
        try:
            opened = [SourceFile.of(each) for each in _parts_of(source, path, root)]
            checksums, part = _survey_file(source, opened, root, advance)
        except OSError as error:
            raise DataError(
                f"{error.filename or path}: cannot be read ({error.strerror})"
            ) from None
        names = (file.path.name for file in opened)
        described += [{"name": n, "sha256": c} for n, c in zip(names, checksums, strict=True)]
        parts.append(part)
        size += sum(file.size for file in opened)
    description = {"path": source.path, "files": described}
    return Survey(source=source, description=description, size=size, parts=parts)


def read_problems(source: SourceConfig, *, root: Path) -> Iterator[str]:
    """The problems of a source, whose rows need no solution; `DataError` names a bad row."""
    alone = {"solution": source.problem, "messages": None, "tools": None}
    for block in survey(source.model_copy(update=alone), root=root).blocks():
        rows = block.read(skip_bad=False)
        if not isinstance(rows, Pairs):
            raise DataError(f"{block.name}: it holds tokens, expected the texts of problems")
        yield from rows.problems.to_pylist()


def source_size(source: SourceConfig, *, root: Path) -> int:
    """Bytes that `survey` reads."""
    files = source_files(source, root=root)
    return sum(each.stat().st_size for file in files for each in _parts_of(source, file, root))


def source_files(source: SourceConfig, *, root: Path) -> list[Path]:
    """Files of a source, in order of name; none if it is the name of a Hugging Face dataset."""
    path = root / source.path
    if path.is_file():
        return [path]
    if path.is_dir():
        raise DataError(
            f"source {source.path!r}: {path} is a folder; name its files, such as "
            f"{source.path.rstrip('/')}/*.jsonl"
        )
    absolute = Path(source.path).is_absolute()
    pattern = source.path if absolute else os.path.join(glob.escape(str(root)), source.path)
    found = sorted(
        Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()
    )
    if not found and _looks_like_files(source.path):
        raise DataError(
            f"source {source.path!r}: no such file under {root.resolve()}; "
            "mend data.root or the source's path"
        )
    return found


def _looks_like_files(path: str) -> bool:
    """Whether `path` cannot be the name of a dataset, which is `owner/name` or `name`."""
    endings = (*_ENDINGS, *_COMPRESSED)
    return path.endswith(endings) or path.startswith(("/", ".")) or bool(set(path) & set("*?["))


def _parts_of(source: SourceConfig, path: Path, root: Path) -> list[Path]:
    """The file and all that it is read with."""
    if path.suffix != ".idx":
        return [path]
    together = [path, path.with_suffix(".bin")]
    if source.mask not in (None, "all"):
        mask = root / str(source.mask)
        together += [mask, mask.with_suffix(".bin")]
    return together


def _survey_file(
    source: SourceConfig, files: Sequence[SourceFile], root: Path, advance: Callable[[int], None]
) -> tuple[list[str], Part]:
    """Checksums of `files`, which are read together, and how to cut them into blocks."""
    file, kind = files[0], files[0].path.suffix
    if kind == ".bin":
        raise DataError(f"{file.path}: tokens are read by their index; give the .idx beside it")
    if kind in (".json", *_COMPRESSED):
        part: Part = partial(_text_blocks, source, file)
    elif kind == ".parquet":
        part = partial(_parquet_blocks, source, file, _parquet_columns(source, file))
    elif kind in (".arrow", ".feather"):
        part = _whole(_arrow_blocks(source, file, str(file.path)))
    elif kind == ".idx":
        part = _whole(_token_blocks(source, files, root))
    else:
        checksum, part = _survey_lines(source, file, advance)
        return [checksum], part
    return [_checksum(each, advance) for each in files], part


def _whole(blocks: Sequence[Block]) -> Part:
    return lambda _: iter(blocks)


def _checksum(file: SourceFile, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with file.path.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


# --- text ---


def _survey_lines(
    source: SourceConfig, file: SourceFile, advance: Callable[[int], None]
) -> tuple[str, Part]:
    """Checksum of a file of lines, and where its blocks lie."""
    digest = hashlib.sha256()
    blocks: list[Block] = []
    start, line = 0, 1
    with file.path.open("rb") as opened:

        def read(size: int) -> bytes:
            piece = opened.read(size)
            digest.update(piece)
            advance(len(piece))
            return piece

        for size, data in _whole_lines(read):
            block = LineBlock(
                source=source,
                name=str(file.path),
                first=line,
                size=size,
                file=file,
                start=start,
                digest=xxhash.xxh3_64_intdigest(data),
            )
            blocks.append(block)
            start += size
            line += _count_lines(data)

    def part(most: int | None) -> Iterator[Block]:
        return iter(blocks) if most is None else _text_blocks(source, file, most)

    return digest.hexdigest(), part


def _whole_lines(read: Callable[[int], bytes]) -> Iterator[tuple[int, bytes]]:
    """Bytes of some whole lines, and these; of a line far too long, which is alone, a beginning."""
    size, open_line = 0, b""
    while piece := read(BLOCK_BYTES):
        while end := (piece.rfind if size < BLOCK_BYTES else piece.find)(b"\n") + 1:
            yield size + end, open_line + memoryview(piece)[:end]
            size, open_line, piece = 0, b"", piece[end:]
        size += len(piece)
        open_line = (open_line + piece)[: 2 * MAX_ROW_BYTES]
    if size:
        yield size, open_line


def _count_lines(data: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n")))


def _text_blocks(source: SourceConfig, file: SourceFile, most: int | None) -> Iterator[Block]:
    """Blocks of lines, or of a JSON array, that are read from the beginning on."""
    file.require_unchanged()
    with _opened(file) as (stream, position):
        name = file.path.name.removesuffix(file.path.suffix)
        is_json = file.path.suffix == ".json" or name.endswith(".json")
        begin = stream.read(BLOCK_BYTES) if is_json else b""
        if begin.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            blocks = _value_blocks(source, file, _after(begin, stream))
        else:
            blocks = _line_blocks(source, file, _after(begin, stream), most)
        done = 0
        for block in blocks:
            at = position()
            yield replace(block, size=at - done)
            done = at
    file.require_unchanged()


def _after(begin: bytes, stream: IO[bytes]) -> Callable[[int], bytes]:
    """What reads `begin` first, and then the stream."""
    waiting = [begin] if begin else []
    return lambda size: waiting.pop() if waiting else stream.read(size)


def _line_blocks(
    source: SourceConfig, file: SourceFile, read: Callable[[int], bytes], most: int | None
) -> Iterator[Block]:
    line, left = 1, most
    for _, data in _whole_lines(read):
        rows = None
        lines = _count_lines(data)
        if left is not None:
            data, rows = _first_rows(data, left)
            left -= rows
        yield TextBlock(
            source=source, name=str(file.path), first=line, size=0, rows=rows, data=data
        )
        line += lines


def _first_rows(data: bytes, most: int) -> tuple[bytes, int]:
    """The lines up to the row that is number `most`, and how many rows they are."""
    rows, end = 0, 0
    for line in data.split(b"\n"):
        if rows == most:
            break
        end += len(line) + 1
        rows += bool(line.strip())
    return data[:end], rows


def _value_blocks(
    source: SourceConfig, file: SourceFile, read: Callable[[int], bytes]
) -> Iterator[Block]:
    first, values, characters = 1, [], 0
    for value, length in JsonArray(lambda: read(BLOCK_BYTES), str(file.path)):
        values.append(value)
        characters += length
        if characters >= BLOCK_BYTES:
            yield _value_block(source, file, first, values)
            first, values, characters = first + len(values), [], 0
    if values:
        yield _value_block(source, file, first, values)


def _value_block(
    source: SourceConfig, file: SourceFile, first: int, values: Sequence[Any]
) -> ValueBlock:
    return ValueBlock(
        source=source,
        name=str(file.path),
        first=first,
        size=0,
        rows=len(values),
        values=tuple(values),
    )


@contextmanager
def _opened(file: SourceFile) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The decompressed bytes of a file, and how many of its own have been read."""
    openers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": lambda raw: pa.input_stream(raw, compression="zstd"),
    }
    open_stream = openers.get(file.path.suffix, nullcontext)
    try:
        with file.path.open("rb") as raw, open_stream(raw) as stream:
            yield stream, lambda: file.size if raw.closed else raw.tell()
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        file.require_unchanged()
        raise DataError(
            f"{file.path}: cannot be read ({str(error) or type(error).__name__}); it is damaged or "
            "cut short: write it again"
        ) from None


# --- tables and tokens ---


def _share(file: SourceFile, start: int, stop: int, total: int) -> int:
    """Bytes of the file for the rows `start` to `stop`; those of all add up to its size."""
    return file.size * stop // total - file.size * start // total if total else 0


def _parquet_columns(source: SourceConfig, file: SourceFile) -> list[str]:
    with open_parquet(file) as opened:
        return wanted_columns(source, opened.schema_arrow, str(file.path))


def _parquet_blocks(
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


def _arrow_blocks(
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


def _token_blocks(source: SourceConfig, files: Sequence[SourceFile], root: Path) -> list[Block]:
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
    step = max(1, total * BLOCK_BYTES // max(size, 1))
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


# --- datasets of Hugging Face ---


def _survey_dataset(source: SourceConfig) -> Survey:
    """A dataset of Hugging Face, from the files that it is kept in once it is downloaded."""
    dataset = _load_dataset(source)
    name = f"{source.path}[{source.split}]"
    blocks: list[Block] = []
    files = [Path(each["filename"]) for each in dataset.cache_files]
    if dataset._indices is None:  # otherwise its rows are chosen from those of the files
        for file in map(SourceFile.of, files):
            first = 1 + sum(block.rows or 0 for block in blocks)
            blocks += _arrow_blocks(source, file, name, first=first)
    part, size = _whole(blocks), sum(block.size for block in blocks)
    if sum(block.rows or 0 for block in blocks) != len(dataset):
        columns = wanted_columns(source, dataset.data.schema, name)
        table = dataset.select_columns(columns).with_format("arrow")
        part, size = partial(_dataset_blocks, source, table), table.data.nbytes
    description = {
        "path": source.path,
        "name": source.name,
        "split": source.split,
        "rows": len(dataset),
        "revision": _revision(files),
    }
    return Survey(source=source, description=description, size=size, parts=[part])


def _load_dataset(source: SourceConfig) -> Any:
    import datasets

    if not re.fullmatch(r"\w+(\.\w+)*", source.split):
        raise DataError(
            f"source {source.path!r}: split {source.split!r} is not the name of one split; take a "
            "part of it with limit, or for validation with data.holdout"
        )
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"source {source.path!r}: neither a file nor a Hugging Face dataset that can be read "
            f"(split {source.split}): {first}"
        ) from None


def _dataset_blocks(source: SourceConfig, dataset: Any, _: int | None) -> Iterator[Block]:
    """Blocks of a dataset that is no file, or whose rows are chosen from one."""
    total, size = len(dataset), dataset.data.nbytes
    step = max(1, total * TABLE_BYTES // max(size, TABLE_BYTES))
    for start in range(0, total, step):
        stop = min(start + step, total)
        share = size * stop // total - size * start // total
        name = f"{source.path}[{source.split}]"
        yield _table_block(source, name, start + 1, share, dataset[start:stop])


def _revision(files: Sequence[Path]) -> str | None:
    """The commit that a dataset was downloaded at, which the folder of its files is named by."""
    folders = {file.parent.name for file in files}
    return next((name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)), None)
