"""A rank that hangs: the stacks of all of them, and the end."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.config import RunConfig
from mcore_sft.training import loop
from tests import runs
from tests.distributed import run_ranks


def _hangs(config: RunConfig, rank: int, seconds: float) -> None:
    batches = loop.Loader.batches

    def hang(self: Any, step: int) -> Any:
        if os.environ["RANK"] == str(rank) and step == 2:
            time.sleep(seconds)
        return batches(self, step)

    loop.Loader.batches = hang  # type: ignore[method-assign]
    loop.train(config)


def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = runs.experiment(tmp_path / "run", model, train__steps=4, train__hang_seconds=3)
    began = time.monotonic()
    with pytest.raises(AssertionError, match="died, exit code 124"):  # whatever they wait for
        run_ranks(2, _hangs, config, 1, 200.0)
    assert time.monotonic() - began < 60
    (folder,) = (config.folder / "hang").iterdir()
    stacks = {file.name: file.read_text() for file in folder.iterdir()}
    assert sorted(stacks) == ["rank_0.txt", "rank_1.txt"]
    assert "in hang" in stacks["rank_1.txt"]
    assert "in hang" not in stacks["rank_0.txt"]
    assert "in train_step" in stacks["rank_0.txt"]
    said = capfd.readouterr().err
    assert "has computed nothing for" in said
    assert f"stands in {folder}\n" in said


def test_a_run_that_goes_on_is_left_alone(model: Path, tmp_path: Path) -> None:
    """Steps that take long in all, but not between two micro-batches."""
    config = runs.experiment(tmp_path / "run", model, train__steps=4, train__hang_seconds=3)
    run_ranks(2, _hangs, config, 1, 1.5)
    assert not (config.folder / "hang").exists()
    assert len(runs.metrics(config)) == 4
