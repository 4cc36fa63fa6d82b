import os

import pytest
import torch

from tests import distributed


def _strange() -> tuple[int, str]:
    os.environ["LEFT_BEHIND"] = "1"
    torch.use_deterministic_algorithms(True)
    return os.getpid(), os.environ["WORLD_SIZE"]


def test_a_rank_that_is_alone_on_a_gpu_runs_here_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = dict(os.environ)
    assert distributed.run_ranks(1, _strange)[0][0] != os.getpid()
    monkeypatch.setattr(distributed, "METHOD", "spawn")
    assert distributed.run_ranks(1, _strange) == [(os.getpid(), "1")]
    assert dict(os.environ) == before
    assert not torch.are_deterministic_algorithms_enabled()
