import itertools
import json
import os
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
    BLOCK_BYTES,
    SHARD_BYTES,
    SafetensorsFolder,
    blocks,
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


def fingerprint(folder: Path, **tensors: torch.Tensor) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / SINGLE)
    return SafetensorsFolder(folder).fingerprint()


def test_a_fingerprint_is_of_names_types_shapes_numbers_and_sizes_of_files(tmp_path: Path) -> None:
    small, large = torch.arange(12.0).reshape(4, 3), torch.arange(200_000.0)
    first, last = large.clone(), large.clone()
    first[0], last[-1] = 7, 7
    found = [
        fingerprint(tmp_path / "0", a=small, b=large),
        fingerprint(tmp_path / "1", a=small, c=large),
        fingerprint(tmp_path / "2", a=small.int(), b=large),
        fingerprint(tmp_path / "3", a=small.reshape(3, 4), b=large),
        fingerprint(tmp_path / "4", a=small, b=first),
        fingerprint(tmp_path / "5", a=small, b=last),
        fingerprint(tmp_path / "6", a=small + 1, b=large),
    ]
    (tmp_path / "7").mkdir()
    save_file({"a": small, "b": large}, tmp_path / "7" / SINGLE, {"format": "longer" * 9})
    found.append(SafetensorsFolder(tmp_path / "7").fingerprint())
    assert len(set(found)) == len(found)
    assert fingerprint(tmp_path / "copy", a=small, b=large) == found[0]


def test_a_fingerprint_finds_each_tensor_in_the_file_that_the_index_names(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_all(tmp_path / name, shard_bytes=48)
    part = tmp_path / "other" / "model-00002-of-00002.safetensors"
    tensors = {"a": torch.zeros(4, 3), "b": torch.ones(5), "c": torch.zeros(2)}
    save_file(tensors, part)  # its own "a" is not read
    before = SafetensorsFolder(tmp_path / "other").fingerprint()
    save_file(tensors | {"a": torch.ones(4, 3)}, part)
    assert SafetensorsFolder(tmp_path / "other").fingerprint() == before
    save_file(tensors | {"c": torch.ones(2)}, part)
    assert SafetensorsFolder(tmp_path / "other").fingerprint() != before
    assert before != SafetensorsFolder(tmp_path / "one").fingerprint()


@pytest.mark.parametrize("size", [0, 10, 16 * BLOCK_BYTES])
def test_a_small_tensor_is_read_whole(size: int) -> None:
    assert blocks("a", size) == [(0, size)]


@pytest.mark.parametrize("size", [16 * BLOCK_BYTES + 1, 10**6, 2**31 + 7])
def test_of_a_large_tensor_sixteen_blocks_are_read_from_all_over_it(size: int) -> None:
    found = blocks("a", size)
    assert [last - first for first, last in found] == [BLOCK_BYTES] * 16
    assert found[0][0] == 0
    assert found[-1][1] == size
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(found)]
    assert all(0 <= gap <= size / 7 for gap in gaps)
    assert found != blocks("b", size)
    assert found == blocks("a", size)


def test_a_fingerprint_reads_no_more_than_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, pread = [], os.pread

    def counted(handle: int, size: int, start: int) -> bytes:
        read.append(size)
        return pread(handle, size, start)

    monkeypatch.setattr(os, "pread", counted)
    fingerprint(tmp_path / "x", a=torch.zeros(10**6), b=torch.zeros(10**6), c=torch.zeros(9))
    assert sorted(read) == [36] + [BLOCK_BYTES] * 32
