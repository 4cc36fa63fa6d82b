import os

import pytest

from mcore_sft.config import ConfigError, ParallelConfig
from mcore_sft.runtime.mesh import check, connect
from tests.distributed import run_ranks


def test_a_world_that_cannot_be_split_is_refused() -> None:
    check(ParallelConfig(tensor=2, pipeline=2), 8)
    with pytest.raises(ConfigError, match=r"parallel\.context 2: start a multiple of 8"):
        check(ParallelConfig(tensor=2, pipeline=2, context=2), 4)
    with pytest.raises(ConfigError, match="start a multiple of 4"):
        check(ParallelConfig(tensor=2, pipeline=2), 6)


def _place(parallel: ParallelConfig) -> tuple[int, ...]:
    with connect(parallel) as mesh:
        assert mesh.sum_over_replicas([1.0]) == [float(mesh.data.size)]
        stage = float(mesh.pipeline.rank)
        assert mesh.sum_over_world([stage * mesh.tells_loss]) == [
            float((mesh.pipeline.size - 1) * mesh.replicas.size)
        ]
        assert mesh.largest(mesh.world.rank, -mesh.world.rank) == [mesh.world.size - 1, 0]
        return (mesh.world.rank, mesh.tensor.rank, mesh.pipeline.rank, mesh.data.rank)


def test_four_processes() -> None:
    assert run_ranks(4, _place, ParallelConfig(tensor=2, pipeline=2)) == [
        (0, 0, 0, 0),
        (1, 1, 0, 0),
        (2, 0, 1, 0),
        (3, 1, 1, 0),
    ]
    assert [place[3] for place in run_ranks(4, _place, ParallelConfig(tensor=2))] == [0, 0, 1, 1]


def _axes(parallel: ParallelConfig) -> tuple[int, ...]:
    with connect(parallel) as mesh:
        assert mesh.sum_over_replicas([1.0]) == [4.0]
        return (mesh.context.rank, mesh.data.rank, mesh.replicas.rank)


def test_context_ranks_are_neighbours_and_replicas_are_context_and_data() -> None:
    assert run_ranks(4, _axes, ParallelConfig(context=2)) == [
        (0, 0, 0),
        (1, 0, 1),
        (0, 1, 2),
        (1, 1, 3),
    ]


def _place_without_launcher() -> tuple[int, ...]:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return _place(ParallelConfig())


def test_one_process_needs_no_launcher() -> None:
    assert run_ranks(1, _place_without_launcher) == [(0, 0, 0, 0)]
