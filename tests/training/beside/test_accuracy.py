"""Checkpoints that are evaluated beside the training: what is asked when, kept, told and ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mcore_sft import config as configuration
from mcore_sft.base.errors import UserError
from mcore_sft.checkpoint.manifest import FORMAT, signed
from mcore_sft.checkpoint.retention import scores, steps
from mcore_sft.checkpoint.sharded import Checkpoints
from mcore_sft.command import Stopped
from mcore_sft.config import RunConfig
from mcore_sft.training.beside import accuracy
from mcore_sft.training.beside.accuracy import Accuracy, check_benchmark
from tests import runs

ROOT = Path(__file__).parents[3]
SUMS = {"name": "sums", "path": "rows.jsonl", "answer": "expected_answer", "limit": 3}
WATCHED = {
    "evaluation": {"benchmarks": [{"name": "other"}, SUMS], "max_new_tokens": 4},
    "train__evaluate_benchmark": "sums",
}

# It says its environment, waits for `go`, and leaves the percentage that stands there.
_STAND_IN = """
import json, os, pathlib, sys, time
output = pathlib.Path(sys.argv[2])
print(json.dumps([os.getsid(0), dict(os.environ)]), flush=True)
go = output / "go"
while not (go.exists() and go.read_text()):
    time.sleep(0.01)
said = go.read_text()
if not said.isdecimal():
    sys.exit(None if said == "nothing" else said)
