"""A training run loses nothing and changes nothing silently: spikes, resumes, the lock, its log."""

import fcntl
import json
import multiprocessing
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mcore_sft import config as configuration
from mcore_sft.base.errors import UserError
from mcore_sft.checkpoint.sharded import Progress, read_manifest, steps
from mcore_sft.config import LogConfig, ParallelConfig, RunConfig, TrainConfig
from mcore_sft.model import families
from mcore_sft.runtime.mesh import connect
from mcore_sft.training import loop
from mcore_sft.training.alone import alone
from mcore_sft.training.beside.guards import Guard
from mcore_sft.training.beside.metrics import Metrics
from mcore_sft.training.step import Gradients
from mcore_sft.training.stop import Stop, reason
from tests import runs
from tests.distributed import run_ranks

ROOT = Path(__file__).parents[2]
CALM = [1.0, 1.02, 0.98, 1.01] * 32


# Number 3.


def _judged(losses: Sequence[float], told: dict[str, Any]) -> tuple[list[int], list[Any], Any]:
    """Which of `losses` are withheld by a guard, its events, and the progress that it leaves.

    Steps are counted from 1; `told` is the progress of the checkpoint that it goes on from.
    """
    progress, events = Progress(**told), []
    packs: Any = SimpleNamespace(packs=lambda step: [[0]], examples_of=lambda pack: [0])
    metrics: Any = SimpleNamespace(flag=lambda step, event, *rest: events.append((step, event)))
    settings, withheld = TrainConfig(on_spike="skip"), []
    batches: Any = [SimpleNamespace(supervised=1)]
    with connect(ParallelConfig()) as mesh:
        guard = Guard(settings, packs, packs, Path(), mesh, metrics)
        for loss in losses:
            found = Gradients(
                supervised=1,
                tokens=1,
                examples=1,
                loss=loss,
                norm=1.0,
                is_finite=True,
                losses=[loss],
            )
            if guard.withholds(progress, batches, found):
                withheld.append(progress.step + 1)
            progress.step += 1
    return withheld, events, asdict(progress)


def _three_runs() -> list[Any]:
    after_a_spike = _judged([*CALM, 10.0, 2.0, 3.0, 5.5, 1.0, 2.0], {})
    first = _judged([*CALM, *[3.0, 3.02, 2.98] * 2], {})
    stored = json.loads(json.dumps(first[2]))
    second = _judged([3.0, 3.01] * 40 + [9.0], stored)
    return [after_a_spike[:2], first[:2], second[:2]]


def test_03_spike_does_not_enter_its_own_window() -> None:
    """And a change of level ends after ten, which a run that is resumed among them counts on."""
    ((after_a_spike, stopped, resumed),) = run_ranks(1, _three_runs)
    assert after_a_spike[0] == [129, 130, 131, 132, 134]
    assert stopped[0] == [129, 130, 131, 132, 133, 134]
    assert resumed[0] == [135, 136, 137, 138, 215]  # six before, and what is a spike in 3
    assert [event for event in resumed[1] if event[1] != "spike"] == [(138, "new_level")]


# Number 5.


def test_05_every_key_is_in_one_class_and_the_docs_have_the_same() -> None:
    from mcore_sft.training import resume

    classes = {"refused": resume.REFUSED, "reported": resume.REPORTED, "allowed": resume.ALLOWED}
    tree = {"name": "x", "model": {"path": "."}}
    keys = resume.leaves(configuration.parse(tree).model_dump(mode="json"))

    def found(key: str) -> list[str]:
        names = (key, key.rpartition(".")[0] + ".*", key.partition(".")[0] + ".*")
        return [kind for kind, listed in classes.items() if set(names) & set(listed)]

    assert {key: found(key) for key in keys if len(found(key)) != 1} == {}
    listed = [key for known in classes.values() for key in known]
    assert len(listed) == len(set(listed))
    assert [key for key in listed if not key.endswith("*") and key not in keys] == []
    docs = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    for kind, known in classes.items():
        (row,) = re.findall(rf"^\| {kind} \| (.*) \|$", docs, re.MULTILINE)
        assert re.findall("`([^`]+)`", row) == list(known)


@pytest.fixture(scope="module")
def stopped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, whose cosine has ended."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    runs.train(_cosine(folder, model, train__steps=2))
    return folder


def _cosine(folder: Path, model: Path, **changes: Any) -> RunConfig:
    cosine = {"optimizer__schedule": "cosine", "optimizer__min_lr": 1e-5}
    return runs.experiment(folder, model, **cosine, **changes)


