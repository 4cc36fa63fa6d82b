from pathlib import Path

import pytest
import torch

from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.safetensors_folder import INDEX, SafetensorsFolder, write

TENSORS = [("a", torch.arange(12.0).reshape(4, 3)), ("b", torch.ones(5)), ("c", torch.zeros(2))]


def test_slices_of_one_file(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    folder = SafetensorsFolder(tmp_path)
    assert folder.read("a", 1, 3, slice(0, 2)).tolist() == [[3.0, 4.0], [6.0, 7.0]]
    assert folder.read("b", 0, 5).tolist() == [1.0] * 5
    assert not (tmp_path / INDEX).exists()


def test_several_files(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, shard_bytes=48)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder = SafetensorsFolder(tmp_path)
    for name, tensor in TENSORS:
        assert torch.equal(folder.read(name, 0, tensor.shape[0]), tensor)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, shard_bytes=48)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: the index"):
        SafetensorsFolder(tmp_path).read("c", 0, 1)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    with pytest.raises(CheckpointError, match="no file holds the tensor d"):
        SafetensorsFolder(tmp_path).read("d", 0, 1)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        SafetensorsFolder(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        SafetensorsFolder(tmp_path)