(output / "sums").mkdir(exist_ok=True)
report = {"score": {"symbolic_correct": {"percent": float(said)}}}
(output / "sums" / "report.json").write_text(json.dumps(report))
"""


class Bench:
    """A run of which only checkpoints exist, and evaluations that the test ends."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        changes = {"train__evaluate_every": 10, "checkpoint__every": 10, **WATCHED, **changes}
        self.config = runs.experiment(folder, folder / "base", train__steps=45, **changes)
        self.mesh: Any = SimpleNamespace(is_main=True, largest=lambda *flags: list(flags))
        mesh = self.mesh
        self.said: list[str] = []
        self.logged: list[Any] = []
        told: Any = SimpleNamespace(
            say=self.said.append, accuracy=lambda *line: self.logged.append(line)
        )
        none: Any = None
        self.checkpoints = Checkpoints(
            folder, self.config.checkpoint, model=none, optimizer=none, mesh=mesh
        )
        self.accuracy = Accuracy(self.config, self.checkpoints, told, mesh)

    def save(self, step: int, asked: int = 0) -> None:
        """Complete a step, prune, and poll, as training does."""
        path = self.config.folder / f"step_{step}"
        path.mkdir(parents=True)
        manifest = {"format": FORMAT, "progress": {"step": step}, "files": {}, "scores": {}}
        (path / "manifest.json").write_text(signed(manifest))
        self.checkpoints._prune()
        self.checkpoints.newest = path
        self.accuracy.poll(asked)

    def end(self, step: int, said: str) -> None:
        """Let the evaluation of a step end, and poll until that is known."""
        running = self.accuracy._running
        assert running is not None
        assert running.step == step
        (running.output / "go").write_text(said)
        running.process.wait(20)
        self.accuracy.poll(0)

    @property
    def there(self) -> list[int]:
        return [int(path.name.removeprefix("step_")) for path in steps(self.config.folder)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    monkeypatch.setattr(
        accuracy, "_command", lambda *paths: [sys.executable, "-c", _STAND_IN, *map(str, paths)]
    )
    made: list[Bench] = []

    def make(**changes: Any) -> Bench:
        made.append(Bench(tmp_path / "run", **changes))
        return made[-1]

    yield make
    for one in made:
        one.accuracy.end()


def test_the_newest_that_is_due_is_evaluated_and_none_is_waited_for(
    bench: Callable[..., Bench],
) -> None:
    run = bench(train__evaluate_every=20)
    run.save(10)
    assert run.accuracy._running is None
    began = time.monotonic()
    for step in (20, 30, 40, 45):
        run.save(step)
    assert time.monotonic() - began < 2
    assert run.said == ["step 40 is not evaluated: step 45 came before its turn"]
    run.end(20, "50")
    run.end(45, "75")
    assert run.logged == [(20, 50.0, "sums"), (45, 75.0, "sums")]
    assert scores(run.config.folder, "accuracy") == {
        45: 75.0,
        40: None,
        30: None,
        20: 50.0,
        10: None,
    }
    run.accuracy.poll(0)
    assert run.accuracy._running is None


def test_the_best_by_accuracy_stay_and_those_not_measured_yet(bench: Callable[..., Bench]) -> None:
    run = bench(checkpoint={"every": 10, "best": 1, "metric": "accuracy"})
    for step in (10, 20, 30, 35):  # 10 is being evaluated, 30 has taken the turn of 20
        run.save(step)
    assert run.there == [35, 30, 10]
    run.end(10, "50")
    run.save(40)
    assert run.there == [40, 30, 10]
    run.end(30, "40")
    assert run.there == [40, 10]
    run.end(40, "60")
    assert run.there == [40]


def test_what_is_due_as_the_run_stops_stays_for_the_next_start(bench: Callable[..., Bench]) -> None:
    run = bench(checkpoint={"every": 10, "best": 1, "metric": "accuracy"})
    run.save(10)
    run.save(20, signal.SIGTERM)
    run.save(25, signal.SIGTERM)
    assert run.there == [25, 20, 10]


@pytest.mark.parametrize(
    ("said", "reason"), [("no memory is left", "exit code 1"), ("nothing", "FileNotFoundError")]
)
def test_an_evaluation_that_fails_is_told_and_the_next_begins(
    bench: Callable[..., Bench], said: str, reason: str
) -> None:
    run = bench()
    run.save(10)
    run.save(20)
    run.end(10, said)
    log = run.config.folder / "evaluation" / "step_10" / "log.txt"
    (told,) = run.said
    assert told.startswith("warning: step 10 was not evaluated (")
    assert reason in told
    assert told.endswith(f"training goes on; see {log}")
    assert said == "nothing" or said in log.read_text()
    run.end(20, "50")
    assert run.logged == [(20, 50.0, "sums")]


def test_a_process_that_cannot_start_is_told(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench()
    monkeypatch.setattr(accuracy, "_command", lambda *paths: ["/nowhere"])
    run.save(10)
    assert "warning: step 10 was not evaluated ([Errno 2]" in run.said[0]
    assert run.checkpoints.held == set()


def test_the_process_is_no_rank(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "mine")
    run = bench(train__evaluate_gpus="6,7")
    run.save(10)
    run.end(10, "50")
    log = run.config.folder / "evaluation" / "step_10" / "log.txt"
    session, environment = json.loads(log.read_text())
    assert session != os.getsid(0)
    left = [name for name in environment if "RANK" in name or "MASTER" in name or "ELASTIC" in name]
    assert left == []
    assert "WORLD_SIZE" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert environment["PYTHONPATH"] == f"{ROOT}{os.pathsep}mine"


def test_what_was_ended_is_taken_up_again(bench: Callable[..., Bench]) -> None:
    first = bench()
    first.save(10)
    first.save(20)
    running = first.accuracy._running
    assert running is not None
    with pytest.raises(KeyboardInterrupt), first.accuracy:
        raise KeyboardInterrupt
    assert not psutil.pid_exists(running.process.pid)
    assert first.said == ["the evaluation of step 10 was ended"]
    second = bench()
    with second.accuracy:
        second.accuracy.poll(0)
        second.end(20, "50")
    assert bench().accuracy.__enter__()._waiting is None


def test_the_end_waits_for_the_last_unless_it_is_asked_to_stop(
    bench: Callable[..., Bench],
) -> None:
    polls = []

    def agreed(*flags: int) -> list[int]:
        polls.append(flags)
        (run.config.folder / "evaluation" / "step_45" / "go").write_text("50")
        return list(flags)

    run = bench()
    run.mesh.largest = agreed
    run.save(45)
    stop: Any = contextlib.nullcontext()
    stop.asked = 0
    run.accuracy.wait(stop)
    assert len(polls) > 1
    assert run.logged == [(45, 50.0, "sums")]
    log = run.config.folder / "evaluation" / "step_45" / "log.txt"
    assert run.said == [f"waiting for the evaluation of step 45; its log is {log}"]
    run.accuracy.wait(stop)

    stop.asked = signal.SIGTERM
    run.accuracy.wait(stop)  # nothing is left
    (run.config.folder / "step_45" / "scores.json").unlink()
    (run.config.folder / "evaluation" / "step_45" / "go").unlink()
    for asked in (0, signal.SIGTERM):  # while it is evaluated, and before
        again = bench()
        again.accuracy.__enter__().poll(asked)
        assert (again.accuracy._running is None) == bool(asked)
        with pytest.raises(Stopped, match="SIGTERM came; all steps are saved, start again to eval"):
            again.accuracy.wait(stop)
        assert again.accuracy._running is None


def test_a_benchmark_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    mesh: Any = SimpleNamespace(is_main=True)
    changes: dict[str, Any] = {
        "evaluation__benchmarks": [SUMS | {"path": "nowhere.jsonl"}],
        "train__evaluate_every": 1,
        "checkpoint__every": 1,
    }
    config = runs.experiment(tmp_path / "run", tmp_path, **changes)
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot be read"):
        check_benchmark(config, mesh)


def _watched(folder: Path, model: Path, **changes: Any) -> RunConfig:
    return runs.experiment(
        folder,
        model,
        **{"train__evaluate_every": 2, "checkpoint__every": 2, **WATCHED, **changes},
    )


@pytest.mark.slow
def test_checkpoints_get_an_accuracy_while_training_goes_on(model: Path, tmp_path: Path) -> None:
    config = _watched(
        tmp_path / "run",
        model,
        train__steps=4,
        checkpoint={"every": 2, "best": 1, "metric": "accuracy"},
    )
    lines = runs.train(config, "dp2")
    found = {line["step"]: line for line in lines if "accuracy" in line}
    assert 4 in found
    assert found[4]["benchmark"] == "sums"
    place = config.folder / "evaluation" / "step_4"
    assert sorted(path.name for path in place.parent.iterdir() if "hf" in path.name) == []
    report = json.loads((place / "sums" / "report.json").read_text())
    assert report["benchmark"]["problems"] == 3
    assert report["score"]["symbolic_correct"]["percent"] == found[4]["accuracy"]
    assert scores(config.folder, "accuracy")[4] == found[4]["accuracy"]
    assert runs.train(config, "dp2") == lines  # nothing is left to do


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_evaluation_ends_with_the_run(model: Path, tmp_path: Path, number: int) -> None:
    """And is taken up by the next, with the answers that it had."""
    config = _watched(
        tmp_path / "run",
        model,
        train__steps=10_000,
        checkpoint__every=2,
        train__evaluate_every=2,
        checkpoint__keep=1,
        evaluation={"benchmarks": [SUMS | {"limit": 100}], "batch_size": 1, "max_new_tokens": 64},
    )
    file = tmp_path / "experiment.yaml"
    file.write_text(configuration.dump(config))
    place = config.folder / "evaluation"
    running = psutil.Popen(
        [sys.executable, str(ROOT / "mcore_sft/train.py"), "--config", str(file)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    answered = place / "step_2" / "sums" / "answers.jsonl"
    while not (answered.exists() and answered.stat().st_size) and running.poll() is None:
        time.sleep(0.05)
    everything = running.children(recursive=True)
    assert (place / "hf_step_2").is_dir()
    assert len(runs.metrics(config)) > 2
    running.send_signal(number)
    _, error = running.communicate(timeout=60)
    _, alive = psutil.wait_procs(everything, timeout=15)
    for process in alive:
        process.kill()
    assert alive == []
    assert not list(place.glob("*hf*"))
    assert (config.folder / "step_2").is_dir()
    if number == signal.SIGTERM:
        assert "the evaluation of step 2 was ended" in error
        assert "start again to go on" in error
