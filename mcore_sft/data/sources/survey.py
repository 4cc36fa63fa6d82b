"""Sources in, blocks of rows out: what `path` names is found, read once for checksums, and cut.

    SourceConfig -> survey -> Survey.blocks -> (worker processes) -> Block.read

Where the blocks begin and end depends on the source alone.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from mcore_sft.config import SourceConfig
from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.arrow_values import json_values
from mcore_sft.data.sources.blocks import Block, Part
from mcore_sft.data.sources.columns import wanted_columns
from mcore_sft.data.sources.find_files import FORMS, find_files
from mcore_sft.data.sources.foreign import is_bridge
from mcore_sft.data.sources.known_columns import (
    PAIRS,
    Columns,
    configured,
    recognise,
    require_known,
)
from mcore_sft.data.sources.open_table import open_table
from mcore_sft.data.sources.source_file import SourceFile
from mcore_sft.data.sources.table_blocks import dataset_blocks, table_blocks, token_blocks
from mcore_sft.data.sources.text_blocks import COMPRESSED, first_row, survey_lines, text_blocks

_LINES = ("", ".jsonl", ".ndjson")
_TABLES = (".parquet", ".arrow", ".feather")


def _nothing(_: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a source holds.

    description: JSON for a manifest, with a checksum of each file; size: bytes of the source, more
    than those of the blocks together where `limit` ends them before; using: the columns that were
    recognised, in words, or "" where the configuration names them.
    """

    source: SourceConfig
    description: dict[str, Any]
    size: int
    parts: Sequence[Part]
    using: str = ""

    def blocks(self) -> Iterator[Block]:
        """The rows in order, cut to `source.limit`; `DataError` if there is none."""
        left, some = self.source.limit, False
        for part in self.parts:
            for block in part(left):
                if left is not None:
                    assert block.rows is not None
                    block = replace(block, rows=min(block.rows, left))
                    left -= block.rows or 0
                some = True
                yield block
                if left == 0:
                    return
        if not some:
            raise DataError(
                f"source {self.source.path!r}: it holds no row. Fix: its path, or take it out"
            )


class Looks:
    """Files that were read for their checksums, each once, whatever sources name it."""

    def __init__(self, advance: Callable[[int], None] = _nothing) -> None:
        """`advance` counts the bytes that are read."""
        self.advance = advance
        self._known: dict[SourceFile, tuple[str, Sequence[Block] | None]] = {}

    def at(self, files: Sequence[SourceFile]) -> list[tuple[str, Sequence[Block] | None]]:
        """The checksum of each file, and its blocks where they are found on the way."""
        new = [file for file in files if file not in self._known]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            self._known |= zip(new, threads.map(self._look, new), strict=True)
        return [self._known[file] for file in files]

    def _look(self, file: SourceFile) -> tuple[str, Sequence[Block] | None]:
        with _readable(file.path):
            if file.kind in _LINES:
                return survey_lines(Columns(), file, self.advance)
            return _checksum(file, self.advance), None


def survey(
    source: SourceConfig,
    *,
    root: Path,
    alone: bool = False,
    advance: Callable[[int], None] = _nothing,
    looks: Looks | None = None,
) -> Survey:
    """Look at a source: read each file, unless `looks` has, counting its bytes on `advance`.

    `alone`: of its rows, only problems are read.
    """
    return _survey(source, root, alone, looks or Looks(advance))


def peek(source: SourceConfig, *, root: Path) -> Survey:
    """A source without its checksums, for a look at the first blocks: no other is read."""
    return _survey(source, root, alone=False, looks=None)


