import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mcore_sft.base.errors import UserError
from mcore_sft.base.model_folder import INDEX, SINGLE
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.safetensors_folder import (
    SHARD_BYTES,
    SafetensorsFolder,
    write,
)

TENSORS = [("a", torch.arange(12.0).reshape(4, 3)), ("b", torch.ones(5)), ("c", torch.zeros(2))]


def write_all(
    folder: Path, dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS}
    cast = ((name, tensor.to(dtype)) for name, tensor in TENSORS)
    write(folder, shapes, cast, dtype, shard_bytes)


def test_slices_of_one_file(tmp_path: Path) -> None:
    write_all(tmp_path)
    folder = SafetensorsFolder(tmp_path)
    assert folder.read("a", 1, 3, slice(0, 2)).tolist() == [[3.0, 4.0], [6.0, 7.0]]
    assert folder.read("b", 0, 5).tolist() == [1.0] * 5
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_are_those_of_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    write_all(tmp_path, dtype)
    theirs = tmp_path / "theirs.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in TENSORS}, theirs, {"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == theirs.read_bytes()


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    last: list[weakref.ref[torch.Tensor]] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, _ in TENSORS:
            assert not any(ref() is not None for ref in last)
            made = torch.ones(4, 3)
            last[:] = [weakref.ref(made)]
            yield name, made
            del made

    write(tmp_path, {name: (4, 3) for name, _ in TENSORS}, tensors(), torch.float32)
    assert last[0]() is None


def test_several_files(tmp_path: Path) -> None:
    write_all(tmp_path, shard_bytes=48)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 76}
    assert index["weight_map"] == {"a": names[0], "b": names[1], "c": names[1]}
    folder = SafetensorsFolder(tmp_path)
    for name, tensor in TENSORS:
        assert torch.equal(folder.read(name, 0, tensor.shape[0]), tensor)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_all(tmp_path, shard_bytes=48)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: the index"):
        SafetensorsFolder(tmp_path).read("c", 0, 1)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    with pytest.raises(CheckpointError, match="no file holds the tensor d"):
        SafetensorsFolder(tmp_path).read("d", 0, 1)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        SafetensorsFolder(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        SafetensorsFolder(tmp_path)


def test_a_fingerprint_is_of_the_tensors_and_not_of_the_files(tmp_path: Path) -> None:
    for name, shard_bytes in (("one", SHARD_BYTES), ("many", 1)):
        (tmp_path / name).mkdir()
        write_all(tmp_path / name, shard_bytes=shard_bytes)
    (tmp_path / "other").mkdir()
    tensors = {name: tensor.clone() for name, tensor in TENSORS}
    tensors["a"][0, 0] += 1
    save_file(tensors, tmp_path / "other" / SINGLE)
    one, many, other = (
        SafetensorsFolder(tmp_path / name).fingerprint() for name in ("one", "many", "other")
    )
    assert one == many != other
