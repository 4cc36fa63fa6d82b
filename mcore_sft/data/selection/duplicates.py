"""Texts in, the rows that came before out: 128 bits stand for a row.

texts -> hashes -> which are new, in one process, which sees all rows
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from mcore_sft.data.rows import text_offsets

Hashes = npt.NDArray[np.uint64]

_BLOCK = 1 << 16  # hashes inserted at a time
_SHARE = 8  # a run of hashes is merged once it is no smaller than this share of the one before
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))  # odd, without a pattern


def text_hashes(texts: pa.LargeStringArray) -> Hashes:
    """128 bits of each text [N, 2]; the same everywhere (XXH3)."""
    offsets = text_offsets(texts).tolist()
    data = memoryview(texts.buffers()[2] or b"")
    return hashes_of(data[a:b] for a, b in pairwise(offsets))


def hashes_of(items: Iterable[bytes | memoryview]) -> Hashes:
    """128 bits of each item [N, 2]; a text's bytes give what `text_hashes` gives."""
    digests = b"".join(map(xxhash.xxh3_128_digest, items))
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64).reshape(-1, 2)


def joined(first: Hashes, second: Hashes) -> Hashes:
    """128 bits of each pair [N, 2], of those of its parts; their order counts."""
    both: Hashes = first * np.array(_MIX) + second
    return both


class Seen:
    """The hashes of all rows so far, 16 bytes each, in sorted runs that are merged in place."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return sum(len(run.high) for run in self._runs)

    def new(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of `hashes` [N, 2] neither an earlier call nor an earlier row held: [N]."""
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: the first of equals stays first
        high, low = hashes[order, 0], hashes[order, 1]
        first = np.ones(len(order), dtype=np.bool_)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        order, high, low = order[first], high[first], low[first]
        for run in self._runs:
            unseen = ~run.holds(high, low)
            order, high, low = order[unseen], high[unseen], low[unseen]
        if len(order):
            self._add(_Run(high, low))
        new = np.zeros(len(hashes), dtype=np.bool_)
        new[order] = True
        return new

    def _add(self, run: "_Run") -> None:
        while self._runs and _SHARE * len(run.high) >= len(self._runs[-1].high):
            larger = self._runs.pop()
            larger.merge(run)
            run = larger
        self._runs.append(run)


class _Run:
    """Hashes sorted by their high half; equal ones there, all but impossible, in any order."""

    def __init__(self, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> None:
        self.high = high
        self.low = low

    def holds(
        self, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.bool_]:
        at = np.searchsorted(self.high, high)
        np.minimum(at, len(self.high) - 1, out=at)
        same = self.high[at] == high
        held: npt.NDArray[np.bool_] = same & (self.low[at] == low)
        for i in np.flatnonzero(same & ~held).tolist():
            end = int(np.searchsorted(self.high, high[i], side="right"))
            held[i] = low[i] in self.low[at[i] : end]
        return held

    def merge(self, other: "_Run") -> None:
        """Take in the hashes of `other`, without a second copy of one's own."""
        at = np.searchsorted(self.high, other.high)
        _insert(self.high, other.high, at)
        _insert(self.low, other.low, at)


def _insert(
    array: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64], at: npt.NDArray[np.intp]
) -> None:
    """np.insert in place: from the end, a block of values at a time."""
    end = len(array)
    array.resize(end + len(values), refcheck=False)
    for last in range(len(values), 0, -_BLOCK):
        first = max(0, last - _BLOCK)
        start = int(at[first])
        array[start + first : end + last] = np.insert(
            array[start:end], at[first:last] - start, values[first:last]
        )
        end = start
