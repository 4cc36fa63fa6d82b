import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_sft.base import files
from mcore_sft.checkpoint import manifest, retention, sharded, writer
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.export import export
from mcore_sft.checkpoint.manifest import MANIFEST, read_manifest, verify
from mcore_sft.checkpoint.retention import steps, superfluous
from mcore_sft.checkpoint.sharded import POINTER, Checkpoints, Progress
from mcore_sft.config import CheckpointConfig, OptimizerConfig, ParallelConfig, RunConfig
from mcore_sft.training import loop
from mcore_sft.training.beside.metrics import FILE as METRICS
from mcore_sft.training.step import train_step
from tests import runs, tiny
from tests.distributed import run_ranks


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
    shard = max((run / "step_4" / "weights").glob("__0_*.distcp"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing"):
        export(run / "step_4", tmp_path / "hf")
    assert list(tmp_path.glob("*hf*")) == []


def test_a_bit_flipped_in_any_file_is_named(run: Path) -> None:
    whole = run / "step_4"
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    assert {"manifest.json", "config.yaml", "config.json", ".metadata"} <= {x.name for x in files}
    for file in files:
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 8)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(CheckpointError, match=re.escape(file.name)):
                verify(whole)
        file.write_bytes(content)
    verify(whole)


@pytest.mark.parametrize(
    ("written", "refusal"),
    [
        ("[]", "broken"),
        ("{}", "broken"),
        ("{", "broken"),
        ('{"format": 2}', "checkpoint format 2, expected 3: go on with the version that wrote it"),
        ('{"format": 3, "files": {}}', "is not as it was written; use another"),
    ],
)
def test_a_manifest_that_was_not_written_here_is_refused(
    tmp_path: Path, written: str, refusal: str
) -> None:
    (tmp_path / MANIFEST).write_text(written)
    with pytest.raises(CheckpointError, match=refusal):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_no_checkpoint(run: Path) -> None:
    (run / "step_4" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_manifest(run / "step_4")


def test_what_cannot_be_read_is_named(run: Path) -> None:
    file = run / "step_4" / "config.yaml"
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(CheckpointError, match=r"config\.yaml: cannot be read \(Too many levels"):
        verify(run / "step_4")
    (run / "step_4" / MANIFEST).unlink()
    (run / "step_4" / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read \(Is a directory"):
        verify(run / "step_4")


def _step_3_alone(parallel: ParallelConfig, model: Path, folder: Path) -> int | None:
    """Restore where every machine but the first does not see step_4 yet."""
    with runs.loaded(model, parallel) as here:
        if not here.mesh.is_main:
            found = [path for path in steps(folder) if path.name != "step_4"]
            sharded.steps = lambda folder: found
        made = Checkpoints(
            folder, CheckpointConfig(), model=here.model, optimizer=here.optimizer, mesh=here.mesh
        )
        progress = made.restore_latest({})
        return progress and progress.step


def test_all_ranks_restore_what_the_first_sees(model: Path, run: Path) -> None:
    assert runs.on_layout("dp2", _step_3_alone, model, run) == [4, 4]


def _seen_by(
    parallel: ParallelConfig, model: Path, folder: Path, blind: tuple[int, ...], looks: int
) -> tuple[str, str]:
    """Restore where some ranks miss files of step_4 at so many looks: the error, or the step."""
    with runs.loaded(model, parallel) as here:
        mesh, left = replace(here.mesh, hosts=("node0", "node1")), [looks]
        difference = manifest._difference

        def blinded(path: Path, expected: Any) -> str | None:
            if path.match("step_4/*/*") and mesh.world.rank in blind and left[0]:
                left[0] -= 1
                return f"{path.name} is missing"
            return difference(path, expected)

        manifest._difference = blinded
        made = Checkpoints(
            folder, CheckpointConfig(), model=here.model, optimizer=here.optimizer, mesh=mesh
        )
        try:
            progress = made.restore_latest({})
        except CheckpointError as error:
            return type(error).__name__, str(error)
        return "", str(progress and progress.step)


@pytest.mark.parametrize("blind", [0, 1])
def test_a_file_that_one_rank_sees_and_another_misses_is_no_damage(
    model: Path, run: Path, blind: int
) -> None:
    """Whichever of the two it is: what was whole is neither set aside nor passed over."""
    before = sorted(path.name for path in run.iterdir())
    first, second = runs.on_layout("dp2", _seen_by, model, run, (blind,), 1000)
    assert first == second
    assert first[0] == "CheckpointError"
    sees, misses = (rf"rank {rank} \(node{rank}\)" for rank in (1 - blind, blind))
    said = rf"{run}/step_4/\S+: {sees} sees it as it was written, and {misses} does not \(\S+ is m"
    assert re.match(said, first[1])
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_file_that_all_ranks_miss_is_damage(model: Path, run: Path) -> None:
    told = runs.on_layout("dp2", _seen_by, model, run, (0, 1), 1000)
    assert told == [("", "3")] * 2
    assert (run / "damaged_step_4").is_dir()


def test_a_file_that_a_rank_sees_at_a_second_look_is_no_damage(model: Path, run: Path) -> None:
    assert runs.on_layout("dp2", _seen_by, model, run, (0, 1), 2) == [("", "4")] * 2
    assert (run / "step_4").is_dir()


def _unshared(parallel: ParallelConfig, model: Path, folder: Path, change: str) -> str:
    """Save step_1, then step_2, of which rank 0 does not see what rank 1 has written."""
    with runs.loaded(model, parallel) as here:
        mesh = replace(here.mesh, hosts=("node0", "node1"))
        made = Checkpoints(
            folder, CheckpointConfig(keep=1), model=here.model, optimizer=here.optimizer, mesh=mesh
        )
        made.save(Progress(step=1), describe)
        made.wait()
        small = sharded._small_files

        def changed(*arguments: Any) -> Any:
            files = small(*arguments)
            share = folder / ".step_2.tmp" / "weights" / "__1_0.distcp"
            if change == "missing":
                share.unlink()
            elif change == "short":
                os.truncate(share, 100)
            else:
                hidden = share.rename(folder / "hidden")
                threading.Timer(1, hidden.rename, [share]).start()
            return files

        sharded._small_files = changed
        made.save(Progress(step=2), describe)
        try:
            made.wait()
        except CheckpointError as error:
            return str(error)
        return ""


@pytest.mark.parametrize(
    ("change", "got"), [("missing", "No such file or directory"), ("short", "100 bytes")]
)
def test_a_step_that_the_first_rank_does_not_see_whole_gets_no_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, got: str
) -> None:
    monkeypatch.setattr(manifest, "SECONDS_TO_APPEAR", 0)
    run = tmp_path / "run"
    first, second = runs.on_layout("tp2", _unshared, model, run, change)
    share = run / ".step_2.tmp" / "weights" / "__1_0.distcp"
    said = f"{share}: rank 0 (node0) does not see what rank 1 (node1) wrote (got {got}, expected "
    assert first == second
    assert first.startswith(said)
    assert f"Fix: let all machines share {run}" in first
    assert sorted(path.name for path in run.iterdir()) == [".step_2.tmp", "latest", "step_1"]
    assert not (run / ".step_2.tmp" / MANIFEST).exists()
    assert (run / POINTER).read_text() == "step_1\n"
    verify(run / "step_1")


def test_a_file_that_the_first_rank_sees_later_is_waited_for(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.on_layout("tp2", _unshared, model, run, "late") == ["", ""]
    assert verify(run / "step_2")["progress"]["step"] == 2
    assert [path.name for path in steps(run)] == ["step_2"]


def test_a_step_that_goes_loses_its_name_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is killed meanwhile leaves no step that is not whole."""
    none: Any = None
    made = Checkpoints(run, CheckpointConfig(keep=1), model=none, optimizer=none, mesh=none)
    monkeypatch.setattr(retention, "discard", lambda path: None)
    made._prune()
    assert [path.name for path in steps(run)] == ["step_4"]
    assert (run / ".step_3.tmp" / MANIFEST).exists()


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


SCORES = {1: 0.9, 2: 0.5, 3: None, 4: 0.5, 5: 0.8, 6: 0.7}


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"keep_every": 2}, [1, 2, 3, 4, 5, 6]),
        ({"keep": 1}, [6]),
        ({"keep": 2}, [5, 6]),
        ({"best": 1}, [4, 6]),  # the newer of two that are as good
        ({"best": 2}, [2, 4, 6]),
        ({"best": 3}, [2, 4, 6]),
        ({"best": 4, "keep": 2}, [2, 4, 5, 6]),
        ({"best": 9}, [1, 2, 4, 5, 6]),  # without a score, none is among the best
        ({"best": 1, "keep": 1, "keep_every": 3}, [3, 4, 6]),
        ({"best": 1, "metric": "accuracy"}, [1, 6]),
        ({"best": 5, "metric": "accuracy"}, [1, 2, 4, 5, 6]),
    ],
)
def test_what_stays(settings: dict[str, int], stay: list[int]) -> None:
    gone = superfluous(SCORES, CheckpointConfig(**settings))
    assert sorted(SCORES.keys() - set(gone)) == stay


def test_the_best_and_those_to_average_are_kept(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = runs.experiment(
        tmp_path / "run",
        model,
        data__validation=[{"path": "rows.jsonl", "limit": 5}],
        data__packed=str(tmp_path / "packed"),
        train__validate_every=1,
        train__steps=6,
        optimizer__lr=0.5,  # the loss rises, so that the best are not the newest
        checkpoint={"every": 1, "best": 2, "keep_every": 4},
    )
    runs.pack_rows(config)
    lines = runs.train(config)
    losses = {x["step"]: x["validation_loss"] for x in lines if "validation_loss" in x}
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert best != [6, 5]
    said = f"the best is {config.folder}/step_{best[0]} (validation_loss {losses[best[0]]:.4f})\n"
    assert capfd.readouterr().err.endswith(said)
    assert {path.name for path in steps(config.folder)} == {f"step_{n}" for n in (*best, 4, 6)}
    for path in steps(config.folder):
        step = int(path.name.removeprefix("step_"))
        assert verify(path)["scores"] == {"validation_loss": losses[step]}


def describe(folder: Path) -> None:
    (folder / "model").mkdir()


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_training_goes_on_while_a_step_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """What changes after save() is not in the checkpoint, and step_1 has no name till written."""
    write = writer._write
    release = tmp_path / "release"

    def waiting(*arguments: Any) -> Any:
        while not release.exists():
            time.sleep(0.01)
        return write(*arguments)

    monkeypatch.setattr(writer, "_write", waiting)
    told = runs.on_layout(layout, _save_and_change, model, tmp_path / "run", release)
    assert told == [(True, True, True)] * len(told)
    assert verify(tmp_path / "run" / "step_1")["progress"]["step"] == 1


def _save_and_change(
    parallel: ParallelConfig, model: Path, folder: Path, release: Path
) -> tuple[bool, bool, bool]:
    with runs.loaded(model, parallel) as here:
        made = Checkpoints(
            folder, CheckpointConfig(), model=here.model, optimizer=here.optimizer, mesh=here.mesh
        )
        batches = [tiny.make_batch([20, 30], length=64)]
        train_step(here.model, here.optimizer, batches, here.mesh, OptimizerConfig(), 1e-2)
        before = _state(here)
        made.save(Progress(step=1), describe)
        train_step(here.model, here.optimizer, batches, here.mesh, OptimizerConfig(), 1e-2)
        assert not any(torch.equal(before[name], x) for name, x in _state(here).items())
        unnamed = made.is_writing and not (folder / "step_1").exists()
        assert made._pending is not None
        assert made._pending.writer.goes_on()
        end = time.monotonic() + 10
        while made.is_writing and made._pending.writer.goes_on():  # it waits, and no longer does
            assert time.monotonic() < end
            time.sleep(0.05)
        for number in (signal.SIGTERM, signal.SIGUSR1):  # Slurm tells every process
            os.kill(made._pending.writer._process.pid, number)
        here.mesh.barrier()
        release.touch()
        named = made.wait() == folder / "step_1"
        made.restore_latest({})
        after = _state(here)
        return unnamed, named, all(torch.equal(before[name], x) for name, x in after.items())


def _state(here: runs.Loaded) -> dict[str, Tensor]:
    """The weights and the first moments."""
    found = {name: weight.detach().clone() for name, weight in here.gpt.named_parameters()}
    states = here.optimizer.optimizer.state.values()
    return found | {str(place): x["exp_avg"].clone() for place, x in enumerate(states)}


def _dies_while_it_saves(config: RunConfig, module: Any, name: str) -> None:
    """The run ends where the second save, or its writer, calls `module.name`."""
    called, run = getattr(module, name), os.getpid()

    def dies(*arguments: Any, **keywords: Any) -> Any:
        if steps(config.folder):
            os.kill(run, signal.SIGKILL)
            time.sleep(10)
        return called(*arguments, **keywords)

    setattr(module, name, dies)
    loop.train(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (sharded.megatron_core, "save_async"),
        (writer, "_write"),
        (writer, "digest"),
        (sharded, "_small_files"),
        (files, "write"),
        (files, "rename"),
        (files, "replace"),
        (Path, "rename"),
        (shutil, "rmtree"),
        (os, "rmdir"),  # the files of a pruned step are gone, the folder is not
    ],
)
def test_a_run_that_is_killed_while_it_saves_goes_on(
    model: Path, tmp_path: Path, module: Any, name: str
) -> None:
    changes = {"train__steps": 6, "checkpoint__every": 2, "checkpoint__keep": 1}
    whole = runs.experiment(tmp_path / "whole", model, **changes)
    runs.train(whole)
    killed = runs.experiment(tmp_path / "killed", model, **changes)
    with pytest.raises(AssertionError, match="died, exit code -9"):
        run_ranks(1, _dies_while_it_saves, killed, module, name)
    for path in steps(killed.folder):
        assert path.name in ("step_2", "step_4")
        verify(path)
    runs.train(killed)
    assert [path.name for path in killed.folder.glob("*step_*")] == ["step_6"]
    told = [[line["loss"] for line in runs.metrics(config)] for config in (whole, killed)]
    assert told[0] == told[1]
    files = [verify(config.folder / "step_6")["files"] for config in (whole, killed)]
    shares = [{k: v for k, v in x.items() if k.endswith(".distcp")} for x in files]
    assert shares[0] == shares[1]


@pytest.mark.parametrize(
    ("room", "name"), [(sharded, "_small_files"), (files, "write")], ids=["sums", "manifest"]
)
def test_a_disk_that_is_full_at_the_end_of_a_save_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: Any, name: str
) -> None:
    as_it_is = getattr(room, name)

    def full(path: Path, *arguments: Any) -> Any:
        if "metrics.jsonl" in path.name:
            return as_it_is(path, *arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, name, full)
    config = runs.experiment(tmp_path / "run", model, train__steps=1)
    with pytest.raises(AssertionError, match=r"step_1 could not be written \(OSError: .* No space"):
        runs.train(config)
    assert not steps(config.folder)


def _size_and_room(
    parallel: ParallelConfig, model: Path, folder: Path, precision: str
) -> tuple[str, int]:
    """What is said of a disk without any room, and the bytes of a checkpoint."""
    with runs.loaded(model, parallel, precision) as here:
        made = Checkpoints(
            folder, CheckpointConfig(), model=here.model, optimizer=here.optimizer, mesh=here.mesh
        )
        made.save(Progress(step=1), describe)
        made.wait()
        try:
            made.check_room(1)
        except CheckpointError as error:
            return str(error), _bytes(folder / "step_1")
        return "", 0


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _disk(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 2**40) -> None:
    usage = SimpleNamespace(free=free, total=total)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["dp2", "tp2", "dp2_do", "pp2_vp2"])
def test_the_room_that_is_asked_for_is_that_of_a_real_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, precision: str
) -> None:
    """But for some 2 KB that each tensor takes beside its numbers."""
    _disk(monkeypatch, free=0)
    monkeypatch.setattr(sharded, "_GIB", 1)
    run = tmp_path / "run"
    (said, real), *others = runs.on_layout(layout, _size_and_room, model, run, precision)
    assert others == [(said, real)] * len(others)
    form = (
        rf"output {run}: has room for 0\.00 GiB, and one checkpoint takes (\d+)\.00 GiB\. Fix: .*"
    )
    asked = re.fullmatch(form, said)
    assert asked
    assert 0.85 * real < int(asked[1]) < real


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
    model: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = _bytes(run / "step_4")
    config = runs.experiment(tmp_path / "new", model, train__steps=1)
    _disk(monkeypatch, free=size // 2)
    with pytest.raises(AssertionError, match=rf"output {config.folder}: has room for 0\.00 GiB"):
        runs.train(config, "dp2")
    assert not (config.folder / METRICS).exists()
    left = config.folder / ".step_9.tmp" / "weights"
    left.mkdir(parents=True)
    (left / "share").write_bytes(bytes(size // 2))  # the first save removes it
    assert len(runs.train(config, "dp2")) == 1


@pytest.mark.parametrize(("free", "total"), [(0, 0), (2**40, 2**40)])
def test_a_disk_with_room_and_one_that_does_not_say_are_not_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, total: int
) -> None:
    _disk(monkeypatch, free, total)
    assert runs.on_layout("one", _size_and_room, model, tmp_path / "run", "fp32") == [("", 0)]


def test_a_run_that_has_ended_needs_no_room(
    model: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _disk(monkeypatch, free=0)
    assert len(runs.train(runs.experiment(run, model, train__steps=4))) == 4
    with pytest.raises(AssertionError, match="has room for"):
        runs.train(runs.experiment(run, model, train__steps=5))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (OSError(28, "No space left on device"), ": OSError: [Errno 28] No space left"),
        (None, ": the process that writes ended with exit code -9"),
    ],
)
def test_a_writer_that_fails_ends_the_run(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: OSError | None,
    said: str,
) -> None:
    write = writer._write

    def failing(transforms: Any, bucket: Any) -> Any:
        if os.environ["RANK"] == "0":
            return write(transforms, bucket)
        if fault:
            raise fault
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(writer, "_write", failing)
    config = runs.experiment(tmp_path / "run", model, checkpoint__every=2, train__steps=20)
    with pytest.raises(AssertionError) as failed:
        runs.train(config, "tp2")
    assert "step_2 could not be written" in str(failed.value)
    assert said in str(failed.value)
    assert not steps(config.folder)
    assert len(runs.metrics(config)) < 20
