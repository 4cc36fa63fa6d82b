"""Every n-th block of a run's sources, encoded and kept in a folder, until all n are merged.

files of blocks -> shard folder            on n machines
n shard folders -> BlockFile, in order     on one, which writes what it would have written alone

Nothing is decided in a shard that depends on the rows of another, or on how they are packed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count as numbers
from pathlib import Path
from typing import Any

from mcore_sft.data import manifest as manifests
from mcore_sft.data.encode.block_files import BlockFile
from mcore_sft.data.encode.store import block_name, cut
from mcore_sft.data.errors import DataError

FORMAT = 6

_TOLD = {"shard", "shards", "cut", "inputs", "gigatoken", "benchmark", "blocks"}


def shard_folder(folder: Path, index: int, count: int) -> Path:
    """Where shard `index` of `count` lies: beside the dataset's own folder."""
    return folder.parent / f"{folder.name}.shard-{index}-of-{count}"


def finish_shard(
    folder: Path,
    blocks: Sequence[Path],
    *,
    index: int,
    count: int,
    inputs: Mapping[str, Any],
    gigatoken: bool,
    benchmark: Mapping[str, str],
) -> None:
    """Move the files of its blocks into `folder`, and write its manifest.

    inputs: what its blocks were made of; benchmark: what they are to be compared with.
    """
    for file in blocks:
        file.rename(folder / file.name)
    described = {
        "format": FORMAT,
        "shard": index,
        "shards": count,
        "cut": cut(),
        "inputs": inputs,
        "gigatoken": gigatoken,
        "benchmark": benchmark,
        "blocks": sorted(file.name for file in blocks),
    }
    manifests.write(folder, described)


def read_shard(folder: Path, *, index: int, count: int) -> dict[str, Any]:
    """The manifest of a shard that has all its files; `DataError` if it is none."""
    again = _again(index, count)
    try:
        described = json.loads((folder / manifests.NAME).read_text(encoding="utf-8"))
        digest = described.pop("digest")
        known = described["format"] == FORMAT and digest == manifests.digest_of(described)
    except FileNotFoundError:
        raise DataError(f"{folder}: shard {index} of {count} is not there; {again}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / manifests.NAME}: broken ({error}); {again}") from None
    if not known or not described.keys() >= _TOLD:
        raise DataError(f"{folder / manifests.NAME}: not a shard of this version; {again}")
    found = (described["shard"], described["shards"])
    if found != (index, count) or described["cut"] != cut():
        raise DataError(
            f"{folder}: holds shard {found[0]} of {found[1]}, cut into blocks of "
            f"{described['cut']} bytes; expected shard {index} of {count} and {cut()}; move it "
            f"back, or {again} with --overwrite"
        )
    for name in described["blocks"]:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing; {again} with --overwrite")
    return dict(described)


def merged(
    folders: Sequence[Path], described: Sequence[Mapping[str, Any]], split: str
) -> Iterator[BlockFile]:
    """The blocks of all shards in the order of the sources: block b is in shard b % n.

    `DataError` if some shard has blocks left when the one that should hold the next has none.
    """
    there = [{name for name in its["blocks"] if name.startswith(f"{split}.")} for its in described]
    for number in numbers():
        shard, name = number % len(folders), block_name(split, number)
        if name not in there[shard]:
            break
        there[shard].remove(name)
        mend = f"{_again(shard, len(folders))} with --overwrite"
        yield BlockFile(folders[shard] / name, mend=mend)
    for folder, left in zip(folders, there, strict=True):
        if left:
            raise DataError(
                f"{folder}: more blocks of {split} than {folders[shard]} has before them; the "
                "shards do not belong together: make them all again"
            )


def _again(index: int, count: int) -> str:
    return f"run preprocess with --shard {index}/{count} again"
