"""A folder of packed tokens in, packs out; everything is memory-mapped.

SPLIT.bin, SPLIT.idx                      tokens, one sequence per example (Megatron's format)
SPLIT.spans.npy, SPLIT.span_offsets.npy   trained runs int32 [S, 2]; those of example i are
                                          spans[span_offsets[i]:span_offsets[i + 1]]
SPLIT.packs.npy, SPLIT.pack_offsets.npy   example ids pack by pack, in the same manner; an example
                                          may be shown several times in an epoch
SPLIT.supervised.npy                      int32 [P], supervised tokens of each pack
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data import manifest as manifests
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import IndexedTokens
from mcore_sft.data.packs.pack import Pack
from mcore_sft.data.text.prompt import Example

Array = npt.NDArray[Any]

_FORMS: dict[str, tuple[type[np.integer[Any]], int]] = {
    "spans": (np.int32, 2),
    "span_offsets": (np.int64, 1),
    "packs": (np.int64, 1),
    "pack_offsets": (np.int64, 1),
    "supervised": (np.int32, 1),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """The files of one split, memory-mapped, of the right types; what they say may be wrong."""

    prefix: Path
    tokens: IndexedTokens
    spans: Array
    span_offsets: Array
    packs: Array
    pack_offsets: Array
    supervised: Array

    @classmethod
    def open(cls, folder: Path, split: str) -> "Arrays":
        """Map the files of `split`; `DataError` names the first that cannot be."""
        prefix = folder / split
        try:
            tokens = IndexedTokens(prefix)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(f"{prefix}.bin, {prefix}.idx: cannot be read ({error})") from None
        arrays = {name: _load(Path(f"{prefix}.{name}.npy"), *_FORMS[name]) for name in _FORMS}
        return cls(prefix=prefix, tokens=tokens, **arrays)

    def file(self, name: str) -> Path:
        """Where one of the arrays lies, or the tokens (`bin`, `idx`)."""
        return Path(f"{self.prefix}.{name}.npy" if name in _FORMS else f"{self.prefix}.{name}")

    def pack_of(self, place: int) -> int:
        """The pack that the entry at `place` of `packs` belongs to."""
        return int(np.searchsorted(self.pack_offsets, place, side="right")) - 1


class PackedDataset:
    """Packs of one split: dataset.pack(p), p below len(dataset)."""

    def __init__(self, folder: Path, split: str = "train", *, verify: bool = True) -> None:
        """Open `folder`; `DataError` names a file of the wrong size, or (`verify`) checksum."""
        folder = Path(folder)
        self.manifest = manifests.read(folder)
        if split not in self.manifest["splits"]:
            there = ", ".join(self.manifest["splits"])
            raise DataError(
                f"{folder}: no split {split!r}, only {there}; "
                f"name its sources in data.{split} and run preprocess again with --overwrite"
            )
        files = self.manifest["files"]
        own = {name: files[name] for name in files if name.startswith(f"{split}.")}
        manifests.check_files(folder, own, verify=verify)
        self._arrays = Arrays.open(folder, split)
        self.supervised = self._arrays.supervised
        self.counts: dict[str, Any] = self.manifest["splits"][split]
        self.sequence_length: int = self.manifest["sequence_length"]
        self.fingerprint = manifests.split_fingerprint(self.manifest, split)

    def __len__(self) -> int:
        return len(self._arrays.pack_offsets) - 1

    @property
    def num_examples(self) -> int:
        """Examples in all packs; one that is shown twice in an epoch is two."""
        return len(self._arrays.packs)

    @property
    def num_distinct(self) -> int:
        """Examples that are stored; their ids are below this."""
        return len(self._arrays.tokens)

    def longest_pack(self, unit: int) -> int:
        """Tokens of the longest pack whose examples are each filled up to a multiple of `unit`."""
        lengths = -(-self._arrays.tokens.lengths // unit) * unit
        tokens = np.add.reduceat(lengths[self._arrays.packs], self._arrays.pack_offsets[:-1])
        return int(tokens.max())

    def largest_attention(self, length: int, packs: int = 1) -> int:
        """Documents times the longest one's tokens squared, at most, in a row of `packs` packs.

        Each pack is filled up to `length` tokens by a document of its own; an empty one is such a
        document alone.
        """
        lengths, begins = self._arrays.tokens.lengths[self._arrays.packs], self._arrays.pack_offsets
        longest = np.maximum.reduceat(lengths, begins[:-1]).astype(np.int64)
        padding = length - np.add.reduceat(lengths, begins[:-1], dtype=np.int64)
        documents = np.diff(begins) + (padding > 0)
        if packs > 1:  # any may share a row, an empty one too
            return int(packs * documents.max() * length**2)
        return max(length**2, int((documents * np.maximum(longest, padding) ** 2).max()))

    def example(self, index: int) -> Example:
        """The example with this id."""
        return self._examples(np.array([index]))[0]

    def pack(self, index: int) -> Pack:
        """The examples of one pack, in their order."""
        return Pack(examples=self._examples(self._ids(index)))

    def examples_of(self, pack: int) -> list[int]:
        """The ids of the examples of one pack, in their order."""
        ids: list[int] = self._ids(pack).tolist()
        return ids

    def _ids(self, pack: int) -> npt.NDArray[np.int64]:
        start, end = self._arrays.pack_offsets[pack : pack + 2].tolist()
        return self._arrays.packs[start:end]

    def _examples(self, ids: npt.NDArray[np.int64]) -> tuple[Example, ...]:
        spans, offsets = self._arrays.spans, self._arrays.span_offsets
        columns = (self._arrays.tokens.take(ids), offsets[ids].tolist(), offsets[ids + 1].tolist())
        return tuple(
            [
                Example(tokens=tokens, spans=spans[start:end])
                for tokens, start, end in zip(*columns, strict=True)
            ]
        )


def _load(file: Path, kind: type[np.integer[Any]], dimensions: int) -> Array:
    """The array in `file`, a plain one over the map: slices of np.memmap itself are slow."""
    try:
        with file.open("rb") as opened:
            begin = opened.read(len(np.lib.format.MAGIC_PREFIX))
        if begin != np.lib.format.MAGIC_PREFIX:
            raise ValueError(f"begins with {begin!r}")
        array: Array = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # of a damaged header, numpy raises nearly anything
        raise DataError(
            f"{file}: not an array file ({error}); run preprocess again with --overwrite"
        ) from None
    if array.dtype != np.dtype(kind) or array.ndim != dimensions:
        raise DataError(
            f"{file}: holds {array.dtype} {list(array.shape)}, expected {np.dtype(kind)} with "
            f"{dimensions} dimension(s); run preprocess again with --overwrite"
        )
    return array
