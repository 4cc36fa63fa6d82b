"""Faults of checkpoints and exports: none loses a checkpoint, ends a run, or runs foreign code."""

import contextlib
import gc
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mcore_sft.base.errors import UserError
from mcore_sft.checkpoint import export as exporting
from mcore_sft.checkpoint import safetensors_folder, sharded, writer
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.export import export
from mcore_sft.checkpoint.sharded import Checkpoints, Progress
from mcore_sft.config import CheckpointConfig, ParallelConfig, RunConfig
from mcore_sft.training import loop
from tests import runs, tiny
from tests.checkpoint.test_formats import KEPT, restored
from tests.distributed import run_ranks

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

HOLDER = re.escape(f"(process {os.getpid()} on {socket.gethostname()})")
"""This process, as the sentences name it that refuse another."""


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A step of a tiny model, as an earlier version saved it."""
    return Path(shutil.copytree(KEPT / "run", tmp_path / "kept")) / "step_3"


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, all saved."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.train(runs.experiment(folder, model, train__steps=3, checkpoint__every=1))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def goes_on(folder: Path, model: Path, *prepare: Any, **changes: Any) -> tuple[str, str]:
    """Start the run again until step 5: how it ended, and what it said."""
    changes = {"train__steps": 5, "checkpoint__every": 1, "checkpoint__keep": 1} | changes
    config = runs.experiment(folder, model, **changes)
    (told,) = run_ranks(1, _goes_on, config, prepare)
    return told


def _goes_on(config: RunConfig, prepare: tuple[Any, ...]) -> tuple[str, str]:
    said = io.StringIO()
    ended = "well"
    for one in prepare:
        one()
    with contextlib.redirect_stdout(said):
        try:
            loop.train(config)
        except UserError as error:
            ended = str(error)
    return ended, said.getvalue()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*step_*")}


def resign(step: Path, changed: dict[str, bytes]) -> None:
    """Write files of a checkpoint, and a manifest that names them as they are now."""
    manifest = json.loads((step / "manifest.json").read_text())
    for name, content in changed.items():
        (step / name).write_bytes(content)
        sha = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": sha}
    manifest.pop("digest")
    (step / "manifest.json").write_text(sharded.signed(manifest))


def edited(file: Path, **keys: Any) -> bytes:
    """The JSON of a file with other values."""
    return json.dumps(json.loads(file.read_text()) | keys).encode()


@contextlib.contextmanager
def recorded(log: Path) -> Iterator[None]:
    """Write down each fsync and rename, those of forked processes too: process, what, path."""
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def tell(what: str, path: Any) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {what} {path}\n")

    def of_file(descriptor: int) -> None:
        fsync(descriptor)
        tell("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

    def of_name(call: Any) -> Any:
        def named(source: Any, target: Any, **keywords: Any) -> None:
            call(source, target, **keywords)
            tell("rename", target)

        return named

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", of_file)
        patch.setattr(os, "rename", of_name(rename))
        patch.setattr(os, "replace", of_name(replace))
        yield


def calls(log: Path) -> list[tuple[int, str, str]]:
    lines = (line.split(" ", 2) for line in log.read_text().splitlines())
    return [(int(process), what, path) for process, what, path in lines]


# 6


def test_06_export_is_on_the_disk_before_it_has_its_name(kept: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "hf"
    with recorded(tmp_path / "log"):
        export(kept, output)
    done = [(what, path) for _, what, path in calls(tmp_path / "log")]
    named = done.index(("rename", str(output)))
    before = {Path(path).name for what, path in done[:named] if what == "fsync"}
    assert {path.name for path in output.iterdir()} <= before
    assert any(name.startswith(".hf.partial-") for name in before)
    assert ("fsync", str(output.parent)) in done[named:]


def test_06_fsync_of_a_save_is_recorded(model: Path, tmp_path: Path) -> None:
    """The writer makes its shares durable; then all else, the folders, the name, the pointer."""
    folder = tmp_path / "run"
    config = runs.experiment(folder, model, train__steps=1)
    run_ranks(1, _recorded_run, config, tmp_path / "log")
    done = calls(tmp_path / "log")
    (named,) = (n for n, call in enumerate(done) if call[1:] == ("rename", f"{folder}/step_1"))
    before = {path for _, what, path in done[:named] if what == "fsync"}
    writing = folder / ".step_1.tmp"
    manifest = json.loads((folder / "step_1" / "manifest.json").read_text())
    files = {str(writing / name) for name in ["manifest.json", *manifest["files"]]}
    assert files <= before
    assert {str(writing), str(writing / "weights"), str(writing / "model")} <= before
    main = done[named][0]
    shares = [call for call in done[:named] if call[2].endswith(".distcp")]
    assert shares
    assert all(process != main for process, _, _ in shares)
    after = [(what, path) for _, what, path in done[named:]]
    pointer = after.index(("rename", f"{folder}/latest"))
    assert ("fsync", str(folder)) in after[:pointer]
    assert any(what == "fsync" and "/.latest." in path for what, path in after[:pointer])
    assert ("fsync", str(folder)) in after[pointer:]


def _recorded_run(config: RunConfig, log: Path) -> None:
    with recorded(log):
        loop.train(config)


# 7


def test_07_second_export_into_one_output_is_refused(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun, go_on = safetensors_folder._bytes, threading.Event(), threading.Event()

    def waits(*arguments: Any, **keywords: Any) -> Any:
        begun.set()
        if threading.current_thread() is first:
            assert go_on.wait(60)
        return write(*arguments, **keywords)

    monkeypatch.setattr(safetensors_folder, "_bytes", waits)
    first = threading.Thread(target=export, args=(kept, tmp_path / "hf"))
    first.start()
    assert begun.wait(60)
    try:
        with pytest.raises(CheckpointError, match=rf"another export is writing it {HOLDER}\. Fix"):
            export(kept, tmp_path / "hf")
    finally:
        go_on.set()
        first.join()
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert len(found) == len(json.loads((KEPT / "expected.json").read_text())["exported"])
    assert [path.name for path in tmp_path.glob("*hf*")] == ["hf"]


def test_07_what_a_killed_export_left_is_swept_by_the_next(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_killed_export, args=(kept, tmp_path / "hf")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path for path in tmp_path.glob(".hf*") if path.is_dir()]
    export(kept, tmp_path / "hf")
    assert [path.name for path in tmp_path.glob("*hf*")] == ["hf"]


def _killed_export(step: Path, output: Path) -> None:
    safetensors_folder._bytes = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
    export(step, output)


# 9


def test_09_base_that_is_edited_or_goes_during_a_run_changes_no_checkpoint(
    model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    config = runs.experiment(tmp_path / "run", base, train__steps=3, checkpoint__every=1)
    trained = tiny.hf_config(base)
    sha = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    (ended,) = run_ranks(1, _base_goes, config)
    assert ended == "well"
    export(config.folder / "step_3", tmp_path / "hf")
    assert tiny.hf_config(tmp_path / "hf")["rope_parameters"] == trained["rope_parameters"]
    record = json.loads((tmp_path / "hf" / "mcore_sft.json").read_text())["base"]
    assert record["path"] == str(base)
    assert record["sha256"]["config.json"] == sha
    assert record["weights"] == safetensors_folder.SafetensorsFolder(model).fingerprint()


def _base_goes(config: RunConfig) -> str:
    base, advance = config.model.path, loop.advance

    def changed(progress: Progress, result: Any) -> None:
        advance(progress, result)
        if progress.step == 1:
            rope = tiny.hf_config(base)["rope_parameters"] | {"rope_theta": 5e5}
            (base / "config.json").write_bytes(edited(base / "config.json", rope_parameters=rope))
        elif progress.step == 2:
            shutil.rmtree(base)

    loop.advance = changed
    try:
        loop.train(config)
    except Exception as error:
        return repr(error)
    return "well"


def test_09_fingerprint_of_the_base_that_an_earlier_version_recorded_stays(
    run: Path, model: Path, tmp_path: Path
) -> None:
    older = "0" * 64
    for step in run.glob("step_*"):
        manifest = json.loads((step / "manifest.json").read_text())
        manifest["progress"]["fixed"]["base weights"] = older
        (step / "manifest.json").write_text(json.dumps(manifest))
        resign(step, {})
    ended, _ = goes_on(run, model, checkpoint__keep=0)
    assert ended == "well"
    found = sharded.read_manifest(run / "step_5")["progress"]["fixed"]["base weights"]
    assert found == older != safetensors_folder.SafetensorsFolder(model).fingerprint()
    export(run / "step_5", tmp_path / "hf", others=[run / "step_3"])


def test_09_export_refuses_a_configuration_that_was_not_trained(kept: Path, tmp_path: Path) -> None:
    config = json.loads((kept / "model" / "config.json").read_text())
    rope = config["rope_parameters"] | {"rope_theta": 5e5}
    resign(kept, {"model/config.json": edited(kept / "model/config.json", rope_parameters=rope)})
    with pytest.raises(
        CheckpointError, match=r"step_3/model/config\.json: is not .* rope_theta \(got 500000\.0,"
    ):
        export(kept, tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*"))


def test_09_quantization_and_code_of_the_base_are_not_exported(kept: Path, tmp_path: Path) -> None:
    strange: dict[str, Any] = {
        "quantization_config": {"quant_method": "fp8"},
        "auto_map": {"AutoModel": "code.Model"},
    }
    named = ("model/config.json", "model/tokenizer_config.json")
    before = json.loads((kept / named[0]).read_text())
    resign(kept, {name: edited(kept / name, **strange) for name in named})
    export(kept, tmp_path / "hf")
    assert tiny.hf_config(tmp_path / "hf") == before
    assert not strange.keys() & json.loads((tmp_path / "hf/tokenizer_config.json").read_text())


def test_09_run_that_goes_on_keeps_what_its_checkpoint_says(run: Path, model: Path) -> None:
    from mcore_sft.checkpoint.describe import Description

    step, none = run / "step_3", None
    (step / "model" / "modeling.py").write_text("not in the manifest")
    config = runs.experiment(run, model.parent / "base that has gone")
    kept: Any = Description.read(config, none, None, step).files  # type: ignore[arg-type]
    named = json.loads((step / "manifest.json").read_text())["files"]
    assert kept.keys() == {name for name in named if not name.startswith("weights/")}
    for name in kept.keys() - {"config.yaml"}:
        assert kept[name] == (step / name).read_bytes()


def test_09_record_of_a_folder_from_the_hub_has_its_revision(tmp_path: Path) -> None:
    from mcore_sft.checkpoint import describe

    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    assert describe._revision(snapshot) == "abc123"
    metadata = tmp_path / "local" / ".cache" / "huggingface" / "download" / "config.json.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("def456\netag\n1.0\n")
    assert describe._revision(tmp_path / "local") == "def456"
    assert describe._revision(tmp_path) is None


# 11


def _unreadable(file: str, times: float) -> None:
    """Let the next `times` openings of files of this name fail as a disk does."""
    opened = Path.open

    def fails(self: Path, *arguments: Any, **keywords: Any) -> Any:
        nonlocal times
        if self.name == file and times > 0:
            times -= 1
            raise OSError(5, "Input/output error", str(self))
        return opened(self, *arguments, **keywords)

    Path.open = fails  # type: ignore[method-assign]


@pytest.mark.parametrize("file", ["__0_0.distcp", "manifest.json"])
def test_11_one_read_error_is_tried_again(
    kept: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(Path, "open", Path.open)  # what is put there is taken back
    _unreadable(file, times=1)
    assert sharded.verify(kept)["progress"]["step"] == 3


def test_11_unreadable_disk_is_no_damage(run: Path, model: Path) -> None:
    ended, said = goes_on(run, model, lambda: _unreadable("__0_0.distcp", times=float("inf")))
    assert f"{run}/step_3/weights/__0_0.distcp: cannot be read" in ended
    assert "Input/output error, errno 5" in ended
    assert said == ""
    assert names(run) == {"step_1", "step_2", "step_3"}


def test_11_folder_set_aside_is_numbered_and_stays(run: Path, model: Path) -> None:
    (run / "damaged_step_3").mkdir()
    (run / "damaged_step_3" / "mine").write_text("evidence")
    (run / "step_3" / "weights" / "__0_0.distcp").write_bytes(b"")
    ended, said = goes_on(run, model)
    assert ended == "well"
    assert "set aside as damaged_step_3.2: " in said
    assert (run / "damaged_step_3" / "mine").read_text() == "evidence"
    assert (run / "damaged_step_3.2" / "weights" / "__0_0.distcp").read_bytes() == b""
    assert names(run) == {"damaged_step_3", "damaged_step_3.2", "step_5"}


def test_11_progress_of_a_newer_version_is_no_damage(run: Path, model: Path) -> None:
    manifest = json.loads((run / "step_3" / "manifest.json").read_text())
    manifest["progress"]["moons"] = 2
    manifest.pop("digest")
    (run / "step_3" / "manifest.json").write_text(sharded.signed(manifest))
    ended, _ = goes_on(run, model)
    assert "progress holds moons, which this version does not know (a newer version" in ended
    assert names(run) == {"step_1", "step_2", "step_3"}


def test_11_newer_format_is_no_damage(run: Path, model: Path) -> None:
    manifest = json.loads((run / "step_3" / "manifest.json").read_text())
    (run / "step_3" / "manifest.json").write_text(json.dumps(manifest | {"format": 4}))
    ended, _ = goes_on(run, model)
    assert "step_3: checkpoint format 4, expected 3 (a newer version of mcore_sft wrote" in ended
    assert names(run) == {"step_1", "step_2", "step_3"}


# 8, second half


def test_08_checkpoint_that_goes_after_it_was_listed_is_no_damage(run: Path, model: Path) -> None:
    ended, said = goes_on(run, model, _newest_goes)
    assert ended == "well"
    assert "set aside" not in said
    assert names(run) == {"step_5"}


def _newest_goes() -> None:
    listed = sharded.steps

    def goes(folder: Path) -> list[Path]:
        found = listed(folder)
        sharded.steps = listed
        shutil.rmtree(found[0])
        return found

    sharded.steps = goes


# 14


def test_14_only_files_of_the_manifest_are_exported(kept: Path, tmp_path: Path) -> None:
    (kept / "model" / "modeling.py").write_text("import os")
    export(kept, tmp_path / "hf")
    expected = {path.name for path in (KEPT / "run" / "step_3" / "model").iterdir()}
    found = {path.name for path in (tmp_path / "hf").iterdir()}
    assert found == expected | {"model.safetensors", "chat_template.jinja"}


def test_14_manifest_cannot_name_what_lies_outside(kept: Path, tmp_path: Path) -> None:
    resign(kept, {"model/../../evil": b"x"})
    with pytest.raises(CheckpointError, match=r"names 'model/\.\./\.\./evil', which lies outside"):
        export(kept, tmp_path / "hf")


def test_14_folder_whose_number_is_not_its_step_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "step_2", run / "step_9")
    with pytest.raises(CheckpointError, match="step_9: holds step 2, expected step 9"):
        export(run / "step_9", tmp_path / "hf")
    assert sharded.scores(run, "validation_loss").keys() == {1, 2, 3}


def test_14_checkpoint_copied_under_a_higher_number_is_not_the_newest(
    run: Path, model: Path
) -> None:
    shutil.copytree(run / "step_2", run / "step_9")
    ended, said = goes_on(run, model)
    assert ended == "well"
    assert "set aside as misnamed_step_9: " in said
    assert names(run) == {"misnamed_step_9", "step_5"}
    steps = [line["step"] for line in runs.metrics(runs.experiment(run, model))]
    assert steps == [1, 2, 3, 4, 5]


def test_14_checkpoint_in_the_way_of_a_save_is_not_lost(run: Path, model: Path) -> None:
    ended, said = goes_on(run, model, lambda: _copied_before_save(run))
    assert ended == "well"
    assert "step_4 was there already, and is now called replaced_step_4" in said
    assert sharded.read_manifest(run / "step_5")["progress"]["step"] == 5
    assert (run / "replaced_step_4" / "manifest.json").exists()


def _copied_before_save(run: Path) -> None:
    small = sharded._small_files

    def copied(*arguments: Any) -> Any:
        if not (run / "replaced_step_4").exists() and not (run / "step_4").exists():
            shutil.copytree(run / "step_2", run / "step_4")
        return small(*arguments)

    sharded._small_files = copied


# 15


def test_15_what_cannot_be_removed_ends_no_run_and_no_later_start(run: Path, model: Path) -> None:
    """step_1 is to be pruned; .step_4.tmp is what a save of step 4 left that was killed."""
    (run / "step_1" / ".nfs000").mkdir()
    (run / ".step_4.tmp" / "weights" / ".nfs000").mkdir(parents=True)
    ended, said = goes_on(run, model, _busy)
    assert ended == "well"
    assert said.count("warning: ") == 3  # of step_1, and of what is left of it
    assert f"warning: {run}/step_1 could not be removed or renamed" in said
    assert f"warning: {run}/.step_4.tmp could not be removed or renamed" in said
    assert names(run) == {".step_1.tmp", ".step_4.tmp", "step_5"}
    assert [path.name for path in (run / ".step_1.tmp").iterdir()] == [".nfs000"]
    ended, said = goes_on(run, model, _busy, train__steps=6)
    assert ended == "well"
    assert f"warning: {run}/.step_1.tmp could not be removed or renamed" in said
    assert sharded.verify(run / "step_6")["progress"]["step"] == 6


def _busy() -> None:
    """Files that somebody has open on NFS: their folders cannot be removed."""
    rmdir = os.rmdir

    def busy(path: Any, **keywords: Any) -> None:
        if os.fspath(path).endswith(".nfs000"):
            raise OSError(16, "Device or resource busy", path)
        rmdir(path, **keywords)

    os.rmdir = busy


def test_15_save_does_not_write_into_what_could_not_be_removed(model: Path, tmp_path: Path) -> None:
    left = tmp_path / "run" / ".step_1.tmp"
    (left / "model" / ".nfs000").mkdir(parents=True)
    ended, _ = goes_on(tmp_path / "run", model, _busy, train__steps=1)
    assert ended == "well"
    assert not (tmp_path / "run" / "step_1" / "model" / ".nfs000").exists()
    assert (left / "model" / ".nfs000").exists()


def test_15_step_that_was_moved_away_and_linked_keeps_its_files(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "step_1", tmp_path / "archive")
    (run / "step_1").symlink_to(tmp_path / "archive")
    none: Any = None
    Checkpoints(run, CheckpointConfig(keep=1), model=none, optimizer=none, mesh=none)._prune()
    assert names(run) == {"step_3"}
    assert (tmp_path / "archive" / "manifest.json").exists()


# 16


def test_16_copies_are_held_until_the_writer_has_ended(model: Path, tmp_path: Path) -> None:
    assert run_ranks(1, _held_copies, model, tmp_path) == [(True, True)]


def _held_copies(model: Path, folder: Path) -> tuple[bool, bool]:
    """Whether the copies are there while the writer waits, and gone once it has ended."""
    copies: list[weakref.ref[Tensor]] = []
    write, preload = writer._write, filesystem_async.FileSystemWriterAsync.preload_tensors

    def copied(*arguments: Any, **keywords: Any) -> Any:
        made = []
        for path, key, (content, tensors) in preload(*arguments, **keywords):
            # What is on a GPU is copied; here the copy is the weight itself.
            tensors = [(item, tensor.clone()) for item, tensor in tensors]
            copies.extend(weakref.ref(tensor) for _, tensor in tensors)
            made.append((path, key, (content, tensors)))
        return made

    def waiting(*arguments: Any) -> Any:
        while not (folder / "release").exists():
            time.sleep(0.01)
        return write(*arguments)

    filesystem_async.FileSystemWriterAsync.preload_tensors = staticmethod(copied)
    writer._write = waiting
    with runs.loaded(model, ParallelConfig()) as here:
        made = _checkpoints(here, folder / "run")
        made.save(Progress(step=1), lambda path: None)
        gc.collect()
        held = bool(copies) and all(copy() is not None for copy in copies)
        (folder / "release").touch()
        made.wait()
        gc.collect()
        return held, all(copy() is None for copy in copies)


def _checkpoints(here: Any, run: Path) -> Checkpoints:
    """Those of a run of the model that is loaded."""
    return Checkpoints(
        run, CheckpointConfig(), model=here.model, optimizer=here.optimizer, mesh=here.mesh
    )


# 17


def test_17_megatrons_own_asynchronous_save_works_beside_ours(model: Path, tmp_path: Path) -> None:
    assert run_ranks(1, _own_save, model, tmp_path) == [(True, True)]


def _own_save(model: Path, folder: Path) -> tuple[bool, bool]:
    """Whether Megatron-core's queue is its own after our save, and its save complete."""
    with runs.loaded(model, ParallelConfig()) as here:
        made = _checkpoints(here, folder / "run")
        made.save(Progress(step=1), lambda path: None)
        untouched = filesystem_async._results_queue is None
        made.wait()
        theirs = folder / "theirs"
        theirs.mkdir()
        state = {"a": ShardedTensor.from_rank_offsets("a", torch.arange(4.0))}
        asked: Any = {"async_sharded_save": True}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            asked["async_strategy"] = "mcore"  # the other one is a package of its own
        request = dist_checkpointing.save(state, str(theirs), **asked)
        caller = TemporalAsyncCaller()
        caller.schedule_async_call(request)
        caller.is_current_async_call_done(blocking=True, no_dist=True)
        for finish in request.finalize_fns:
            finish()
        wanted = {"a": ShardedTensor.from_rank_offsets("a", torch.zeros(4))}
        read = dist_checkpointing.load(wanted, str(theirs))
        return untouched, torch.equal(read["a"], torch.arange(4.0))


