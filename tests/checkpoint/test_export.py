import hashlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

from mcore_sft.checkpoint import export as exporting
from mcore_sft.checkpoint import pickles, safetensors_folder, sharded
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.export import export
from mcore_sft.checkpoint.sharded import Checkpoints, Progress
from mcore_sft.config import CheckpointConfig, ParallelConfig
from mcore_sft.model import families
from tests import tiny
from tests.runs import loaded, on_layout


def save(
    base: Path, run: Path, step: int, layout: str = "one", precision: str = "bf16", **fixed: str
) -> Path:
    """A checkpoint of `run` that holds the weights of `base`."""
    on_layout(layout, _save, base, run, Progress(step=step, fixed=fixed), precision)
    return run / f"step_{step}"


def _save(
    parallel: ParallelConfig, base: Path, run: Path, progress: Progress, precision: str
) -> None:
    def describe(path: Path) -> None:
        shutil.copytree(base, path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        (path / "model" / "mcore_sft.json").write_text('{"name": "a run"}')

    with loaded(base, parallel, precision) as here:
        checkpoints = Checkpoints(
            run, CheckpointConfig(), model=here.model, optimizer=here.optimizer, mesh=here.mesh
        )
        checkpoints.save(progress, describe)
        checkpoints.wait()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two steps of a run, with as many rows of padding as their layouts need."""
    folder = tmp_path_factory.mktemp("average")
    bases = [tiny.make_model(folder / f"base_{seed}", seed=seed) for seed in (1, 2)]
    for base in bases:
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    saved = zip(bases, (10, 20), ("one", "tp2_sp"), strict=True)
    return [save(base, folder / "run", step, layout) for base, step, layout in saved]


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("dtype", "stored"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_the_mean_of_two_steps(
    two_steps: list[Path], tmp_path: Path, dtype: str | None, stored: torch.dtype
) -> None:
    first, second = two_steps
    export(first, tmp_path / "hf", others=[second], dtype=dtype)
    mean = read(tmp_path / "hf")
    bases = [read(first.parents[1] / f"base_{seed}") for seed in (1, 2)]
    assert mean.keys() == bases[0].keys()
    for name, tensor in mean.items():
        exact = (bases[0][name].double() + bases[1][name].double()) / 2
        assert torch.equal(tensor, exact.to(stored)), name
    record = json.loads((tmp_path / "hf" / "mcore_sft.json").read_text())
    assert record["name"] == "a run"
    manifests = [(path / "manifest.json").read_bytes() for path in two_steps]
    assert record["checkpoints"] == [
        {"step": step, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
        for step, manifest in zip((10, 20), manifests, strict=True)
    ]


def test_the_mean_of_fp32_is_made_in_fp64(tmp_path: Path) -> None:
    bases = [tiny.make_model(tmp_path / f"{seed}", seed=seed) for seed in (1, 2, 3)]
    saved = [
        save(base, tmp_path / "run", step, precision="fp32") for step, base in enumerate(bases)
    ]
    export(saved[0], tmp_path / "hf", others=saved[1:])
    tensors = [read(base) for base in bases]
    for name, tensor in read(tmp_path / "hf").items():
        exact = sum((one[name].double() for one in tensors), torch.zeros(())) / 3
        assert torch.equal(tensor, exact.float()), name


def test_checkpoints_of_another_run_are_refused(two_steps: list[Path], tmp_path: Path) -> None:
    first, second = two_steps
    base = first.parents[1] / "base_1"
    other = save(base, tmp_path / "seed", 30, dataset="another")
    with pytest.raises(CheckpointError, match="not of one run: they differ in dataset; average"):
        export(first, tmp_path / "hf", others=[second, other])
    other = save(base, tmp_path / "base", 30, **{"base weights": "others"})
    with pytest.raises(CheckpointError, match="not of one run: they differ in base weights"):
        export(first, tmp_path / "hf", others=[other])
    qwen = tiny.make_model(tmp_path / "qwen", family="qwen3")
    other = save(qwen, tmp_path / "family", 30)
    with pytest.raises(CheckpointError, match=r"they differ in model/config\.json"):
        export(first, tmp_path / "hf", others=[other])
    with pytest.raises(CheckpointError, match="step 20 is named twice"):
        export(first, tmp_path / "hf", others=[second, second])
    assert not list(tmp_path.glob("*hf*"))


def test_every_checkpoint_is_verified(two_steps: list[Path], tmp_path: Path) -> None:
    first, second = two_steps
    damaged = shutil.copytree(second, tmp_path / "step_20")
    file = damaged / "weights" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp does not have the checksum"):
        export(first, tmp_path / "hf", others=[damaged])
    assert not list(tmp_path.glob("*hf*"))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_stored_as_asked(two_steps: list[Path], tmp_path: Path, dtype: str) -> None:
    export(two_steps[0], tmp_path / "hf", dtype=dtype)
    trained = read(two_steps[0].parents[1] / "base_1")
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, tensor in read(tmp_path / "hf").items():
        assert torch.equal(tensor, trained[name].to(wanted)), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == wanted


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.model.norm.weight.data[3] = 1e5
    model.save_pretrained(base)
    step = save(base, tmp_path / "run", 1)
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight holds numbers up to 99840, and"
    ):
        export(step, tmp_path / "hf", dtype="fp16")
    assert not (tmp_path / "hf").exists()


def test_a_disk_that_is_full_is_said_and_nothing_stays(
    two_steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str, tensor: Tensor, expected: tuple[Any, ...]) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_folder, "_bytes", full)
    with pytest.raises(CheckpointError, match=r"hf: could not be written \(.*No space left .*room"):
        export(two_steps[0], tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_no_more_is_held_than_the_largest_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.make_model(tmp_path / "base", num_hidden_layers=8, vocab_size=64)
    steps = [save(base, tmp_path / "run", step, precision="fp32") for step in (1, 2)]
    alive = Alive()
    read_of, cast = sharded.whole_tensors, exporting._cast
    monkeypatch.setattr(sharded, "whole_tensors", lambda path: alive.each(read_of(path)))
    monkeypatch.setattr(exporting, "_cast", lambda *args: alive.second(cast(*args)))
    export(steps[0], tmp_path / "hf", others=steps[1:], dtype="bf16")
    shapes = families.read(base).shapes().values()
    largest = 4 * max(int(torch.Size(shape).numel()) for shape in shapes)
    # Gate and up projection are one tensor, and are read of one checkpoint after the other.
    assert alive.most <= 2 * 2 * largest
    assert alive.all > 20 * alive.most


def test_what_lies_where_is_read_once(
    two_steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    read = pickles.read_metadata

    def counted(path: Path, files: Any) -> Any:
        asked.append(path)
        return read(path, files)

    monkeypatch.setattr(pickles, "read_metadata", counted)
    monkeypatch.setattr(FileSystemReader, "read_metadata", None)  # which would unpickle it
    export(two_steps[0], tmp_path / "hf", others=two_steps[1:])
    assert asked == two_steps


class Alive:
    """Counts the bytes of the tensors that it is shown, while they are there."""

    def __init__(self) -> None:
        self.now = self.most = self.all = 0

    def each(self, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        return lambda key: self.seen(read(key))

    def second(self, pair: tuple[str, Tensor]) -> tuple[str, Tensor]:
        return pair[0], self.seen(pair[1])

    def seen(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.now += size
        self.all += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.now -= size
