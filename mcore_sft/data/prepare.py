"""Sources in, a packed dataset out: one folder, written beside its place and renamed when whole.

    sources -> blocks -> (worker processes) -> encoded blocks -> splits -> report -> manifest

A machine may do every n-th block (`prepare_shard`), and one of them the rest (`merge`): the
encoded blocks come from the shards' folders then, and all that follows is the same.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from mcore_sft.config import DataConfig, HoldoutConfig
from mcore_sft.data import manifest as manifests
from mcore_sft.data.encode import BAD, Drops, Encoded, encode_all
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import token_type
from mcore_sft.data.job import Job
from mcore_sft.data.order import row_order
from mcore_sft.data.place import holds_dataset, new_folder, written
from mcore_sft.data.progress import progress
from mcore_sft.data.report import write_report
from mcore_sft.data.shards import ShardWriter, finish_shard, merged, read_shard, shard_folder
from mcore_sft.data.split import Collector, Split, SplitRules, packing_operator, write_splits

Result = TypeVar("Result")


def prepare(job: Job, folder: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the packed dataset of `job` to `folder` and return its manifest.

    A folder that already holds the same is left as it is; another one there is a `DataError`
    unless `overwrite`. Nothing is left behind where something fails.
    """
    pack = packing_operator()  # found before anything is tokenized, or an error says how
    if holds_dataset(folder) and not overwrite:
        return _reuse(folder, job.inputs, job.console)
    with new_folder(folder) as partial:
        collectors = _by_one_tokenizer(
            job,
            lambda: {
                split: _collect(job, split, _encode(job, split), partial) for split in job.sources
            },
        )
        return _write(job, partial, collectors, job.inputs, pack)


