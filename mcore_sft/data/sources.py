"""Sources in, blocks of rows out: what `path` names is found, read once for checksums, and cut.

    SourceConfig -> survey -> Survey.blocks -> (worker processes) -> Block.read

Where the blocks begin and end depends on the source alone.
"""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mcore_sft.config import SourceConfig
from mcore_sft.data.blocks import Block, Part, SourceFile
from mcore_sft.data.columns import wanted_columns
from mcore_sft.data.errors import DataError
from mcore_sft.data.table_blocks import (
    arrow_blocks,
    dataset_blocks,
    parquet_blocks,
    parquet_columns,
    token_blocks,
)
from mcore_sft.data.text_blocks import COMPRESSED, survey_lines, text_blocks

_LINES = ("", ".jsonl", ".ndjson")
_ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".idx", ".bin")


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
    _require_use_of_mask(source, paths)
    if not paths:
        return _survey_dataset(source)
    described, parts, size = [], [], 0
    for path in paths:
        opened = _parts_of(source, path, root)
        try:
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


def peek(source: SourceConfig, *, root: Path) -> Iterator[Block]:
    """The blocks of a source, for a look at the first: no more is read than is asked for."""
    paths = source_files(source, root=root)
    _require_use_of_mask(source, paths)
    if not paths:
        return _survey_dataset(source).blocks()
    parts = [_part(source, _parts_of(source, path, root), root) for path in paths]
    return Survey(source=source, description={}, size=0, parts=parts).blocks()


def _require_use_of_mask(source: SourceConfig, paths: Sequence[Path]) -> None:
    if source.mask is not None and {path.suffix.lower() for path in paths} != {".idx"}:
        raise DataError(
            f"source {source.path!r}: mask: {source.mask} says what is trained of Megatron's "
            "tokens, named by their .idx, and of nothing else; take it away, or name the .idx"
        )


def problems_alone(source: SourceConfig) -> SourceConfig:
    """The same source where nothing but problems is read: its rows need no solution."""
    alone = {"solution": source.problem, "messages": None, "tools": None}
    return source.model_copy(update=alone)


def source_size(source: SourceConfig, *, root: Path) -> int:
    """Bytes that `survey` reads."""
    files = source_files(source, root=root)
    return sum(each.size for file in files for each in _parts_of(source, file, root))


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
    endings = (*_ENDINGS, *COMPRESSED)
    return (
        path.lower().endswith(endings)
        or path.startswith(("/", "."))
        or bool(set(path) & set("*?["))
    )


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


def _survey_file(
    source: SourceConfig, files: Sequence[SourceFile], root: Path, advance: Callable[[int], None]
) -> tuple[list[str], Part]:
    """Checksums of `files`, which are read together, and how to cut them into blocks."""
    part = _part(source, files, root)
    if files[0].kind in _LINES:
        checksum, part = survey_lines(source, files[0], advance)
        return [checksum], part
    return [_checksum(each, advance) for each in files], part


def _part(source: SourceConfig, files: Sequence[SourceFile], root: Path) -> Part:
    """How to cut `files`, which are read together, into blocks."""
    file, kind = files[0], files[0].kind
    inner = Path(file.path.stem).suffix.lower()
    if kind in COMPRESSED and inner in (".parquet", ".arrow", ".feather", ".idx"):
        raise DataError(f"{file.path}: {inner} is not read compressed once more; unpack it")
    if kind and kind not in (*_ENDINGS, *COMPRESSED):
        raise DataError(f"{file.path}: {kind} is not read; expected {', '.join(_ENDINGS[:-1])}")
    if kind == ".bin":
        raise DataError(f"{file.path}: tokens are read by their index; give the .idx beside it")
    if kind == ".parquet":
        return partial(parquet_blocks, source, file, parquet_columns(source, file))
    if kind in (".arrow", ".feather"):
        return _whole(arrow_blocks(source, file, str(file.path)))
    if kind == ".idx":
        return _whole(token_blocks(source, files, root))
    return partial(text_blocks, source, file)


def _whole(blocks: Sequence[Block]) -> Part:
    return lambda _: iter(blocks)


def _checksum(file: SourceFile, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with file.path.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def _survey_dataset(source: SourceConfig) -> Survey:
    """A dataset of Hugging Face, from the files that it is kept in once it is downloaded."""
    dataset = _load_dataset(source)
    name = f"{source.path}[{source.split}]"
    blocks: list[Block] = []
    files = [Path(each["filename"]) for each in dataset.cache_files]
    if dataset._indices is None:  # otherwise its rows are chosen from those of the files
        for file in map(SourceFile.of, files):
            first = 1 + sum(block.rows or 0 for block in blocks)
            blocks += arrow_blocks(source, file, name, first=first)
    part, size = _whole(blocks), sum(block.size for block in blocks)
    if sum(block.rows or 0 for block in blocks) != len(dataset):
        columns = wanted_columns(source, dataset.data.schema, name)
        table = dataset.select_columns(columns).with_format("arrow")
        part, size = partial(dataset_blocks, source, table), table.data.nbytes
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


def _revision(files: Sequence[Path]) -> str | None:
    """The commit that a dataset was downloaded at, which the folder of its files is named by."""
    folders = {file.parent.name for file in files}
    return next((name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)), None)
