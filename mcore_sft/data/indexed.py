"""Token files in Megatron's indexed format: PREFIX.bin holds the tokens, PREFIX.idx where they lie.

.idx = magic, version, dtype code, sequences S, document marks D, lengths int32 [S],
       byte offsets int64 [S], document marks int64 [D]
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_CODES: dict[int, type[np.int32] | type[np.uint16]] = {4: np.int32, 8: np.uint16}


def token_type(vocab_size: int) -> np.dtype[np.int32] | np.dtype[np.uint16]:
    """Smallest type that Megatron's own tools would choose for such a vocabulary."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def running_sum(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Sums of the first 0, 1, 2, ... of `counts` [N]: where each begins and the last ends."""
    sums = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


def write_index(
    file: Path, lengths: npt.NDArray[np.int32], dtype: np.dtype[np.int32] | np.dtype[np.uint16]
) -> None:
    """Write the .idx of sequences of `lengths` [S] that lie one after another, a document each."""
    code = next(code for code, kind in _CODES.items() if np.dtype(kind) == dtype)
    offsets = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=offsets[1:])
    offsets *= dtype.itemsize
    with file.open("wb") as out:
        out.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
        out.write(lengths.astype("<i4").tobytes())
        out.write(offsets.tobytes())
        out.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


class IndexedTokens:
    """Sequences of tokens, memory-mapped: tokens[i] is the i-th, [length]."""

    def __init__(self, prefix: Path) -> None:
        index, tokens = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        code, count = _read_header(index)
        self.dtype = np.dtype(_CODES[code])
        start = _HEADER.size
        self.lengths = np.memmap(index, dtype="<i4", mode="r", offset=start, shape=(count,))
        self.offsets = np.memmap(
            index, dtype="<i8", mode="r", offset=start + 4 * count, shape=(count,)
        )
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if tokens.stat().st_size != expected:
            raise DataError(
                f"{tokens}: {tokens.stat().st_size} bytes, but {index.name} describes {expected}; "
                "run preprocess again with --overwrite"
            )
        self._tokens = np.memmap(tokens, dtype=self.dtype, mode="r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        start = int(self.offsets[index]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.lengths[index])].astype(np.int32)


def _read_header(index: Path) -> tuple[int, int]:
    """Dtype code and number of sequences; `DataError` if this is no index."""
    with index.open("rb") as opened:
        raw = opened.read(_HEADER.size)
    broken = f"{index}: not the index of a token file"
    if len(raw) < _HEADER.size:
        raise DataError(f"{broken} ({len(raw)} bytes); run preprocess again with --overwrite")
    magic, version, code, count, documents = _HEADER.unpack(raw)
    if magic != _MAGIC or version != _VERSION or code not in _CODES:
        raise DataError(
            f"{broken} (begins with {raw[:18].hex()}); run preprocess again with --overwrite"
        )
    expected = _HEADER.size + 12 * count + 8 * documents
    if index.stat().st_size != expected:
        raise DataError(
            f"{index}: {index.stat().st_size} bytes, its header describes {expected}; "
            "run preprocess again with --overwrite"
        )
    return code, count
