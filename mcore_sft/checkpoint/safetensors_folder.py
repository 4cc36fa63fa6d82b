"""The tensors of a Hugging Face folder, read in slices or written in shards.

*.safetensors (+ model.safetensors.index.json) <-> named tensors
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcore_sft.checkpoint.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9


class SafetensorsFolder:
    """Reads slices of the tensors in a folder; each file is opened once, when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._file_of = self._index()

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

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: no file holds the tensor {name}")
        file = self._file_of[name]
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(
                    f"{path}: the index names this file, but it is missing; copy the model again"
                ) from None
            except SafetensorError as error:
                raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
        try:
            return self._open[file].get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.folder / file}: the index says that it holds {name}: {error}"
            ) from None

    def _index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.exists():
            try:
                files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{index}: not a readable index: {error!r}") from None
            return files
        single = self.folder / SINGLE
        if not single.exists():
            raise CheckpointError(f"{self.folder}: neither {SINGLE} nor {INDEX} is there")
        try:
            self._open[SINGLE] = safe_open(single, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{single}: not a readable safetensors file: {error}") from None
        return dict.fromkeys(self._open[SINGLE].keys(), SINGLE)


def write(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors` into `folder`, holding no more than about `shard_bytes` at a time."""
    parts: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"part-{len(parts)}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes it readable to its owner alone
        parts.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    _name(folder, parts, total)


def _name(folder: Path, parts: list[tuple[Path, list[str]]], total: int) -> None:
    """Give the parts the names that transformers expects, now that their number is known."""
    if len(parts) == 1:
        parts[0][0].rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(parts, start=1):
        final = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
