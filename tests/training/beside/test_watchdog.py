"""A rank that hangs: the stacks of all of them, and the end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mcore_sft.checkpoint import writer
from mcore_sft.config import RunConfig
from mcore_sft.runtime.launch import Launch
from mcore_sft.training import loop
from mcore_sft.training.beside.watchdog import Watchdog
from tests import runs
from tests.distributed import run_ranks


def _hangs(config: RunConfig, rank: int, seconds: float | None) -> None:
    """Rank `rank` does nothing for so many seconds; without them it is stopped."""
    batches = loop.Loader.batches

    def hang(self: Any, step: int) -> Any:
        if os.environ["RANK"] == str(rank) and step == 2:
            if seconds is None:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(seconds or 200.0)
        return batches(self, step)

    loop.Loader.batches = hang  # type: ignore[method-assign]
    loop.train(config)


@pytest.mark.parametrize("seconds", [200.0, pytest.param(None, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], seconds: float | None
) -> None:
    config = runs.experiment(tmp_path / "run", model, train__steps=4, train__hang_seconds=3)
    began = time.monotonic()
    with pytest.raises(AssertionError, match="died, exit code 124"):  # whatever they wait for
        run_ranks(2, _hangs, config, 1, seconds)
    assert time.monotonic() - began < 60
    (folder,) = (config.folder / "hang").iterdir()
    stacks = {file.name: file.read_text() for file in folder.iterdir()}
    assert sorted(stacks) == ["rank_0.txt", "rank_1.txt"]
    assert "in hang" in stacks["rank_1.txt"]
    assert "in hang" not in stacks["rank_0.txt"]
    assert "in gradients" in stacks["rank_0.txt"]
    said = capfd.readouterr().err
    assert "has computed nothing for" in said
    assert f"stands in {folder}\n" in said


def _waits_for_a_writer_that_hangs(config: RunConfig) -> None:
    write = writer._write

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return write(*arguments)

    writer._write = stopped
    end = os._exit

    def end_both(code: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        end(code)

    os._exit = end_both  # type: ignore[assignment]
    loop.train(config)


@pytest.mark.slow
def test_a_writer_that_hangs_ends_the_run(model: Path, tmp_path: Path) -> None:
    config = runs.experiment(tmp_path / "run", model, train__steps=1, train__hang_seconds=3)
    with pytest.raises(AssertionError, match="died, exit code 124"):
        run_ranks(1, _waits_for_a_writer_that_hangs, config)


def test_a_run_that_goes_on_is_left_alone(model: Path, tmp_path: Path) -> None:
    """Steps that take long in all, but not between two micro-batches."""
    config = runs.experiment(tmp_path / "run", model, train__steps=4, train__hang_seconds=3)
    run_ranks(2, _hangs, config, 1, 1.5)
    assert not (config.folder / "hang").exists()
    assert len(runs.metrics(config)) == 4


def _is_suspended(config: RunConfig, seconds: float) -> None:
    batches = loop.Loader.batches

    def stop(self: Any, step: int) -> Any:
        if step == 1:
            subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        return batches(self, step)

    loop.Loader.batches = stop  # type: ignore[method-assign]
    loop.train(config)


def test_a_run_that_is_suspended_goes_on(model: Path, tmp_path: Path) -> None:
    config = runs.experiment(tmp_path / "run", model, train__steps=2, train__hang_seconds=1.5)
    run_ranks(1, _is_suspended, config, 3.0)
    assert not (config.folder / "hang").exists()
    assert len(runs.metrics(config)) == 2


_NEVER_ENDS = """
import faulthandler, os, re, signal
memory = os.memfd_create("stacks of RUN rank 1.")
faulthandler.register(signal.SIGUSR2, file=memory)
print(memory, flush=True)
re.match("(a+)+b", "a" * 50)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_that_cannot_write_its_stacks_is_made_to(tmp_path: Path, stopped: bool) -> None:
    """It never gives up the lock of Python; stopped, it does nothing at all."""
    peers: Any = SimpleNamespace(launch=Launch())
    watchdog = Watchdog(tmp_path / "RUN", 3.0, peers)
    watchdog._folder.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", _NEVER_ENDS], stdout=subprocess.PIPE, text=True
    ) as hung:
        assert hung.stdout is not None
        place = f"/proc/{hung.pid}/fd/{int(hung.stdout.readline())}"
        watchdog._places = [place, place]
        watchdog._make_speak(0)  # this is no rank 0, and is left alone
        if stopped:
            hung.send_signal(signal.SIGSTOP)
        stacks = watchdog._folder / "rank_1.txt"
        end = time.monotonic() + 30
        while not stacks.exists() and time.monotonic() < end:
            watchdog._make_speak(1)
            time.sleep(0.05)
        hung.kill()
    assert 'File "<string>", line' in stacks.read_text()
    assert [file.name for file in watchdog._folder.iterdir()] == ["rank_1.txt"]