def test_05_what_changes_at_a_resume_is_said_and_recorded_and_validation_can_be_added(
    model: Path, stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {
        "train__steps": 3,
        "optimizer__lr": 0.1,
        "optimizer__betas": [0.9, 0.95],
        "optimizer__clip_grad": 1.0,
        "train__recompute": "full",
        "data__validation": [{"path": "rows.jsonl", "limit": 3}],
        "data__packed": str(tmp_path / "packed"),
        "train__validate_every": 3,
    }
    run = shutil.copytree(stopped, tmp_path / "run")
    config = _cosine(run, model, **changes)
    runs.pack_rows(config)
    assert "validation_loss" in runs.train(config)[-1]
    said = capfd.readouterr().err.splitlines()
    assert "optimizer.lr: 0.0001 -> 0.1" in said
    assert "optimizer.betas: [0.9, 0.98] -> [0.9, 0.95]" in said
    assert "optimizer.clip_grad: none -> 1.0" in said
    assert "train.steps: 2 -> 3" in said
    jump = (
        "lr was 5.50e-05 at step 2, is 2.50e-02 now: optimizer.lr was 0.0001, now 0.1; "
        "train.steps was 2, now 3"
    )
    assert jump in said
    (entry,) = read_manifest(run / "step_3")["progress"]["history"]
    assert entry["step"] == 2
    assert entry["changed"]["optimizer.lr"] == [1e-4, 0.1]
    assert entry["changed"]["data.validation"][0] is None
    assert set(entry["changed"]) == {
        *("optimizer.lr", "train.steps", "optimizer.betas", "optimizer.clip_grad"),
        "data.validation",
    }
    shown = re.escape(entry["changed"]["data.validation"][1][:12])
    assert re.search(rf"^data.validation: none -> {shown}$", "\n".join(said), re.MULTILINE)


def test_05_checkpoints_of_before_are_resumed_and_fingerprints_are_short(
    model: Path, stopped: Path, tmp_path: Path
) -> None:
    """They had one fingerprint of all splits, and none of what is counted and recorded now."""
    from mcore_sft.checkpoint.sharded import signed

    run = shutil.copytree(stopped, tmp_path / "run")
    manifest = read_manifest(run / "step_2")
    progress, together = manifest["progress"], runs.experiment(run, model).packed
    for name in ("spikes", "nonfinite", "validation", "history"):
        progress.pop(name, None)
    whole = json.loads((together / "manifest.json").read_text())["fingerprint"]
    progress["fixed"] |= {"dataset": whole, "optimizer.betas": [0.9, 0.98]}
    (run / "step_2" / "manifest.json").write_text(signed(manifest))
    config = _cosine(run, model, train__steps=3)
    assert [line["step"] for line in runs.train(config)] == [1, 2, 3]
    fixed = read_manifest(run / "step_3")["progress"]["fixed"]
    with pytest.raises(UserError, match=f"dataset was {fixed['dataset'][:12]}, now 000000000000;"):
        Progress(step=3, fixed=fixed).check({"dataset": "0" * 64}, {})


# Number 8, and outputs that cannot be made.


def _refusal(config: RunConfig) -> str:
    try:
        loop.train(config)
    except UserError as error:
        return str(error)
    return "not refused"


@contextmanager
def _locked(folder: Path) -> Any:
    """Another process's lock: one that is forked does not hold its parent's."""
    with (folder / ".lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _state(folder: Path) -> dict[str, Any]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def test_08_a_second_start_is_refused_before_it_reads_anything_on_all_ranks(
    model: Path, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "step_2" / "manifest.json").write_text("{")  # what would be said of it is not
    before = _state(run)
    # Nor is what would be said of the dataset.
    config = _cosine(run, model, train__steps=9, data__packed=str(tmp_path / "none"))
    with _locked(run):
        told = run_ranks(2, _refusal, config)
    assert told[0].startswith(f"{run}: another run is training there. Fix: wait until it has ended")
    assert told[1] == told[0]
    assert _state(run) == before


def _holds_to_the_end(config: RunConfig) -> bool:
    """Whether the lock is held as the last evaluation is waited for."""
    found = []

    def probe(end: Any) -> None:
        try:
            with _locked(config.folder):
                end.send(False)
        except OSError:
            end.send(True)

    def wait(*_: Any) -> None:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=probe, args=(theirs,))
        process.start()
        found.append(ours.recv())
        process.join()

    loop.Accuracy.wait = wait  # type: ignore[method-assign]
    loop.train(config)
    return found == [True]