def _survey(source: SourceConfig, root: Path, alone: bool, looks: Looks | None) -> Survey:
    paths = _paths(source, root)
    if not paths:
        return _survey_dataset(source, root, alone)
    columns, parts = configured(source, alone=alone), []
    together = [_parts_of(source, path, root) for path in paths]
    for files in together:
        with _readable(files[0].path):
            columns = columns or _recognised(source, files[0], alone)
            parts.append(_part(source, columns, files, root))
    every = [file for files in together for file in files]
    seen = {} if looks is None else dict(zip(every, looks.at(every), strict=True))
    for index, files in enumerate(together):
        if files[0] in seen and (blocks := seen[files[0]][1]) is not None:
            parts[index] = _lines(columns or Columns(), blocks, parts[index])
    using, told = _using(source, columns, alone)
    described = [
        {"name": file.path.name, "sha256": seen[file][0]} for file in every if file in seen
    ]
    description = {"path": source.path, "files": described, **told}
    size = sum(file.size for file in every)
    return Survey(source=source, description=description, size=size, parts=parts, using=using)


def _paths(source: SourceConfig, root: Path) -> list[Path]:
    """The files of a source; none if it is a dataset."""
    paths = find_files(source.path, root=root)
    if source.mask is not None and {path.suffix.lower() for path in paths} != {".idx"}:
        raise DataError(
            f"source {source.path!r}: mask: {source.mask} says what is trained of Megatron's "
            "tokens, named by their .idx, and of nothing else; take it away, or name the .idx"
        )
    for path in paths:
        _require_form(path)
    return paths


def _require_form(path: Path) -> None:
    """`DataError` for a file of a form that is not read."""
    kind, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    if kind in COMPRESSED and inner in (*_TABLES, ".idx"):
        raise DataError(f"{path}: {inner} is not read compressed once more; unpack it")
    if kind and kind not in (*FORMS, *COMPRESSED):
        raise DataError(f"{path}: {kind} is not read; expected {', '.join(FORMS[:-1])}")
    if kind == ".bin":
        raise DataError(f"{path}: tokens are read by their index; give the .idx beside it")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def _using(
    source: SourceConfig, columns: Columns | None, alone: bool
) -> tuple[str, dict[str, Any]]:
    """What is said and written of columns that the configuration does not name."""
    if columns is None or not columns.roles or configured(source, alone=alone) is not None:
        return "", {}
    return f"using {columns}", {"columns": columns.roles}


def _recognised(source: SourceConfig, file: SourceFile, alone: bool) -> Columns | None:
    """The columns to read, by the first row of a file; None if it has no row."""
    if file.kind == ".idx":
        return None
    if file.kind in _TABLES:
        with open_table(file) as table:
            return _recognised_in_table(
                source,
                table.schema,
                lambda column: next(table.batches(0, [column])),
                name=str(file.path),
                alone=alone,
            )
    known = {name for pair in PAIRS for name in pair}
    row = first_row(file, known | {source.problem or "", source.solution or ""})
    where = f"{file.path}:1"
    return None if row is None else require_known(source, row, alone=alone, where=where)


def _recognised_in_table(
    source: SourceConfig,
    schema: pa.Schema,
    begin: Callable[[str], Any],
    *,
    name: str,
    alone: bool,
) -> Columns:
    """The columns to read of a table; `begin` gives the first rows of a column."""
    row, where = dict.fromkeys(schema.names), f"{name}:1"
    if found := recognise(source, row, alone=alone, where=where):
        return found
    if is_bridge(schema):
        return Columns()
    for column in row:  # what they hold tells which keys to propose
        with suppress(ValueError, KeyError, StopIteration, IndexError):
            first = pa.table(begin(column)).column(0)[:1].combine_chunks()
            row[column] = json_values(first, schema.field(column))[0]
    return require_known(source, row, alone=alone, where=where)


def source_size(*sources: SourceConfig, root: Path) -> int:
    """Bytes that `survey` reads of `sources`; of what several of them name, once."""
    named = ((source, file) for source in sources for file in find_files(source.path, root=root))
    files = {each for source, file in named for each in _parts_of(source, file, root)}
    return sum(file.size for file in files)


