"""Sources in, blocks of rows out: what `path` names is found, read once for checksums, and cut.

    SourceConfig -> survey -> Survey.blocks -> (worker processes) -> Block.read

Where the blocks begin and end depends on the source alone.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from mcore_sft.config import SourceConfig
from mcore_sft.data.arrow_values import json_values
from mcore_sft.data.blocks import Block, Part
from mcore_sft.data.columns import wanted_columns
from mcore_sft.data.errors import DataError
from mcore_sft.data.find_files import FORMS, find_files
from mcore_sft.data.foreign import is_bridge
from mcore_sft.data.known_columns import PAIRS, Columns, configured, recognise, require_known
from mcore_sft.data.open_table import open_table
from mcore_sft.data.source_file import SourceFile
from mcore_sft.data.table_blocks import dataset_blocks, table_blocks, token_blocks
from mcore_sft.data.text_blocks import COMPRESSED, first_row, survey_lines, text_blocks

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


def survey(
    source: SourceConfig,
    *,
    root: Path,
    alone: bool = False,
    advance: Callable[[int], None] = _nothing,
) -> Survey:
    """Look at a source: read each file once, counting its bytes on `advance`.

    `alone`: of its rows, only problems are read.
    """
    return _survey(source, root, alone, advance)


def peek(source: SourceConfig, *, root: Path) -> Survey:
    """A source without its checksums, for a look at the first blocks: no other is read."""
    return _survey(source, root, alone=False, advance=None)


def _survey(
    source: SourceConfig, root: Path, alone: bool, advance: Callable[[int], None] | None
) -> Survey:
    paths = _paths(source, root)
    if not paths:
        return _survey_dataset(source, root, alone)
    files: list[dict[str, str]] = []
    parts, size = [], 0
    columns = configured(source, alone=alone)
    for path in paths:
        opened = _parts_of(source, path, root)
        with _readable(path):
            columns = columns or _recognised(source, opened[0], alone)
            part = _part(source, columns, opened, root)
            if advance is not None:
                checksums, part = _read_once(columns, opened, part, advance)
                names = (file.path.name for file in opened)
                files += [{"name": n, "sha256": c} for n, c in zip(names, checksums, strict=True)]
        parts.append(part)
        size += sum(file.size for file in opened)
    using, told = _using(source, columns, alone)
    description = {"path": source.path, "files": files, **told}
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


def source_size(source: SourceConfig, *, root: Path) -> int:
    """Bytes that `survey` reads."""
    files = find_files(source.path, root=root)
    return sum(each.size for file in files for each in _parts_of(source, file, root))


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


def _read_once(
    columns: Columns | None,
    files: Sequence[SourceFile],
    part: Part,
    advance: Callable[[int], None],
) -> tuple[list[str], Part]:
    """Checksums of `files`, which are read together, and how to cut them now that they are read."""
    if files[0].kind not in _LINES:
        return [_checksum(each, advance) for each in files], part
    checksum, part = survey_lines(columns or Columns(), files[0], advance)
    return [checksum], part


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
