"""Sources in, a packed dataset out: one folder, written beside its place and renamed when whole.

    sources -> blocks -> (processes) -> files of blocks -> what is kept, in order -> splits -> packs

A machine may do every n-th block (`prepare_shard`), and one of them the rest (`merge`): the files
of the blocks come from the shards' folders then, and all that follows is the same. So it is where
some of them are those of a run that was killed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcore_sft.base.progress import Course
from mcore_sft.base.terminal import Console
from mcore_sft.data import manifest as manifests
from mcore_sft.data.encode import disk
from mcore_sft.data.encode.collect import Collected
from mcore_sft.data.encode.job import Job
from mcore_sft.data.encode.shards import finish_shard, merged, read_shard, shard_folder
from mcore_sft.data.encode.stage import benches, by_one_tokenizer, collect, encode
from mcore_sft.data.encode.store import Store
from mcore_sft.data.errors import DataError, WorkerEnded
from mcore_sft.data.finish import (
    GATHERING,
    ORDERING,
    PACKING,
    PROVING,
    hands,
    pack_dataset,
    write_dataset,
)
from mcore_sft.data.indexed import token_type
from mcore_sft.data.packs.repack import can_be_packed, take_over, unpacked
from mcore_sft.data.packs.write import Pack, packing_operator
from mcore_sft.data.staging import Room, clear, holds_dataset, workroom

READING = "checksums"
"""The stage before the blocks are encoded."""

_SHARES = {READING: 3, ORDERING: 5, GATHERING: 12, PACKING: 3, PROVING: 7}
_ENCODING = 70  # the share of all splits together
_LAST = (ORDERING, GATHERING, PACKING, PROVING)


def prepare(job: Job, folder: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the packed dataset of `job` to `folder` and return its manifest.

    A folder that already holds the same is left as it is; another one there is a `DataError`
    unless `overwrite`. Where that differs in its sequence length alone, it is packed anew. Nothing
    is left behind where something fails; but what was encoded stays where a run is ended from
    outside, and the next one goes on from there.
    """
    pack = packing_operator()  # found before anything is tokenized, or an error says how
    there = holds_dataset(folder)
    with _course(job, "encoding", *_LAST) as course:
        _read_sources(job, course)
        if there and not overwrite:
            return _reuse(folder, job.inputs, job.console)
        with _room(job, folder, overwrite=overwrite) as room:
            inputs = job.inputs  # before anything is tokenized, so that they are what is tokenized
            if there and (old := can_be_packed(folder, inputs)):
                return _pack_anew(job, folder, room, old, pack, course)
            collected = by_one_tokenizer(job, lambda: _collect_all(job, folder, room, course))
            job.require_unchanged()
            return write_dataset(job, room, collected, inputs, pack, course)


def prepare_shard(
    job: Job, folder: Path, *, index: int, count: int, overwrite: bool = False
) -> Path:
    """Encode every `count`-th block, from `index`, into a folder beside `folder`; returns it.

    A complete shard of the same inputs is left as it is, so that a killed array of jobs can be
    started again; a killed one goes on.
    """
    shard = shard_folder(folder, index, count)
    there = holds_dataset(shard) and not overwrite
    with _course(job, "encoding") as course:
        _read_sources(job, course)
        inputs = unpacked(job.inputs)
        if there:
            if read_shard(shard, index=index, count=count)["inputs"] == inputs:
                job.console.print(f"{shard}: this shard is there already; it is reused")
                return shard
            raise DataError(
                f"{shard}: a shard of other inputs lies here; replace it with --overwrite"
            )
        with _room(job, shard, overwrite=overwrite) as room:
            made = by_one_tokenizer(
                job, lambda: _encode_shard(job, shard, room, course, index, count)
            )
            job.require_unchanged()
            finish_shard(
                room.result,
                made,
                index=index,
                count=count,
                inputs=inputs,
                gigatoken=job.tokenizer.gigatoken,
                benchmark=job.benchmark,
            )
    return shard


def merge(job: Job, folder: Path, *, count: int, overwrite: bool = False) -> dict[str, Any]:
    """Write to `folder` what `prepare` would have written, from its `count` shards."""
    pack = packing_operator()
    shards = [shard_folder(folder, index, count) for index in range(count)]
    described = [read_shard(shard, index=i, count=count) for i, shard in enumerate(shards)]
    inputs = _agreed(job, shards, described)
    if holds_dataset(folder) and not overwrite:
        return _reuse(folder, inputs, job.console)
    with (
        _course(job, "merging", *_LAST) as course,
        _room(job, folder, overwrite=overwrite) as room,
    ):
        collected = {}
        with benches(job, described[0]["benchmark"]) as workers:
            for split in job.sources:
                with course.stage(f"merging {split}") as advance:
                    blocks = merged(shards, described, split)
                    collected[split] = collect(job, split, blocks, workers, advance)
        return write_dataset(job, room, collected, inputs, pack, course)


def _course(job: Job, verb: str, *stages: str) -> Course:
    """The line of progress over all that is done, splits by the sizes of their sources."""
    sizes = {split: max(1, job.guessed_size(split)) for split in job.sources}
    shares = {
        f"{verb} {split}": _ENCODING * size / sum(sizes.values()) for split, size in sizes.items()
    }
    first = {READING: _SHARES[READING]} if verb == "encoding" else {}
    return Course(job.console, {**first, **shares, **{name: _SHARES[name] for name in stages}})


