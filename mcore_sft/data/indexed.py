"""Token files in Megatron's indexed format: PREFIX.bin holds the tokens, PREFIX.idx where they lie.

.idx = magic, version, dtype code, sequences S, document marks D, lengths int32 [S],
       byte offsets int64 [S], document marks int64 [D], modes int8 [S] (in some files, not read)
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
_CODES: dict[int, str] = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6, 7}
_INT32 = np.dtype(np.int32)


def token_type(vocab_size: int) -> np.dtype[np.int32] | np.dtype[np.uint16]:
    """Smallest type that Megatron's own tools would choose for such a vocabulary."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def running_sum(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Sums of the first 0, 1, 2, ... of `counts` [N]: where each begins and the last ends."""
    sums = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


def ranges(offsets: npt.NDArray[np.int64], which: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The numbers from offsets[i] to offsets[i + 1], for each i of `which`, end to end."""
    counts = offsets[which + 1] - offsets[which]
    before = np.cumsum(counts) - counts
    numbers: npt.NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(
        offsets[which] - before, counts
    )
    return numbers


def write_index(
    file: Path, lengths: npt.NDArray[np.int32], dtype: np.dtype[np.int32] | np.dtype[np.uint16]
) -> None:
    """Write the .idx of sequences of `lengths` [S] that lie one after another, a document each."""
    code = next(code for code, kind in _CODES.items() if np.dtype(kind) == dtype)
    with file.open("wb") as out:
        out.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
        lengths.astype("<i4", copy=False).tofile(out)
        offsets = running_sum(lengths)[:-1]
        offsets *= dtype.itemsize
        offsets.astype("<i8", copy=False).tofile(out)
        del offsets  # of a large dataset, one such array is enough at a time
        np.arange(len(lengths) + 1, dtype="<i8").tofile(out)


def begin_array(file: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Begin the .npy of an array; returns the byte that its values are to be written from."""
    told = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with file.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, told)
        return out.tell()


class IndexedTokens:
    """Sequences of tokens, memory-mapped: tokens[i] is the i-th, [length].

    lengths int32 [S] and offsets int64 [S], in bytes, of the sequences; documents int64 [D], where
    documents begin and the last ends, counted in sequences; values [all], the tokens end to end.
    """

    def __init__(
        self, prefix: Path, *, mend: str = "run preprocess again with --overwrite"
    ) -> None:
        """Map PREFIX.idx and PREFIX.bin; `DataError`, ending with `mend`, if they do not agree."""
        index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        code, count, marks = _read_header(index, mend)
        self.dtype = np.dtype(_CODES[code])
        # Plain arrays over the map: slices of np.memmap itself take many times as long.
        raw = np.asarray(np.memmap(index, dtype=np.uint8, mode="r"))
        cuts = np.cumsum([_HEADER.size, 4 * count, 8 * count, 8 * marks])
        self.lengths = raw[cuts[0] : cuts[1]].view("<i4")
        self.offsets = raw[cuts[1] : cuts[2]].view("<i8")
        self.documents = raw[cuts[2] : cuts[3]].view("<i8")
        expected = 0
        if count:
            expected = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if (size := tokens.stat().st_size) != expected:
            raise DataError(
                f"{tokens}: {size} bytes, but {index.name} describes {expected}; {mend}"
            )
        self.values = np.zeros(0, dtype=self.dtype)
        if size:  # an empty file cannot be mapped
            self.values = np.asarray(np.memmap(tokens, dtype=self.dtype, mode="r"))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        return self.take(np.array([index]))[0]

    def take(self, indices: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int32]]:
        """The sequences with these indices; what needs no conversion is not copied."""
        starts = self.offsets[indices] // self.dtype.itemsize
        ends = starts + self.lengths[indices]
        values, cuts = self.values, zip(starts.tolist(), ends.tolist(), strict=True)
        taken = [values[start:end] for start, end in cuts]
        return taken if self.dtype == _INT32 else [each.astype(_INT32) for each in taken]


def _read_header(index: Path, mend: str) -> tuple[int, int, int]:
    """Dtype code, number of sequences and of document marks; `DataError` if this is no index."""
    with index.open("rb") as opened:
        raw = opened.read(_HEADER.size)
    broken = f"{index}: not the index of a token file"
    if len(raw) < _HEADER.size:
        raise DataError(f"{broken} ({len(raw)} bytes); {mend}")
    magic, version, code, count, marks = _HEADER.unpack(raw)
    if magic == _MAGIC and version == _VERSION and code in _FLOATS:
        raise DataError(f"{index}: holds fractions (dtype code {code}), expected tokens; {mend}")
    if magic != _MAGIC or version != _VERSION or code not in _CODES:
        raise DataError(f"{broken} (begins with {raw[:18].hex()}); {mend}")
    size, expected = index.stat().st_size, _HEADER.size + 12 * count + 8 * marks
    if size not in (expected, expected + count):
        raise DataError(f"{index}: {size} bytes, its header describes {expected}; {mend}")
    return code, count, marks
