"""A folder of packed tokens in, packs out; everything is memory-mapped.

SPLIT.bin, SPLIT.idx                      tokens, one sequence per example (Megatron's format)
SPLIT.spans.npy, SPLIT.span_offsets.npy   trained runs int32 [S, 2]; those of example i are
                                          spans[span_offsets[i]:span_offsets[i + 1]]
SPLIT.packs.npy, SPLIT.pack_offsets.npy   example ids pack by pack, in the same manner
SPLIT.supervised.npy                      int32 [P], supervised tokens of each pack
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data import manifest as manifests
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import IndexedTokens
from mcore_sft.data.pack import Pack
from mcore_sft.data.prompt import Example


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
        self._tokens = IndexedTokens(folder / split)
        self._spans = _array(folder / f"{split}.spans.npy")
        self._span_offsets = _array(folder / f"{split}.span_offsets.npy")
        self._packs = _array(folder / f"{split}.packs.npy")
        self._pack_offsets = _array(folder / f"{split}.pack_offsets.npy")
        self.supervised = _array(folder / f"{split}.supervised.npy")
        self.counts: dict[str, Any] = self.manifest["splits"][split]
        self.sequence_length: int = self.manifest["sequence_length"]
        self.fingerprint: str = self.manifest["fingerprint"]

    def __len__(self) -> int:
        return len(self._pack_offsets) - 1

    @property
    def num_examples(self) -> int:
        """Examples in all packs."""
        return len(self._tokens)

    def example(self, index: int) -> Example:
        """The example with this id."""
        start, end = self._span_offsets[index : index + 2].tolist()
        return Example(tokens=self._tokens[index], spans=np.array(self._spans[start:end]))

    def pack(self, index: int) -> Pack:
        """The examples of one pack, in their order."""
        start, end = self._pack_offsets[index : index + 2].tolist()
        return Pack(examples=tuple(self.example(i) for i in self._packs[start:end].tolist()))


def _array(file: Path) -> npt.NDArray[Any]:
    try:
        return np.asanyarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{file}: not an array file ({error}); run preprocess again with --overwrite"
        ) from None
