"""Two runs at once in one folder."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.base.errors import UserError
from mcore_sft.training.alone import alone


def _hold(folder: Path, end: Any) -> None:
    with alone(folder):
        # What a run leaves behind that is killed, such as a writer.
        multiprocessing.get_context("fork").Process(target=end.recv).start()
        end.send(None)
        end.recv()


def test_the_second_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    first = context.Process(target=_hold, args=(tmp_path / "run", theirs))
    first.start()
    ours.recv()
    try:
        with (
            pytest.raises(UserError, match=rf"training there \(process {first.pid} on \S+\)\. Fix"),
            alone(tmp_path / "run"),
        ):
            pass
        first.kill()
        first.join()
        with alone(tmp_path / "run"):
            pass
    finally:
        first.kill()
        ours.send(None)
