"""A packed dataset in, the same for another sequence length out: nothing is tokenized.

    origins -> which examples fit now -> files linked or spliced -> packs

Examples that fitted and fit no more leave SPLIT.bin for SPLIT.long.bin, and others come back.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mcore_sft.data import manifest as manifests
from mcore_sft.data.encode.collect import Mask
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import IndexedTokens, running_sum
from mcore_sft.data.packs import origins
from mcore_sft.data.packs.gather import SPAN_BYTES
from mcore_sft.data.packs.write import begin_examples, long_prefix

_OF_EXAMPLES = ("bin", "idx", "spans.npy", "span_offsets.npy")
_KEPT = ("origins.npy", "origins.json", "systems.npy", "contamination.jsonl")


def unpacked(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a dataset, but for how it is packed."""
    data = {key: value for key, value in inputs["data"].items() if key != "sequence_length"}
    return {**inputs, "data": data}


def can_be_packed(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the dataset in `folder`, if it differs from what `inputs` make in nothing but
    the sequence length, and has all that packing needs, undamaged.
    """
    try:
        manifest = manifests.read(folder)
        there = manifest["inputs"]
        if there == inputs or unpacked(there) != unpacked(inputs):
            return None
        if not all(origins.read(folder / split) for split in manifest["splits"]):
            return None
        manifests.check_files(folder, manifest["files"], verify=True)
    except DataError:
        return None
    return manifest


def take_over(
    old: Path, new: Path, manifest: Mapping[str, Any], sequence_length: int
) -> dict[Path, str]:
    """Write to `new` all of the dataset in `old` but its packs; returns the SHA-256 that is known.

    Files that are the same are not copied, but get a second name.
    """
    known: dict[Path, str] = {}

    def link(name: str) -> None:
        if name in manifest["files"]:
            try:
                os.link(old / name, new / name)
            except OSError:  # a file system without second names
                shutil.copyfile(old / name, new / name)
            known[new / name] = manifest["files"][name]["sha256"]

    for split in manifest["splits"]:
        for name in _KEPT:
            link(f"{split}.{name}")
        its = origins.read(old / split)
        assert its is not None, "it was there a moment ago"
        tokens = np.array(its.rows["tokens"])
        before, now = tokens <= manifest["sequence_length"], tokens <= sequence_length
        _require_some_of_each(split, its.rows["source"], before, now, sequence_length)
        if np.array_equal(before, now):
            for name in _OF_EXAMPLES:
                link(f"{split}.{name}")
                link(f"{long_prefix(Path(split))}.{name}")
        else:
            halves = _Halves(old / split, before)
            halves.write(new / split, tokens, now)
            if not now.all():
                halves.write(long_prefix(new / split), tokens, ~now)
    return known


def _require_some_of_each(
    split: str, sources: npt.NDArray[np.int16], before: Mask, now: Mask, sequence_length: int
) -> None:
    """`DataError` for a source of which examples [R] fitted, and none fits now."""
    for source in np.unique(sources[before]).tolist():
        own = sources == source
        if not now[own].any():
            raise DataError(
                f"source {source} of data.{split}: no example of {own.sum()} fits "
                f"{sequence_length} tokens. Fix: a longer data.sequence_length"
            )


class _Halves:
    """The examples of a split as they lie in two sets of files, those that fit and the others."""

    def __init__(self, prefix: Path, fits: Mask) -> None:
        self._fits = fits
        self._prefixes = {True: prefix, False: long_prefix(prefix)}
        self._span_counts = np.empty(len(fits), np.int64)
        for there in (True, False):
            if (fits == there).any():
                offsets = np.load(f"{self._prefixes[there]}.span_offsets.npy", allow_pickle=False)
                self._span_counts[fits == there] = np.diff(offsets)
        self._dtype = IndexedTokens(prefix).dtype

    def write(self, prefix: Path, tokens: npt.NDArray[np.int32], which: Mask) -> None:
        """Write the files of `which` [R] of the examples, of so many tokens each, in order."""
        lengths, counts = tokens[which], self._span_counts[which]
        begin_examples(prefix, lengths, counts, self._dtype)
        self._splice(Path(f"{prefix}.bin"), "bin", tokens * np.int64(self._dtype.itemsize), which)
        self._splice(
            Path(f"{prefix}.spans.npy"), "spans.npy", self._span_counts * SPAN_BYTES, which
        )

    def _splice(self, file: Path, name: str, sizes: npt.NDArray[np.int64], which: Mask) -> None:
        """Append to `file` what the examples have in the files `name`, of so many bytes each."""
        fits = self._fits
        starts = np.empty(len(sizes), np.int64)
        sources: dict[bool, BinaryIO] = {}
        try:
            for there in (True, False):
                if (fits == there).any():
                    path = Path(f"{self._prefixes[there]}.{name}")
                    own = running_sum(sizes[fits == there])
                    starts[fits == there] = own[:-1] + path.stat().st_size - own[-1]
                    sources[there] = path.open("rb")
            rows = np.flatnonzero(which)
            ends = starts[rows] + sizes[rows]
            goes_on = (fits[rows[1:]] == fits[rows[:-1]]) & (starts[rows[1:]] == ends[:-1])
            runs = np.flatnonzero(np.append(True, ~goes_on))
            lasts = np.append(runs[1:], len(rows)) - 1
            with file.open("r+b" if file.exists() else "wb") as out:
                out.seek(0, os.SEEK_END)
                for first, last in zip(rows[runs].tolist(), lasts.tolist(), strict=True):
                    _copy(sources[bool(fits[first])], int(starts[first]), int(ends[last]), out)
        finally:
            for source in sources.values():
                source.close()


def _copy(source: BinaryIO, start: int, end: int, out: BinaryIO) -> None:
    """Write bytes `start` to `end` of a file where another one is open."""
    while start < end:
        sent = os.sendfile(out.fileno(), source.fileno(), start, end - start)
        if not sent:
            raise OSError(f"{source.name}: ends at byte {start}, expected {end}")
        start += sent
