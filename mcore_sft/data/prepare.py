"""Sources in, a packed dataset out: one folder, written beside its place and renamed when whole.

    sources -> blocks -> (worker processes) -> encoded blocks -> splits -> report -> manifest

A machine may do every n-th block (`prepare_shard`), and one of them the rest (`merge`): the
encoded blocks come from the shards' folders then, and all that follows is the same.
"""

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mcore_sft.base.files import end_of_links, rename, sync
from mcore_sft.base.terminal import Console
from mcore_sft.config import DataConfig, HoldoutConfig
from mcore_sft.data import manifest as manifests
from mcore_sft.data.encode import BAD, Drops, Encoded
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import token_type
from mcore_sft.data.job import Job
from mcore_sft.data.order import distinct_rows, held_out, row_order
from mcore_sft.data.place import holds_dataset, new_folder, workspace
from mcore_sft.data.progress import progress
from mcore_sft.data.prompt import UNFIT, Prompt
from mcore_sft.data.prompt_record import Way
from mcore_sft.data.report import write_report
from mcore_sft.data.shards import ShardWriter, finish_shard, merged, read_shard, shard_folder
from mcore_sft.data.split import (
    Collector,
    Origins,
    Split,
    SplitRules,
    packing_operator,
    write_splits,
)
from mcore_sft.data.workers import encode_all

Result = TypeVar("Result")