def prepare_shard(
    job: Job, folder: Path, *, index: int, count: int, overwrite: bool = False
) -> Path:
    """Encode every `count`-th block, from `index`, into a folder beside `folder`; returns it.

    A complete shard of the same inputs is left as it is, so that a killed array of jobs can be
    started again.
    """
    shard = shard_folder(folder, index, count)
    if holds_dataset(shard) and not overwrite:
        if read_shard(shard, index=index, count=count)["inputs"] == job.inputs:
            job.console.print(f"{shard}: this shard is there already; it is reused")
            return shard
        raise DataError(f"{shard}: a shard of other inputs lies here; replace it with --overwrite")
    with new_folder(shard) as partial:
        _by_one_tokenizer(job, lambda: _write_shard(job, partial, index, count))
        finish_shard(
            partial,
            index=index,
            count=count,
            inputs=job.inputs,
            gigatoken=job.tokenizer.gigatoken,
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
    with new_folder(folder) as partial:
        collectors = {
            split: _collect(job, split, merged(shards, split), partial, verb="merging")
            for split in job.sources
        }
        return _write(job, partial, collectors, inputs, pack)


def export_json_lines(job: Job, file: Path, *, overwrite: bool = False) -> int:
    """Write the rows of `data.train` as NeMo-Skills does: expected_answer, input and output.

    Returns how many. They are filtered, sampled and ordered as for training, but none is too long,
    none is held out, and no weight repeats them. A file that is there is a `DataError` unless
    `overwrite`.
    """
    if file.is_dir() or (file.exists() and not overwrite):
        what = "a folder" if file.is_dir() else "there already; replace it with --overwrite"
        raise DataError(f"{file}: it is {what}; give another name (--export-jsonl FILE)")
    if any(file.resolve() == source.resolve() for source in job.files):
        raise DataError(f"{file}: it is a source of this run; give another name")
    filters = job.config.filters
    with written(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=file.parent, prefix=f".{file.name}.partial-"
        ) as partial:
            lines = _encode(job, "train", as_json=True)
            with Collector(
                Path(partial) / "collected", np.dtype(np.uint8), deduplicate=filters.deduplicate
            ) as collector:
                for encoded in _watched(job, "train", lines):
                    collector.add(encoded)
            everything, origins = collector.collected()
            rows = row_order(origins.problems, filters)
            everything.gather(rows, Path(partial) / "lines")
            (Path(partial) / "lines").replace(file)
    return len(rows)


def _encode(
    job: Job, split: str, *, every: int = 1, first: int = 0, as_json: bool = False
) -> Iterator[Encoded]:
    """The blocks of `split`, or every n-th of them, encoded in order."""
    workers = job.config.workers or len(os.sched_getaffinity(0))
    mine = islice(job.blocks(split), first, None, every)
    return encode_all(mine, job.recipe(split, as_json=as_json), workers=workers)


def _watched(
    job: Job, split: str, blocks: Iterable[Encoded], *, verb: str = "tokenizing"
) -> Iterator[Encoded]:
    """`blocks`, with a bar that moves, and an end to bad rows and to wrong ids."""
    total = None if verb == "merging" else job.size(split) or None
    bad = Drops()
    with progress(f"{verb} {split}", total=total, console=job.console) as advance:
        for encoded in blocks:
            if verb != "merging" and job.tokenizer.gigatoken and not encoded.gigatoken:
                raise _GigatokenDiffers
            bad.update(encoded.drops)
            _limit_bad_rows(bad, split, job.config)
            yield encoded
            advance(encoded.size)


def _limit_bad_rows(drops: Drops, split: str, config: DataConfig) -> None:
    if drops.counts.get(BAD, 0) > config.max_bad_rows:
        first = drops.samples[BAD][0]
        raise DataError(
            f"{first.text}; it is the first of more than {config.max_bad_rows} rows of "
            f"data.{split} that cannot be used: mend them, or raise data.max_bad_rows"
        )


class _GigatokenDiffers(Exception):
    """A sample did not bear out that gigatoken gives the tokenizer's ids."""


def _by_one_tokenizer(job: Job, work: Callable[[], Result]) -> Result:
    """`work` by gigatoken, or all of it by `tokenizers`, whichever process noticed."""
    try:
        return work()
    except _GigatokenDiffers:
        job.tokenizer.gigatoken = False
        job.console.print("starting again with `tokenizers` for every text")
        return work()


def _collect(
    job: Job, split: str, blocks: Iterable[Encoded], partial: Path, *, verb: str = "tokenizing"
) -> Collector:
    dtype = token_type(job.tokenizer.vocab_size)
    deduplicate = job.config.filters.deduplicate
    with Collector(partial / f"{split}.collected", dtype, deduplicate=deduplicate) as collector:
        for encoded in _watched(job, split, blocks, verb=verb):
            collector.add(encoded)
    return collector


def _write_shard(job: Job, partial: Path, index: int, count: int) -> None:
    for split in job.sources:
        blocks = _encode(job, split, every=count, first=index)
        with ShardWriter(partial, split) as writer:
            for encoded in _watched(job, split, blocks):
                writer.add(encoded)


def _agreed(job: Job, shards: Sequence[Path], described: Sequence[Mapping[str, Any]]) -> Any:
    """The inputs that all shards were made of, which are those of `job`."""
    inputs = described[0]["inputs"]
    for shard, its in zip(shards, described, strict=True):
        expected = {**inputs, **job.settings}
        if its["inputs"] != expected:
            raise DataError(
                f"{shard}: a shard of other inputs ({_differences(its['inputs'], expected)}); make "
                "it again with this configuration and the same sources"
            )
    if len({its["gigatoken"] for its in described}) > 1:
        slow = [
            shard.name for shard, its in zip(shards, described, strict=True) if its["gigatoken"]
        ]
        raise DataError(
            "gigatoken was found to differ from the tokenizer in some shards and not in others; "
            f"make {', '.join(slow)} again with data.gigatoken=false --overwrite"
        )
    return inputs


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


def _write(
    job: Job,
    partial: Path,
    collectors: Mapping[str, Collector],
    inputs: Mapping[str, Any],
    pack: Any,
) -> dict[str, Any]:
    """Splits, report and manifest, from all that was collected."""
    config = job.config
    made: dict[str, Split] = {}
    for split, collector in collectors.items():
        rules = _rules(config, split, pack)
        made.update(write_splits(partial, split, collector, rules))
    if len(made) == 2:
        shared = np.intersect1d(made["train"].problems, made["validation"].problems)
        made["validation"].counts["shared_problems"] = len(shared)
    counts = {split: written.counts for split, written in made.items()}
    write_report(
        partial,
        counts=counts,
        inputs=inputs,
        sequence_length=config.sequence_length,
        samples={split: collector.drops.samples for split, collector in collectors.items()},
        tokenizer=job.tokenizer,
        prompt=job.prompt,
        root=config.root,
    )
    files = manifests.describe_files(partial.iterdir())
    manifest = {
        "format": manifests.FORMAT,
        "fingerprint": manifests.fingerprint_of(files),
        "sequence_length": config.sequence_length,
        "inputs": inputs,
        "splits": counts,
        "files": files,
    }
    manifests.write(partial, manifest)
    return manifest


def _rules(config: DataConfig, split: str, pack: Any) -> SplitRules:
    """A validation set of its own is taken as it is: all of it, once, in its order."""
    filters, holdout = config.filters, config.holdout
    weights = [source.weight for source in config.train]
    if split != "train":
        whole = {"downsampling_method": None, "num_output_samples": None}
        filters, holdout = filters.model_copy(update=whole), HoldoutConfig()
        weights = [1.0] * len(config.validation)
    return SplitRules(
        filters=filters,
        holdout=holdout,
        weights=weights,
        sequence_length=config.sequence_length,
        seed=config.seed,
        pack=pack,
    )


def _reuse(folder: Path, inputs: Mapping[str, Any], console: Console) -> dict[str, Any]:
    manifest = manifests.read(folder)
    if manifest.get("inputs") != inputs:
        there = manifest.get("inputs", {})
        raise DataError(
            f"{folder}: a packed dataset of other inputs lies here "
            f"({_differences(there, inputs)}); "
            "give another folder (data.packed=DIR), or replace it with --overwrite"
        )
    manifests.check_files(folder, manifest["files"], verify=True)
    console.print(f"{folder}: a packed dataset of the same inputs is there already; it is reused")
    return manifest
