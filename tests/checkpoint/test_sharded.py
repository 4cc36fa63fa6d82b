import shutil
from pathlib import Path

import pytest

from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.export import export
from mcore_sft.checkpoint.sharded import MANIFEST, POINTER, read_manifest, steps, verify
from tests import runs


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that kept its two newest checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    changes = {"train__steps": 4, "checkpoint__every": 1, "checkpoint__keep": 2}
    runs.train(runs.experiment(folder, model, **changes))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def test_the_newest_are_kept_and_the_pointer_names_the_last(run: Path) -> None:
    assert [path.name for path in steps(run)] == ["step_4", "step_3"]
    assert (run / POINTER).read_text() == "step_4\n"
    assert verify(run / "step_4")["progress"]["step"] == 4
    assert not list(run.glob(".step*"))


def test_a_checkpoint_needs_nothing_beside_it(run: Path, tmp_path: Path) -> None:
    moved = shutil.move(run / "step_4", tmp_path / "elsewhere")
    export(Path(moved), tmp_path / "hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "mcore_sft.json"} <= names


def test_a_missing_shard_is_named_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    (run / "step_4" / "weights" / "__0_1.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_1\.distcp is missing"):
        export(run / "step_4", tmp_path / "hf")
    assert list(tmp_path.glob("*hf*")) == []


def test_a_flipped_bit_is_named(run: Path) -> None:
    file = run / "step_4" / "weights" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp does not have the checksum"):
        verify(run / "step_4")


def test_a_folder_without_a_manifest_is_no_checkpoint(run: Path) -> None:
    (run / "step_4" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_manifest(run / "step_4")


def test_folders_of_other_names_are_left_alone(run: Path) -> None:
    shutil.copytree(run / "step_4", run / "step_final")
    assert [path.name for path in steps(run)] == ["step_4", "step_3"]


def test_resume_passes_over_what_is_damaged_or_half_written(run: Path, model: Path) -> None:
    (run / "step_4" / "weights" / "__0_0.distcp").write_bytes(b"")
    (run / ".step_5.tmp" / "weights").mkdir(parents=True)
    before = runs.metrics(runs.experiment(run, model))
    after = runs.train(runs.experiment(run, model, train__steps=4))
    assert [line["step"] for line in after] == [1, 2, 3, 4]
    assert (run / "damaged_step_4").is_dir()
    assert verify(run / "step_4")["progress"]["step"] == 4
    assert after[3]["loss"] == before[3]["loss"]
    assert after[:3] == before[:3]


def test_export_does_not_overwrite(run: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="already there and not empty"):
        export(run / "step_4", tmp_path / "hf")