# Pickles of a checkpoint


class _Runs:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def _saved(what: Any) -> bytes:
    written = io.BytesIO()
    torch.save(what, written)
    return written.getvalue()


def _with_bytes(step: Path, content: bytes) -> dict[str, bytes]:
    """Files of a checkpoint whose layers' scales are `content`."""
    metadata = pickle.loads((step / "weights" / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        if index.fqn.endswith("_extra_state/shard_0_1"):
            place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(content)
    return {"weights/.metadata": pickle.dumps(metadata), "weights/__9_0.distcp": content}


def _hostile(step: Path, where: str, ran: Path) -> dict[str, bytes]:
    if where == "metadata":
        return {"weights/.metadata": pickle.dumps(_Runs(ran))}
    if where == "common":
        return {"weights/common.pt": _saved(_Runs(ran))}
    if where == "bytes":
        return _with_bytes(step, _saved([_Runs(ran)]))
    scales = torch.frombuffer(bytearray(pickle.dumps(_Runs(ran))), dtype=torch.uint8)
    return _with_bytes(step, _saved([scales]))


@pytest.mark.parametrize("where", ["metadata", "common", "bytes", "scales"])
def test_pickle_of_a_foreign_checkpoint_runs_nothing_when_it_is_resumed(
    kept: Path, tmp_path: Path, where: str
) -> None:
    ran = tmp_path / "ran"
    resign(kept, _hostile(kept, where, ran))
    with pytest.raises(AssertionError) as failed:
        run_ranks(1, restored, kept.parent)
    assert not ran.exists()
    assert "CheckpointError" in str(failed.value)
    assert "mkdir" in str(failed.value)
    assert names(kept.parent) == {"step_3"}


def test_pickle_of_a_foreign_checkpoint_runs_nothing_when_it_is_exported(
    kept: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    resign(kept, _hostile(kept, "metadata", ran))
    with pytest.raises(CheckpointError, match=r"\.metadata: its pickle asks for posix\.mkdir"):
        export(kept, tmp_path / "hf")
    assert not ran.exists()
    assert not list(tmp_path.glob("*hf*"))


def test_pickle_of_a_foreign_checkpoint_leads_to_no_other_file(kept: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((kept / "weights" / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../../secret"
    resign(kept, {"weights/.metadata": pickle.dumps(metadata)})
    with pytest.raises(CheckpointError, match=r"leads to '\.\./\.\./\.\./secret'"):
        export(kept, tmp_path / "hf")


def test_pickle_of_scales_as_transformer_engine_writes_them_is_accepted(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcore_sft.checkpoint import pickles

    recipes = ModuleType("transformer_engine.common.recipe")
    recipe = type("DelayedScaling", (), {"__module__": recipes.__name__})
    recipes.DelayedScaling = recipe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.common", ModuleType("common"))
    monkeypatch.setitem(sys.modules, recipes.__name__, recipes)
    state = {
        "recipe": recipe(),
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(16, 3),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True},
    }
    state["recipe"].margin = 0
    scales = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
    resign(kept, _with_bytes(kept, _saved([scales])))
    monkeypatch.delitem(sys.modules, recipes.__name__)  # it need not be installed
    pickles.check(kept, sharded.read_manifest(kept)["files"])


# What an export says


def test_checkpoint_that_goes_during_its_export_is_named(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporting._write_weights

    def goes(checkpoints: Any, *arguments: Any) -> None:
        shutil.rmtree(checkpoints[0])
        write(checkpoints, *arguments)

    monkeypatch.setattr(exporting, "_write_weights", goes)
    with pytest.raises(CheckpointError, match=r"^\S*/step_3: no such checkpoint") as said:
        export(kept, tmp_path / "hf")
    assert "hf" not in str(said.value)
    assert not list(tmp_path.glob("*hf*"))


def test_checkpoint_that_goes_while_its_weights_are_read_is_named(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_tensors = sharded.whole_tensors

    def going(path: Path) -> Any:
        read = whole_tensors(path)

        def one(key: str) -> Any:
            tensor = read(key)
            shutil.rmtree(path, ignore_errors=True)
            return tensor

        return one

    monkeypatch.setattr(sharded, "whole_tensors", going)
    with pytest.raises(CheckpointError, match=r"^\S*/step_3: no such checkpoint"):
        export(kept, tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*"))


def test_output_that_cannot_be_made_is_said_before_anything_is_read(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(exporting, "_verified", None)
    with pytest.raises(CheckpointError, match=r"file/hf: could not be written \("):
        export(kept, tmp_path / "file" / "hf")
    with pytest.raises(CheckpointError, match="file: already there and not empty"):
        export(kept, tmp_path / "file")
