"""What is kept of all blocks in, a whole dataset out: order, files, packs, proof, report, manifest.

Collected -> divide -> gather -> pack_split -> write_report -> manifest.json
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mcore_sft.base.progress import Course
from mcore_sft.config import HoldoutConfig
from mcore_sft.data import manifest as manifests
from mcore_sft.data.encode import disk
from mcore_sft.data.encode.collect import Collected
from mcore_sft.data.encode.job import Job
from mcore_sft.data.encode.prompt_record import Way
from mcore_sft.data.indexed import token_type
from mcore_sft.data.packs import origins
from mcore_sft.data.packs.gather import Output, gather
from mcore_sft.data.packs.row_names import place, shown
from mcore_sft.data.packs.split import Rules, divide
from mcore_sft.data.packs.write import Pack, Packing, outputs, pack_split
from mcore_sft.data.report.report import write_report
from mcore_sft.data.selection.contamination import Finding
from mcore_sft.data.staging import Room
from mcore_sft.data.workers import Workers, no_tool

ORDERING, GATHERING, PACKING, PROVING = "ordering", "writing", "packing", "checking"
"""Stages of it."""

_FEW = 128 << 20  # bytes


def write_dataset(
    job: Job,
    room: Room,
    collected: dict[str, Collected],
    inputs: Mapping[str, Any],
    pack: Pack,
    course: Course,
) -> dict[str, Any]:
    """Write all of a dataset to `room.result`, from what is kept, and return its manifest.

    `collected` is emptied.
    """
    token_bytes = token_type(job.tokenizer.vocab_size).itemsize
    with course.stage(ORDERING):
        planned = {split: _begin(job, room.result, split, its) for split, its in collected.items()}
    sizes = {
        output: token_bytes * int(collected[split].lengths[output.rows].sum(dtype=np.int64))
        for split, its in planned.items()
        for output in its
    }
    disk.require_now(room.result, sum(sizes.values()))
    total = sum(output.passes * size for output, size in sizes.items())
    known: dict[Path, str] = {}
    with hands(job, total) as workers:
        with course.stage(GATHERING, total=total) as advance:
            for split in list(planned):  # of many rows, packing needs the memory of these
                known |= gather(
                    collected.pop(split),
                    planned.pop(split),
                    token_bytes=token_bytes,
                    scratch=room.scratch,
                    workers=workers,
                    advance=advance,
                )
        return pack_dataset(job, room.result, known, inputs, pack, course, workers)


def hands(job: Job, size: int) -> Workers:
    """Processes for so many bytes; of few, this one is done before others have begun."""
    return Workers(job.num_workers if size > _FEW else 1, no_tool)


def rules(job: Job, split: str) -> Rules:
    """A validation set of its own is taken as it is: all of it, once, in its order."""
    config = job.config
    filters, holdout = config.filters, config.holdout
    weights = [source.weight for source in config.train]
    if split != "train":
        whole = {"downsampling_method": None, "num_output_samples": None}
        filters, holdout = filters.model_copy(update=whole), HoldoutConfig()
        weights = [1.0] * len(config.validation)
    return Rules(
        filters=filters,
        holdout=holdout,
        weights=weights,
        seed=config.seed,
        sequence_length=config.sequence_length,
        root=config.root,
    )


def _begin(job: Job, folder: Path, split: str, everything: Collected) -> list[Output]:
    """Write all of a split, and of what it holds out, that is not in the files of the blocks.

    Returns what is.
    """
    dtype = token_type(job.tokenizer.vocab_size)
    _write_findings(folder / f"{split}.contamination.jsonl", everything.findings, job.config.root)
    made = []
    for name, its in divide(split, everything, rules(job, split)).items():
        origins.write(
            folder / name,
            everything,
            its.rows,
            its.times,
            counts=its.counts,
            dropped=shown(its.samples, job.config.root, job.tokenizer.decode),
            root=job.config.root,
        )
        made += outputs(folder / name, everything, its.rows, job.config.sequence_length, dtype)
    return made


def pack_dataset(
    job: Job,
    folder: Path,
    known: Mapping[Path, str],
    inputs: Mapping[str, Any],
    pack: Pack,
    course: Course,
    workers: Workers,
) -> dict[str, Any]:
    """Pack the splits that lie in `folder`, prove and describe them; returns the manifest.

    known: the SHA-256 of some of the files.
    """
    config, prompt = job.config, job.prompt
    packing = Packing(
        sequence_length=config.sequence_length,
        seed=config.seed,
        pack=pack,
        wording=Way(instruction=prompt.has_instruction, system=prompt.system),
        decode=job.tokenizer.decode,
    )
    names = [name for name in ("train", "validation") if (folder / f"{name}.idx").is_file()]
    with course.stage(PACKING):
        packed = {name: pack_split(folder / name, packing) for name in names}
    if len(packed) == 2:
        shared = np.intersect1d(packed["train"].problems, packed["validation"].problems)
        packed["validation"].counts["shared_problems"] = len(shared)
    counts = {name: its.counts for name, its in packed.items()}
    total = sum((folder / f"{name}.bin").stat().st_size for name in packed)
    with course.stage(PROVING, total=total) as advance:
        write_report(
            folder,
            counts=counts,
            inputs=inputs,
            sequence_length=config.sequence_length,
            dropped={name: its.dropped for name, its in packed.items()},
            tokenizer=job.tokenizer,
            prompt=prompt,
            workers=workers,
            advance=advance,
        )
        files = manifests.describe_files(folder.iterdir(), known)
    manifest = {
        "format": manifests.FORMAT,
        "fingerprint": manifests.fingerprint_of(files),
        "sequence_length": config.sequence_length,
        "inputs": inputs,
        "splits": counts,
        "files": files,
    }
    manifests.write(folder, manifest)
    return manifest


def _write_findings(file: Path, findings: Iterable[Finding], root: Path) -> None:
    """What training and benchmarks share, in an order that no process decides."""
    lines = sorted(
        json.dumps({**dataclasses.asdict(found), **_places(found, root)}, ensure_ascii=False) + "\n"
        for found in findings
    )
    if lines:
        file.write_text("".join(lines), encoding="utf-8")


def _places(found: Finding, root: Path) -> dict[str, str]:
    """Both rows without the folders of this machine, which would change the bytes."""
    return {"where": place(found.where, root), "benchmark": place(found.benchmark, root)}