def test_08_the_lock_is_held_until_the_last_evaluation_has_ended(
    model: Path, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    assert run_ranks(1, _holds_to_the_end, _cosine(run, model, train__steps=2)) == [True]
    assert not (run / ".lock").exists()


def _below_a_file(place: Path) -> Path:
    place.touch()
    return place / "run"


def _a_file(place: Path) -> Path:
    place.touch()
    return place


def _a_dangling_link(place: Path) -> Path:
    place.symlink_to(place.with_name("nowhere"))
    return place


def _a_lock_that_cannot_be_opened(place: Path) -> Path:
    (place / ".lock").mkdir(parents=True)
    return place


def _below_a_dangling_link(place: Path) -> Path:
    return _a_dangling_link(place) / "run"


def _where_nothing_can_be_made(place: Path) -> Path:
    return Path("/proc/run")


OUTPUTS: dict[Callable[[Path], Path], str] = {
    _below_a_file: "Not a directory",
    _a_file: "Not a directory",
    _a_dangling_link: ".* is a symbolic link to .*/nowhere, where nothing is",
    _a_lock_that_cannot_be_opened: "Is a directory",
    _below_a_dangling_link: ".* is a symbolic link to .*/nowhere, where nothing is",
    _where_nothing_can_be_made: "No such file or directory: /proc/run",
}


@pytest.mark.parametrize("made", OUTPUTS)
def test_an_output_that_cannot_be_made(tmp_path: Path, made: Callable[[Path], Path]) -> None:
    folder = made(tmp_path / "place")
    expected = rf"^output {folder}: cannot be written \({OUTPUTS[made]}.*\)\. Fix: name another"
    with pytest.raises(UserError, match=expected), alone(folder):
        pass


def test_an_output_that_cannot_be_made_ends_all_ranks_before_anything_is_loaded(
    model: Path, tmp_path: Path
) -> None:
    config = runs.experiment(_below_a_file(tmp_path / "x"), model, data__packed=str(tmp_path))
    told = run_ranks(2, _refusal, config)
    assert "cannot be written (Not a directory" in told[0]
    assert told[1] == told[0]


# Number 10, and number 6 for metrics.jsonl.


def _log(folder: Path, model: Path, *, resumed_at: int, said: Sequence[int]) -> None:
    mesh: Any = SimpleNamespace(
        is_main=True, device=torch.device("cpu"), from_main=lambda find: find()
    )
    made = Metrics(folder, "name", LogConfig(), 9, families.read(model), mesh)
    with made.logging(resumed_at):
        for step in said:
            made.validation(Progress(step=step), 1.0)


def _steps(folder: Path, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]


def test_10_metrics_are_set_aside_when_checkpoints_were_archived(
    model: Path, tmp_path: Path
) -> None:
    _log(tmp_path, model, resumed_at=0, said=[1, 2, 3])
    (tmp_path / "latest").write_text("step_2\n")
    _log(tmp_path, model, resumed_at=2, said=[3, 4, 5])  # killed after step 3: taken again
    assert _steps(tmp_path, "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert list(tmp_path.glob("metrics.*.jsonl")) == []
    (tmp_path / "latest").write_text("step_4\n")
    _log(tmp_path, model, resumed_at=2, said=[3])  # step_4 was moved away
    assert _steps(tmp_path, "metrics.1.jsonl") == [1, 2, 3, 4, 5]
    assert _steps(tmp_path, "metrics.jsonl") == [1, 2, 3]
    _log(tmp_path, model, resumed_at=0, said=[1])  # all were
    assert _steps(tmp_path, "metrics.1.jsonl") == [1, 2, 3, 4, 5]
    assert _steps(tmp_path, "metrics.2.jsonl") == [1, 2, 3]
    assert _steps(tmp_path, "metrics.jsonl") == [1]


def _disk_calls(config: RunConfig) -> list[Any]:
    """What is made durable and renamed in the run's folder, in order."""
    calls: list[Any] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        place = Path(f"/proc/self/fd/{descriptor}").resolve()
        if place.name == "metrics.jsonl":
            calls.append(("fsync", max(_steps(place.parent, place.name), default=0)))

    def recorded_rename(source: Any, target: Any, **options: Any) -> None:
        rename(source, target, **options)
        if Path(target).name.startswith("step_"):
            calls.append(("publish", int(Path(target).name.removeprefix("step_"))))

    os.fsync, os.rename = recorded_fsync, recorded_rename
    loop.train(config)
    return calls


def test_06_metrics_are_durable_before_their_checkpoint_is_published(
    model: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": 3, "checkpoint__every": 1}
    config = runs.experiment(tmp_path / "run", model, **changes)
    (calls,) = run_ranks(1, _disk_calls, config)
    published = [place for place, call in enumerate(calls) if call[0] == "publish"]
    assert [calls[place][1] for place in published] == [1, 2, 3]
    for place in published:
        durable = [step for what, step in calls[:place] if what == "fsync"]
        assert max(durable, default=0) >= calls[place][1]


# SIGHUP.

HEARS = """
import sys, time
from mcore_sft import command
def main():
    try:
        print("waits", flush=True)
        time.sleep(float(sys.argv[1]))
    finally:
        print("cleaned up", flush=True)
command.run(main)
"""


@pytest.mark.parametrize(
    ("launch", "seconds", "ends"),
    [([], 60, (129, "terminated\n")), (["sh", "-c", 'trap "" HUP; exec "$@"', "x"], 0.5, (0, ""))],
)
def test_sighup_ends_a_command_as_sigterm_does_unless_it_is_ignored(
    launch: list[str], seconds: float, ends: tuple[int, str]
) -> None:
    command = [*launch, sys.executable, "-c", HEARS, str(seconds)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "waits\n"
    running.send_signal(signal.SIGHUP)
    said, error = running.communicate(timeout=60)
    assert (running.returncode, error, said) == (*ends, "cleaned up\n")


def test_sighup_is_heard_by_a_run_and_is_not_its_clock() -> None:
    unheard = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        with Stop(1e-9) as late, Stop(None) as stop:
            assert reason(late.asked) == "train.max_minutes are over"
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked
            assert reason(stop.asked) == "SIGHUP came"
    finally:
        signal.signal(signal.SIGHUP, unheard)


def test_a_run_whose_terminal_closes_is_saved(model: Path, tmp_path: Path) -> None:
    config = runs.experiment(tmp_path / "run", model, train__steps=10_000, log__every=1)
    file = tmp_path / "experiment.yaml"
    file.write_text(configuration.dump(config))
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        program = [sys.executable, str(ROOT / "mcore_sft" / "train.py"), "--config", str(file)]
        os.execv(sys.executable, program)
    said = b""
    with suppress(OSError):
        while said.count(b"grad norm") < 2:
            said += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 75, said.decode()
    last = max(line["step"] for line in runs.metrics(config))
    assert [path.name for path in steps(config.folder)] == [f"step_{last}"]


# The home folder, and names with brackets.


def test_tilde_is_the_home_folder_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = {"path": "~/s.jsonl", "mask": "~/m.idx"}
    tree = {
        "name": "~x",
        "output": "~/run",
        "model": {"path": "~/model", "tokenizer": "~/t"},
        "prompt": {"template": "~/t.yaml", "instruction": "~/i.yaml"},
        "data": {
            "packed": "~/packed",
            "root": "~",
            "train": [source],
            "validation": [source],
            "filters": {
                "contamination_file": "~/c.jsonl",
                "remove_contaminated": True,
                "drop_if_contains": ["~/"],
            },
            "contamination": {"against": [source]},
        },
        "evaluation": {
            "benchmarks": [{"name": "b", "path": "~/b.jsonl"}],
            "few_shot_examples": "~/f.yaml",
            "vllm": {"python": "~/python"},
        },
    }
    config = configuration.parse(tree)
    said = configuration.dump(config)
    assert said.count(f"{tmp_path}") == 17
    assert re.findall(r"\S*~\S*", said) == ["~x", "~/"]  # a name, and a text
    assert config.folder == tmp_path / "run"
    with pytest.raises(
        UserError, match="output: ~no-such-user/x: no such home folder; give the whole"
    ):
        configuration.parse(tree, ["output=~no-such-user/x"])
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: ~/model}\n")
    for program in ("tools/preprocess.py", "mcore_sft/train.py"):
        command = [sys.executable, program, "--config=~/x.yaml", "--print-config"]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert f"path: {tmp_path}/model" in ran.stdout


def test_brackets_and_escape_codes_in_names_are_printed_as_they_are(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "math [/v2] a[bold]x \x1b[31m"
    folder = tmp_path / "run [/v2] [sft]"
    config = runs.experiment(folder, model, train__steps=1).model_copy(update={"name": name})
    runs.train(config)
    said = capfd.readouterr().err
    assert r"math [/v2] a[bold]x \x1b[31m: 1 process(es)" in said
    assert f"saved {folder}/step_1" in said
    assert "\x1b[31m" not in said
