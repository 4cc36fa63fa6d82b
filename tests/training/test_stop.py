import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mcore_sft import config as configuration
from mcore_sft.checkpoint.manifest import verify
from mcore_sft.checkpoint.retention import scores, steps
from mcore_sft.command import Stopped
from mcore_sft.config import RunConfig
from mcore_sft.training import loop
from mcore_sft.training.stop import Stop, reason
from tests import runs
from tests.distributed import run_ranks


def test_what_is_asked() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Stop(None) as stop:
        assert stop.asked == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert reason(stop.asked) == "SIGUSR1 came"
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert reason(stop.asked) == "SIGTERM came"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_clock() -> None:
    stop = Stop(0.05 / 60)
    assert stop.asked == 0
    time.sleep(0.06)
    assert reason(stop.asked) == "train.max_minutes are over"


def _stopped(config: RunConfig, rank: int, number: int, step: int) -> str:
    """Train, with a signal that reaches one rank alone within a step."""
    batches = loop.Loader.batches

    def hears(self: Any, at: int) -> Any:
        if os.environ["RANK"] == str(rank) and at == step:
            os.kill(os.getpid(), number)
        return batches(self, at)

    loop.Loader.batches = hears  # type: ignore[method-assign]
    try:
        loop.train(config)
    except Stopped as stopped:
        return str(stopped)
    return "finished"


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "USR1")]
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    model: Path, reference_run: list[dict[str, float]], tmp_path: Path, number: int, name: str
) -> None:
    config = runs.experiment(tmp_path / "run", model, train__steps=5)
    told = run_ranks(2, _stopped, config, 1, number, 2)
    assert told[0] == told[1]
    assert f"{name} came; saved after step 3 of 5, start again to go on" in told[0]
    assert [path.name for path in steps(config.folder)] == ["step_3"]
    assert verify(config.folder / "step_3")["progress"]["step"] == 3
    resumed = runs.train(config, "dp2")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(resumed, reference_run, strict=False):
        assert runs.relative(ours["loss"], theirs["loss"]) < 1e-4


def test_a_signal_within_the_last_step_is_no_stop(model: Path, tmp_path: Path) -> None:
    config = runs.experiment(tmp_path / "run", model, train__steps=2)
    assert run_ranks(1, _stopped, config, 0, signal.SIGTERM, 1) == ["finished"]
    assert [path.name for path in steps(config.folder)] == ["step_2"]


def test_a_validation_that_a_stop_left_out_is_made_up(model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data__validation": [{"path": "rows.jsonl", "limit": 3}],
        "data__packed": str(tmp_path / "packed"),
        "train__validate_every": 2,
        "train__steps": 4,
        "checkpoint__every": 2,
    }
    whole = runs.experiment(tmp_path / "whole", model, **changes)
    runs.pack_rows(whole)
    expected = [line.get("validation_loss") for line in runs.train(whole, "dp2")]
    assert [x is None for x in expected] == [True, True, False, True, True, False]
    config = runs.experiment(tmp_path / "run", model, **changes)
    for number, step in ((signal.SIGTERM, 1), (signal.SIGUSR1, 3)):
        for told in run_ranks(2, _stopped, config, 1, number, step):
            assert f"came; saved after step {step + 1} of 4, start again to go on" in told
        assert runs.metrics(config)[-1]["step"] == step + 1
        assert "validation_loss" not in runs.metrics(config)[-1]
    found = [line.get("validation_loss") for line in runs.train(config, "dp2")]
    assert found == expected
    assert scores(config.folder, "validation_loss") == scores(whole.folder, "validation_loss")


def test_a_run_whose_time_is_over_saves(model: Path, tmp_path: Path) -> None:
    config = runs.experiment(tmp_path / "run", model, train__steps=3, train__max_minutes=1e-6)
    (told,) = run_ranks(1, _stopped, config, 0, signal.SIGTERM, -1)
    assert told == "train.max_minutes are over; saved after step 1 of 3, start again to go on"
    assert [path.name for path in steps(config.folder)] == ["step_1"]


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("launch", "number"),
    [
        pytest.param(["python"], signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(["python"], signal.SIGUSR1, marks=pytest.mark.slow),
        (["torchrun", "--standalone", "--nproc-per-node=2"], signal.SIGUSR1),
        pytest.param(
            ["torchrun", "--standalone", "--nproc-per-node=2"],
            signal.SIGTERM,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["torchrun", "--standalone", "--nproc-per-node=2"],
            signal.SIGHUP,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["alone-TERM", "alone-USR1", "torchrun-USR1", "torchrun-TERM", "torchrun-HUP"],
)
def test_a_signal_to_every_process(
    model: Path, tmp_path: Path, launch: list[str], number: int
) -> None:
    """As Slurm sends it: to writers too, and to torchrun, which ignores SIGUSR1 where the shell
    before it did."""
    config = runs.experiment(tmp_path / "run", model, train__steps=10_000, checkpoint__every=3)
    file = tmp_path / "experiment.yaml"
    file.write_text(configuration.dump(config))
    launcher = [str(Path(sys.executable).with_name(launch[0])), *launch[1:]]
    program = [*launcher, str(ROOT / "mcore_sft/train.py"), "--config", str(file)]
    running = psutil.Popen(
        ["sh", "-c", 'trap "" USR1; exec "$@"', "sh", *program],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = config.folder / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 4) and running.poll() is None:
        time.sleep(0.05)
    everything = [*running.children(recursive=True), running]
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    try:
        _, error = running.communicate(timeout=60)
    finally:
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    last = steps(config.folder)[0]
    name, step = signal.Signals(number).name, last.name.removeprefix("step_")
    assert f"stopped: {name} came; saved after step {step} of 10000, start again to go on" in error
    assert (config.folder / "latest").read_text() == f"{last.name}\n"
    assert verify(last)["progress"]["step"] == int(step)
    assert running.returncode == (75 if launch == ["python"] else 1)