def _read_sources(job: Job, course: Course) -> None:
    with course.stage(READING, total=job.bytes_of_sources) as advance:
        job.read_sources(advance)


@contextmanager
def _room(job: Job, folder: Path, *, overwrite: bool) -> Iterator[Room]:
    """Where a run works; says what is kept where it is ended from outside."""
    with workroom(folder, overwrite=overwrite) as room:
        try:
            yield room
        except (KeyboardInterrupt, WorkerEnded):
            if room.is_kept:
                job.console.print(
                    f"{room.blocks}: holds what was encoded; the same command goes on from there, "
                    "and what is not wanted can be removed",
                    soft_wrap=True,
                )
            raise


def _store(job: Job, room: Room) -> Store:
    made_of = {**unpacked(job.inputs), "gigatoken": job.tokenizer.gigatoken, "unfed": job.unfed}
    return Store(room.blocks, made_of)


def _collect_all(job: Job, folder: Path, room: Room, course: Course) -> dict[str, Collected]:
    """What is kept of each split."""
    store, tokens = _store(job, room), token_type(job.tokenizer.vocab_size)
    collected = {}
    with benches(job) as workers:
        disk.require(job, folder, workers, tokens, there=store.size)
        for split in job.sources:
            with course.stage(f"encoding {split}", total=job.size(split) or None) as advance:
                blocks = encode(job, split, store, workers, tokens)
                collected[split] = collect(job, split, blocks, workers, advance)
    return collected


def _encode_shard(
    job: Job, shard: Path, room: Room, course: Course, index: int, count: int
) -> list[Path]:
    """The files of every `count`-th block."""
    store, tokens = _store(job, room), token_type(job.tokenizer.vocab_size)
    made = []
    with benches(job) as workers:
        disk.require(job, shard, workers, tokens, there=store.size, shards=count)
        for split in job.sources:
            total = job.size(split) // count
            with course.stage(f"encoding {split}", total=total or None) as advance:
                for block in encode(job, split, store, workers, tokens, every=count, first=index):
                    made.append(block.file)
                    advance(block.size)
    return made


def _pack_anew(
    job: Job, folder: Path, room: Room, old: Mapping[str, Any], pack: Pack, course: Course
) -> dict[str, Any]:
    """The dataset in `folder`, whose manifest is `old`, for another sequence length."""
    job.console.print(
        f"{folder}: the same but for data.sequence_length; packing it anew", soft_wrap=True
    )
    known = take_over(folder, room.result, old, job.config.sequence_length)
    size = sum(file.stat().st_size for file in room.result.glob("*.bin"))
    with hands(job, size) as workers:
        return pack_dataset(job, room.result, known, job.inputs, pack, course, workers)


def _agreed(
    job: Job, shards: Sequence[Path], described: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The inputs that all shards were made of, which are those of `job`, and how it packs them."""
    inputs = described[0]["inputs"]
    expected = {**inputs, **job.settings}
    for shard, its in zip(shards, described, strict=True):
        if its["inputs"] != unpacked(expected):
            raise DataError(
                f"{shard}: a shard of other inputs "
                f"({_differences(its['inputs'], unpacked(expected))}); make it again with this "
                "configuration and the same sources"
            )
    if len({its["gigatoken"] for its in described}) > 1:
        slow = [
            shard.name for shard, its in zip(shards, described, strict=True) if its["gigatoken"]
        ]
        raise DataError(
            "gigatoken was found to differ from the tokenizer in some shards and not in others; "
            f"make {', '.join(slow)} again with data.gigatoken=false --overwrite"
        )
    return expected


def _reuse(folder: Path, inputs: Mapping[str, Any], console: Console) -> dict[str, Any]:
    manifest = manifests.read(folder)
    there = manifest.get("inputs", {})
    if there != inputs:
        anew = " (packs it anew)" if unpacked(there) == unpacked(inputs) else ""
        raise DataError(
            f"{folder}: a packed dataset of other inputs lies here "
            f"({_differences(there, inputs)}); "
            f"give another folder (data.packed=DIR), or replace it with --overwrite{anew}"
        )
    manifests.check_files(folder, manifest["files"], verify=True)
    clear(folder)
    console.print(f"{folder}: a packed dataset of the same inputs is there already; it is reused")
    if not all("prompts" in split for split in manifest["splits"].values()):
        console.print(
            f"{folder}: an older version made it, so it does not record what its prompts had, and "
            "evaluation cannot ask in the same way. Fix: --overwrite makes it again"
        )
    return manifest


def _differences(there: Any, here: Any) -> str:
    """The first few keys in which two trees differ, with both values."""
    found = [
        f"{key}: {json.dumps(old)[:60]} there, {json.dumps(new)[:60]} here"
        for key, old, new in _leaves(there, here)
    ]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _leaves(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*here, *(name for name in there if name not in here)]:
            yield from _leaves(
                there.get(name), here.get(name), f"{key}.{name}" if key else str(name)
            )
    elif there != here:
        yield key, there, here