def _parts_of(source: SourceConfig, path: Path, root: Path) -> list[SourceFile]:
    """The file and all that it is read with, as they are now."""
    together = [path]
    if path.suffix.lower() == ".idx":
        together += [path.with_suffix(".bin")]
        if source.mask not in (None, "all"):
            mask = root / str(source.mask)
            together += [mask, mask.with_suffix(".bin")]
    try:
        return [SourceFile.of(each) for each in together]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _lines(columns: Columns, blocks: Sequence[Block], otherwise: Part) -> Part:
    """Blocks of lines that are known, unless so many rows alone are wanted."""

    def part(most: int | None) -> Iterator[Block]:
        if most is not None:
            return otherwise(most)
        return (replace(block, columns=columns) for block in blocks)

    return part


def _part(
    source: SourceConfig, columns: Columns | None, files: Sequence[SourceFile], root: Path
) -> Part:
    """How to cut `files`, which are read together, into blocks; without rows, there are no columns.

    `DataError` if a table lacks one of the columns.
    """
    file, kind = files[0], files[0].kind
    if kind == ".idx":
        return _whole(token_blocks(source, files, root))
    columns = columns or Columns()
    if kind not in _TABLES:
        return partial(text_blocks, columns, file)
    with open_table(file) as table:
        wanted_columns(columns, table.schema, str(file.path))
    blocks = partial(table_blocks, columns, file, str(file.path))
    return (lambda _: blocks()) if kind == ".parquet" else _whole(list(blocks()))


def _whole(blocks: Sequence[Block]) -> Part:
    return lambda _: iter(blocks)


def _checksum(file: SourceFile, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with file.path.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def _survey_dataset(source: SourceConfig, root: Path, alone: bool) -> Survey:
    """A dataset of Hugging Face, from the files that it is kept in once it is downloaded."""
    dataset = _load_dataset(source, root)
    name = f"{source.path}[{source.split}]"
    arrow = dataset.with_format("arrow")
    columns = configured(source, alone=alone) or _recognised_in_table(
        source,
        dataset.data.schema,
        lambda column: arrow.select_columns([column])[:1],
        name=name,
        alone=alone,
    )
    wanted = wanted_columns(columns, dataset.data.schema, name)
    blocks: list[Block] = []
    files = [Path(each["filename"]) for each in dataset.cache_files]
    if dataset._indices is None:  # otherwise its rows are chosen from those of the files
        for file in map(SourceFile.of, files):
            first = 1 + sum(block.rows or 0 for block in blocks)
            blocks += table_blocks(columns, file, name, first=first)
    part, size = _whole(blocks), sum(block.size for block in blocks)
    if sum(block.rows or 0 for block in blocks) != len(dataset):
        chosen = arrow.select_columns(wanted)
        part, size = (lambda _: dataset_blocks(columns, chosen, name)), chosen.data.nbytes
    using, told = _using(source, columns, alone)
    description = {
        "path": source.path,
        "name": source.name,
        "split": source.split,
        "rows": len(dataset),
        "revision": _revision(files),
        **told,
    }
    return Survey(source=source, description=description, size=size, parts=[part], using=using)


def _load_dataset(source: SourceConfig, root: Path) -> Any:
    import datasets

    if not re.fullmatch(r"\w+(\.\w+)*", source.split):
        raise DataError(
            f"source {source.path!r}: split {source.split!r} is not the name of one split; take a "
            "part of it with limit, or for validation with data.holdout"
        )
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = str(error).partition("Example of usage")[0]  # it names configurations, or splits
        raise DataError(
            f"source {source.path!r}: neither a file ({(root / source.path).absolute()}) nor a "
            f"Hugging Face dataset that can be read (split {source.split}): "
            f"{' '.join(said.split()) or type(error).__name__}"
        ) from None


def _revision(files: Sequence[Path]) -> str | None:
    """The commit that a dataset was downloaded at, which the folder of its files is named by."""
    folders = {file.parent.name for file in files}
    return next((name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)), None)