def prepare(job: Job, folder: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the packed dataset of `job` to `folder` and return its manifest.

    A folder that already holds the same is left as it is; another one there is a `DataError`
    unless `overwrite`. Nothing is left behind where something fails.
    """
    pack = packing_operator()  # found before anything is tokenized, or an error says how
    if holds_dataset(folder) and not overwrite:
        return _reuse(folder, job.inputs, job.console)
    with new_folder(folder, overwrite=overwrite) as partial:
        inputs = job.inputs  # before anything is tokenized, so that they are what is tokenized
        collectors = _by_one_tokenizer(
            job,
            lambda: {
                split: _collect(job, split, _encode(job, split), partial) for split in job.sources
            },
        )
        job.require_unchanged()
        return _write(job, partial, collectors, inputs, pack)


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
    with new_folder(shard, overwrite=overwrite) as partial:
        inputs = job.inputs
        _by_one_tokenizer(job, lambda: _write_shard(job, partial, index, count))
        job.require_unchanged()
        finish_shard(
            partial,
            index=index,
            count=count,
            inputs=inputs,
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
    with new_folder(folder, overwrite=overwrite) as partial:
        collectors = {
            split: _collect(job, split, merged(shards, split), partial, verb="merging")
            for split in job.sources
        }
        return _write(job, partial, collectors, inputs, pack)


def export_json_lines(job: Job, file: Path, *, overwrite: bool = False) -> int:
    """Write the rows of `data.train` as NeMo-Skills does: expected_answer, input and output.

    Returns how many. They are filtered, sampled, ordered and held out as for training, but none is
    too long, and no weight repeats them. A file that is there is a `DataError` unless `overwrite`.
    """
    file = end_of_links(file)
    _require_free(file, job, overwrite=overwrite)
    with workspace(file) as partial:
        blocks = _encode(job, "train", as_json=True)
        collector = _collect(job, "train", blocks, partial, dtype=np.uint8)
        everything, origins = collector.collected()
        rows, held = _rows_of_training(origins, job.config, collector.rows)
        everything.gather(rows, partial / "lines")
        _require_free(file, job, overwrite=overwrite)
        sync(partial / "lines")
        rename(partial / "lines", file)
    if held:
        job.console.print(
            f"{held:,} more rows are held out for validation; "
            "data.holdout.fraction=0 writes them too"
        )
    return len(rows)


def _require_free(file: Path, job: Job, *, overwrite: bool) -> None:
    """`DataError` for an export that must not be written there."""
    if file.is_dir() or (file.exists() and not overwrite):
        what = "a folder" if file.is_dir() else "there already; replace it with --overwrite"
        raise DataError(f"{file}: it is {what}; give another name (--export-jsonl FILE)")
    if any(file.resolve() == source.resolve() for source in job.files):
        raise DataError(f"{file}: it is a source of this run; give another name")


def _rows_of_training(
    origins: Origins, config: DataConfig, num_rows: int
) -> tuple[npt.NDArray[np.int64], int]:
    """Which rows are written, in their order, and how many more are held out."""
    rows = distinct_rows(row_order(origins.problems, config.filters), origins.hashes)
    if not config.holdout.fraction:
        return rows, 0
    positions, problems = origins.positions, origins.problems
    held = held_out(config.holdout, positions=positions, problems=problems, num_rows=num_rows)[rows]
    return rows[~held], int(held.sum())


def _encode(
    job: Job, split: str, *, every: int = 1, first: int = 0, as_json: bool = False
) -> Generator[Encoded, None, None]:
    """The blocks of `split`, or every n-th of them, encoded in order."""
    workers = job.config.workers or len(os.sched_getaffinity(0))
    mine = islice(job.blocks(split), first, None, every)
    return encode_all(mine, job.recipe(split, as_json=as_json), workers=workers)


def _watched(
    job: Job, split: str, blocks: Generator[Encoded, None, None], *, verb: str = "tokenizing"
) -> Generator[Encoded, None, None]:
    """`blocks`, with a bar that moves, and an end to bad rows and to wrong ids.

    To be closed, as `blocks` is then, by whoever may be interrupted.
    """
    total = None if verb == "merging" else job.size(split) or None
    bad = Drops()
    name = f"{verb} {split}"
    with closing(blocks), progress(name, total=total, console=job.console) as advance:
        for encoded in blocks:
            if verb != "merging" and job.tokenizer.gigatoken and not encoded.gigatoken:
                raise _GigatokenDiffers
            bad.update(encoded.drops)
            _limit_bad_rows(bad, split, job.config)
            yield encoded
            advance(encoded.size)


def _limit_bad_rows(drops: Drops, split: str, config: DataConfig) -> None:
    if sum(drops.counts.get(reason, 0) for reason in (BAD, UNFIT)) > config.max_bad_rows:
        first = (drops.samples.get(BAD) or drops.samples[UNFIT])[0]
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
    job: Job,
    split: str,
    blocks: Generator[Encoded, None, None],
    partial: Path,
    *,
    dtype: type[np.generic] | None = None,
    verb: str = "tokenizing",
) -> Collector:
    """All of `blocks`, whose tokens are of `dtype`, or of the type of the tokenizer's ids."""
    kept = np.dtype(dtype or token_type(job.tokenizer.vocab_size))
    file, deduplicate = partial / f"{split}.collected", job.config.filters.deduplicate
    watched = _watched(job, split, blocks, verb=verb)
    with Collector(file, kept, deduplicate=deduplicate) as collector, closing(watched):
        for encoded in watched:
            collector.add(encoded)
    return collector


def _write_shard(job: Job, partial: Path, index: int, count: int) -> None:
    for split in job.sources:
        blocks = _watched(job, split, _encode(job, split, every=count, first=index))
        with ShardWriter(partial, split) as writer, closing(blocks):
            for encoded in blocks:
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
        rules = _rules(config, split, pack, job.prompt)
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


def _rules(config: DataConfig, split: str, pack: Any, prompt: Prompt) -> SplitRules:
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
        wording=Way(instruction=prompt.has_instruction, system=prompt.system),
        root=config.root,
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
    if not all("prompts" in split for split in manifest["splits"].values()):
        console.print(
            f"{folder}: an older version made it, so it does not record what its prompts had, and "
            "evaluation cannot ask in the same way. Fix: --overwrite makes it again"
        )
    return manifest
