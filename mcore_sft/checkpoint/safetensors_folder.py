"""The tensors of a Hugging Face folder, read in slices or written in shards.

*.safetensors (+ model.safetensors.index.json) <-> named tensors
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from mcore_sft.base.dtypes import BY_SAFETENSORS, DTYPES
from mcore_sft.base.model_folder import INDEX, SINGLE, open_weights, weight_files
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.runtime.device import dtype_name

SHARD_BYTES = 5 * 10**9
BLOCKS, BLOCK_BYTES = 16, 4096
_READERS = 16
"""Reads at a time: a network file system answers each after a while."""


class SafetensorsFolder:
    """Reads slices of the tensors in a folder; each file is opened once, when first needed.

    Raises `UserError` where a file is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._file_of = weight_files(folder)
        if not self._file_of:
            raise CheckpointError(
                f"{folder}: neither {SINGLE} nor {INDEX} is there; save the model as "
                "safetensors, as transformers' save_pretrained does"
            )
        self.ignores_index = SINGLE in self._file_of.values() and (folder / INDEX).exists()
        """Whether an index lies beside the single file, which alone is read."""

    def names(self) -> set[str]:
        """Every tensor that the folder holds."""
        return set(self._file_of)

    def shape(self, name: str) -> list[int]:
        """Shape of the tensor `name`."""
        return list(self._slice(name).get_shape())

    def read(self, name: str, start: int, stop: int, columns: slice | None = None) -> Tensor:
        """Rows [start, stop), and `columns` of them, of the tensor `name`."""
        piece = self._slice(name)
        rows: Tensor = piece[start:stop] if columns is None else piece[start:stop, columns]
        return rows

    def types(self, names: Iterable[str]) -> Counter[str]:
        """How many of the tensors `names` that are here are stored in each type (fp32, bf16, ...).

        Raises `UserError` if a file cannot be read, or a tensor is quantized.
        """
        found: Counter[str] = Counter()
        for name in sorted(self.names().intersection(names)):
            file, stored = self._file_of[name], self._slice(name).get_dtype()
            if stored not in BY_SAFETENSORS:
                raise CheckpointError(
                    f"{self.folder / file}: {name} is quantized (got {stored}, expected "
                    f"{', '.join(BY_SAFETENSORS)}). Fix: take the unquantized model (model.path)"
                )
            found[BY_SAFETENSORS[stored]] += 1
        return found

    def files(self) -> dict[str, Path]:
        """The files that hold the tensors, by their names in the folder."""
        return {name: self.folder / name for name in sorted(set(self._file_of.values()))}

    def fingerprint(self) -> str:
        """SHA-256 of the files' sizes, and of each tensor's name, type, shape and BLOCKS blocks.

        Cheap, and no proof: it reads 40 MB of 70 billion weights, in some 9,000 reads. Checkpoints
        of earlier versions record another one, of the first row of each tensor.
        """
        names = sorted(self.names())
        kinds = [f"{name} {self._slice(name).get_dtype()} {self.shape(name)} " for name in names]
        digest = hashlib.sha256()
        try:
            sizes = [path.stat().st_size for path in self.files().values()]
            digest.update(f"{sizes} ".encode())
            for kind, sample in zip(kinds, self._samples(names), strict=True):
                digest.update(kind.encode() + sample)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: the weights cannot be read ({error.strerror})"
            ) from None
        return digest.hexdigest()

    def _samples(self, names: Iterable[str]) -> Iterator[bytes]:
        """The blocks of each tensor; raises OSError."""
        with ExitStack() as stack:
            opened = {x: stack.enter_context(path.open("rb")) for x, path in self.files().items()}
            places = {x: dict(_places(file)) for x, file in opened.items()}
            where = ((name, self._file_of[name]) for name in names)
            jobs = [(opened[x].fileno(), name, places[x][name]) for name, x in where]
            readers = stack.enter_context(ThreadPoolExecutor(_READERS))
            yield from readers.map(lambda job: _sample(*job), jobs)

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: no file holds the tensor {name}")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = open_weights(self.folder / file)
        try:
            return self._open[file].get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.folder / file}: the index says that it holds {name}: {error}"
            ) from None


def blocks(name: str, size: int) -> list[tuple[int, int]]:
    """Where the blocks of a tensor of `size` bytes begin and end, the first and the last included.

    All of it is one block where it has no more bytes than they.
    """
    if size <= BLOCKS * BLOCK_BYTES:
        return [(0, size)]
    within = BLOCKS - 2
    drawn = hashlib.shake_256(f"{name} {size}".encode()).digest(8 * within)
    starts = [0]
    for number in range(within):
        # One in each of as many parts of equal size.
        first, last = (
            BLOCK_BYTES + (size - 2 * BLOCK_BYTES) * at // within for at in (number, number + 1)
        )
        random = int.from_bytes(drawn[8 * number : 8 * number + 8], "little")
        starts.append(first + random % (last - first - BLOCK_BYTES + 1))
    starts.append(size - BLOCK_BYTES)
    return [(start, start + BLOCK_BYTES) for start in starts]


def _sample(handle: int, name: str, place: tuple[int, int]) -> bytes:
    start, stop = place
    within = blocks(name, stop - start)
    return b"".join(os.pread(handle, last - first, start + first) for first, last in within)


def _places(file: BinaryIO) -> Iterator[tuple[str, tuple[int, int]]]:
    """Where in a safetensors file the bytes of each tensor begin and end."""
    size = int.from_bytes(file.read(8), "little")
    for name, entry in json.loads(file.read(size)).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield name, (8 + size + start, 8 + size + stop)


def write(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors`, of `shapes` and in their order, into files of up to `shard_bytes` each.

    The shapes say beforehand where each tensor lies, so that but one is held at a time.
    """
    bytes_of = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    parts = _cut(bytes_of, shard_bytes)
    files = [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [SINGLE]
    coming = iter(tensors)
    for path, names in zip(files, parts, strict=True):
        with (folder / path).open("wb") as file:
            file.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                file.write(_bytes(*next(coming), expected=(name, shapes[name], dtype)))
    if len(parts) > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {
            "metadata": {"total_size": sum(bytes_of.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cut(bytes_of: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in turn, in parts of no more than `limit` bytes but where one alone has more."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, more in bytes_of.items():
        if parts[-1] and size + more > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += more
    return parts


def _bytes(name: str, tensor: Tensor, expected: tuple[Any, ...]) -> memoryview:
    assert (name, tuple(tensor.shape), tensor.dtype) == expected
    return tensor.contiguous().view(torch.uint8).numpy().data


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """How a safetensors file begins: the size of a JSON table, and the table."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stored = DTYPES[dtype_name(dtype)].safetensors
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": stored, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers that follow are aligned
    return len(text).to_bytes(8, "little") + text
