"""Every n-th block of a run's sources, encoded and kept in a folder, until all n are merged.

Encoded -> shard folder                    on n machines
n shard folders -> Encoded, in order       on one, which writes what it would have written alone

SPLIT.blocks.jsonl says what each block holds; its examples lie end to end in one raw file for each
column. Nothing is decided in a shard that depends on the rows of another.
"""

import dataclasses
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count as numbers
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data import manifest as manifests
from mcore_sft.data import table_blocks, text_blocks
from mcore_sft.data.contamination import Finding
from mcore_sft.data.encode import Drops, Encoded, Sample
from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import Examples

FORMAT = 5

_COLUMNS: dict[str, tuple[type[np.generic], int]] = {
    "tokens": (np.int32, 1),
    "lengths": (np.int32, 1),
    "spans": (np.int32, 2),
    "span_counts": (np.int32, 1),
    "rows": (np.int64, 1),
    "numbers": (np.int64, 1),
    "hashes": (np.uint64, 2),
    "read_hashes": (np.uint64, 2),
    "problems": (np.uint64, 1),
    "systems": (np.uint64, 1),
}
_OF_EXAMPLES = ("tokens", "lengths", "spans", "span_counts", "rows")
_OF_BLOCK = ("source", "name", "rows", "size", "gigatoken", "kind", "system_texts")


def shard_folder(folder: Path, index: int, count: int) -> Path:
    """Where shard `index` of `count` lies: beside the dataset's own folder."""
    return folder.parent / f"{folder.name}.shard-{index}-of-{count}"


class ShardWriter:
    """Writes the blocks of one split into a shard's folder."""

    def __init__(self, folder: Path, split: str) -> None:
        self._files = ExitStack()
        self._columns = {
            name: self._files.enter_context((folder / f"{split}.{name}").open("wb"))
            for name in _COLUMNS
        }
        blocks = (folder / f"{split}.blocks.jsonl").open("w", encoding="utf-8")
        self._blocks = self._files.enter_context(blocks)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, encoded: Encoded) -> None:
        """Append one block."""
        counts = {}
        for name, (dtype, _) in _COLUMNS.items():
            of = encoded.examples if name in _OF_EXAMPLES else encoded
            array: npt.NDArray[Any] = getattr(of, name)
            self._columns[name].write(array.astype(dtype, copy=False).tobytes())
            counts[name] = len(array)
        told = {name: getattr(encoded, name) for name in _OF_BLOCK}
        drops = dataclasses.asdict(encoded.drops)
        findings = [dataclasses.asdict(finding) for finding in encoded.findings]
        line = json.dumps({**told, "drops": drops, "findings": findings, "counts": counts})
        self._blocks.write(line + "\n")


def finish_shard(
    folder: Path, *, index: int, count: int, inputs: Mapping[str, Any], gigatoken: bool
) -> None:
    """Write the manifest of a shard whose files are complete."""
    described = {
        "format": FORMAT,
        "shard": index,
        "shards": count,
        "cut": _cut(),
        "inputs": inputs,
        "gigatoken": gigatoken,
        "files": manifests.describe_files(folder.iterdir()),
    }
    manifests.write(folder, described)


def read_shard(folder: Path, *, index: int, count: int) -> dict[str, Any]:
    """The manifest of a complete shard, its files checked; `DataError` if it is not."""
    again = f"run preprocess with --shard {index}/{count} again"
    try:
        described = json.loads((folder / manifests.NAME).read_text(encoding="utf-8"))
        digest = described.pop("digest")
        known = described["format"] == FORMAT and digest == manifests.digest_of(described)
        files = described["files"]
        whole = known and {"inputs", "gigatoken", "shard", "shards", "cut"} <= described.keys()
    except FileNotFoundError:
        raise DataError(f"{folder}: shard {index} of {count} is not there; {again}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / manifests.NAME}: broken ({error}); {again}") from None
    if not whole:
        raise DataError(f"{folder / manifests.NAME}: not a shard of this version; {again}")
    found = (described["shard"], described["shards"])
    if found != (index, count) or described["cut"] != _cut():
        raise DataError(
            f"{folder}: holds shard {found[0]} of {found[1]}, cut into blocks of "
            f"{described['cut']} bytes; expected shard {index} of {count} and {_cut()}; move it "
            f"back, or {again} with --overwrite"
        )
    manifests.check_files(folder, files, verify=True)
    return dict(described)


def merged(folders: Sequence[Path], split: str) -> Generator[Encoded, None, None]:
    """The blocks of all shards in the order of the sources: block b is in shard b % n.

    `DataError` if some shard has blocks left when the one that should hold the next has none.
    """
    readers = [_read(folder, split) for folder in folders]
    for number in numbers():
        block = next(readers[number % len(readers)], None)
        if block is None:
            break
        yield block
    for folder, reader in zip(folders, readers, strict=True):
        if next(reader, None) is not None:
            raise DataError(
                f"{folder}: more blocks of {split} than {folders[number % len(folders)]} has "
                "before them; the shards do not belong together: make them all again"
            )


def _cut() -> list[int]:
    """What decides where blocks begin: shards of other sizes do not fit together."""
    return [text_blocks.BLOCK_BYTES, table_blocks.TABLE_BYTES]


def _read(folder: Path, split: str) -> Iterator[Encoded]:
    columns = {name: _column(folder / f"{split}.{name}", *_COLUMNS[name]) for name in _COLUMNS}
    at = dict.fromkeys(_COLUMNS, 0)
    with (folder / f"{split}.blocks.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            told = json.loads(line)
            arrays = {}
            for name, count in told["counts"].items():
                arrays[name] = columns[name][at[name] : at[name] + count]
                at[name] += count
            yield _encoded(told, arrays)


def _encoded(told: dict[str, Any], arrays: dict[str, Any]) -> Encoded:
    samples = {
        reason: [Sample(**sample) for sample in some]
        for reason, some in told["drops"]["samples"].items()
    }
    block: dict[str, Any] = {name: told[name] for name in _OF_BLOCK}
    return Encoded(
        examples=Examples(**{name: arrays.pop(name) for name in _OF_EXAMPLES}),
        findings=[Finding(**finding) for finding in told["findings"]],
        drops=Drops(counts=told["drops"]["counts"], samples=samples),
        **block,
        **arrays,
    )


def _column(file: Path, dtype: type[np.generic], dimensions: int) -> npt.NDArray[Any]:
    if file.stat().st_size == 0:  # what is empty cannot be mapped
        array: npt.NDArray[Any] = np.zeros(0, dtype)
    else:
        array = np.memmap(file, dtype, mode="r")
    return array.reshape(-1, 2) if dimensions == 2 else array
