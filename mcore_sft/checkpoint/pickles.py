"""What the pickles of a checkpoint may name: whoever reads a pickle runs what it names.

Torch, Megatron-core and Transformer Engine unpickle these without asking, so each is read here
before any of them opens it:

    weights/.metadata        where each tensor lies
    weights/common.pt        what is no tensor, as Megatron-core 0.16.1 keeps it
    bytes in the .distcp     what is no tensor, as 0.19 keeps it, and the scales of 8-bit products,
                             which Transformer Engine pickles once more

Tensors themselves are read by torch with weights_only=True, and everything else is JSON or YAML.
"""

import enum
import functools
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Container, Mapping
from pathlib import Path, PosixPath
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.manifest import reading

Names = Mapping[tuple[str, str], Any]
"""(module, name) -> what a pickle gets for it."""

_TRUST = "Fix: use a checkpoint from a source that you trust"


def read_metadata(path: Path, files: Container[str]) -> Metadata:
    """Return what lies where in the checkpoint at `path`, whose manifest names `files`.

    Raises `CheckpointError` if its pickle names anything that does not belong there, or it leads
    to a file that the manifest does not name.
    """
    file = path / "weights" / ".metadata"
    with reading(path):
        content = file.read_bytes()
    found = _unpickled(content, _METADATA, file)
    if not isinstance(found, Metadata) or not _leads_somewhere(found.storage_data):
        raise CheckpointError(f"{file}: does not say where the tensors lie. {_TRUST}")
    for place in found.storage_data.values():
        if f"weights/{place.relative_path}" not in files or place.transform_descriptors:
            raise CheckpointError(
                f"{file}: leads to {place.relative_path!r}, which is no file of the manifest. "
                f"{_TRUST}"
            )
    return found


def _leads_somewhere(places: Any) -> bool:
    return isinstance(places, dict) and all(
        isinstance(index, MetadataIndex) and isinstance(place, filesystem._StorageInfo)
        for index, place in places.items()
    )


def check(path: Path, files: Container[str]) -> None:
    """Raise `CheckpointError` unless all that loading unpickles is harmless."""
    found = read_metadata(path, files)
    weights = path / "weights"
    with reading(path):
        if (weights / "common.pt").exists():
            _check_saved((weights / "common.pt").read_bytes(), weights / "common.pt")
        for index, place in found.storage_data.items():
            if isinstance(found.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                with (weights / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    _check_saved(file.read(place.length), weights / place.relative_path)


def _check_saved(content: bytes, file: Path) -> None:
    """Raise unless torch.load gives tensors and plain values, and what they hold is harmless."""
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise _refused(file, asked[1]) from None
        raise CheckpointError(
            f"{file}: holds more than tensors and plain values ({str(error).splitlines()[0]}). "
            f"{_TRUST}"
        ) from None
    _check_held(found, file)


def _check_held(found: Any, file: Path) -> None:
    """Raise unless the pickles in the tensors of bytes within `found` are harmless."""
    if isinstance(found, Mapping):
        _check_held(list(found.values()), file)
    elif isinstance(found, list | tuple):
        for value in found:
            _check_held(value, file)
    elif isinstance(found, io.BytesIO):
        _check_saved(found.getvalue(), file)
    elif isinstance(found, torch.Tensor) and found.dtype == torch.uint8 and found.numel():
        nested = functools.partial(_check_saved, file=file)
        names = {**_SCALES, **dict.fromkeys(_STORAGES, nested)}
        _unpickled(found.numpy().tobytes(), names, file)


_STORAGES = (
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),  # what 0.19 puts in its place
)
"""Under which names a pickle holds the bytes of a tensor, saved once more."""


def _unpickled(content: bytes, names: Names, file: Path) -> Any:
    try:
        return _Unpickler(content, names, file).load()
    except CheckpointError:
        raise
    except Exception as error:  # a pickle that was made to fail may raise anything
        raise CheckpointError(f"{file}: broken ({error!r}). {_TRUST}") from None


def _refused(file: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: its pickle asks for {name}, which no checkpoint needs and which could run code. "
        f"{_TRUST}"
    )


class _Unpickler(pickle.Unpickler):
    """Gives a pickle what is listed by exactly the name that it asks for, and nothing else."""

    def __init__(self, content: bytes, names: Names, file: Path) -> None:
        super().__init__(io.BytesIO(content))
        self._names = names
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """What is listed, or a `CheckpointError`."""
        if (module, name) in self._names:
            return self._names[module, name]
        raise _refused(self._file, f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        """There is nothing outside of the pickle."""
        raise CheckpointError(f"{self._file}: its pickle asks for {pid!r}. {_TRUST}")


class _Inert:
    """Stands for an object that is only looked at by its name."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


def _member(kind: Any, name: str) -> Any:
    """What some versions of Python write for a member of an enumeration: getattr(kind, name)."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind[name]
    if kind is _Inert:
        return _Inert()
    raise pickle.UnpicklingError(f"it asks for {name} of {kind!r}")


_PLAIN: Names = {
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "getattr"): _member,
    ("builtins", "set"): set,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
}

_METADATA: Names = {
    **_PLAIN,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                metadata,
                (
                    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
                    *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
                    "_MEM_FORMAT_ENCODING",
                ),
            ),
            (
                planner,
                (
                    *("SavePlan", "WriteItem", "WriteItemType"),
                    *("TensorWriteData", "BytesIOWriteData"),
                ),
            ),
            (filesystem, ("_StorageInfo", "_StoragePrefix")),
        )
        for name in names
    },
}
"""Found in what Megatron-core 0.16.1 and 0.19.2 write with torch 2.11 to 2.13."""

_SCALES: Names = {
    **_PLAIN,
    ("_codecs", "encode"): _Inert,
    ("torch._utils", "_rebuild_tensor_v2"): _Inert,
    ("torch._tensor", "_rebuild_from_type_v2"): _Inert,
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"): _Inert,
    **{
        ("transformer_engine.common.recipe", name): _Inert
        for name in (
            *("Recipe", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"),
            *("MXFP8BlockScaling", "NVFP4BlockScaling", "Format", "_FormatHelper"),
            *("MMParams", "QParams"),
        )
    },
}
