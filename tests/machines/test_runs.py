"""Runs on several machines that end well, or stop and go on: the same numbers as on one."""

import json
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.checkpoint.manifest import verify
from mcore_sft.checkpoint.retention import steps
from tests import runs
from tests.machines import patches
from tests.machines.cluster import Cluster, Experiment, codes

Make = Callable[..., Experiment]


def numbers(run: Experiment) -> list[tuple[Any, ...]]:
    """Step, loss and norm of the gradient, to the last bit."""
    kept = ("step", "loss", "grad_norm")
    return [tuple(line[key] for key in kept) for line in runs.metrics(run.config)]


def weights(step: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((step / "weights").glob("*.distcp"))}


def test_two_nodes_of_two_ranks_learn_what_one_process_learns(
    cluster: Cluster, experiment: Make, reference_run: list[dict[str, float]]
) -> None:
    run = experiment(train__steps=6, parallel__tensor=2)
    node = run.node(ranks=2)
    nodes = cluster.start(node, node)
    assert codes(nodes, within=60) == dict.fromkeys(range(4), 0)
    found = runs.metrics(run.config)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(found, reference_run, strict=False):
        assert runs.relative(ours["loss"], theirs["loss"]) < 1e-6
    assert [path.name for path in steps(run.config.folder)] == ["step_6"]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A run of two ranks on one machine that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = runs.experiment(folder, model, train__steps=16, checkpoint__every=4)
    runs.train(config, "dp2")
    return Experiment(config=config, arguments=())


@pytest.mark.slow
def test_a_cable_that_is_out_for_five_seconds_changes_no_bit(
    cluster: Cluster, experiment: Make, whole: Experiment
) -> None:
    run = experiment(train__steps=16, checkpoint__every=4)
    nodes = cluster.start(run.node(), run.node())
    nodes[0].wait_for(r"step +5/")
    cluster.cut(1)
    time.sleep(1)
    before = len(runs.metrics(run.config))
    time.sleep(4)
    assert len(runs.metrics(run.config)) == before
    cluster.mend(1)
    assert codes(nodes, within=90) == {0: 0, 1: 0}
    assert numbers(run) == numbers(whole)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_bits(
    cluster: Cluster, experiment: Make, whole: Experiment
) -> None:
    run = experiment(train__steps=16, checkpoint__every=4)
    nodes = cluster.start(run.node(), run.node())
    nodes[0].wait_for(r"step +11/")
    for node in nodes:
        node.kill()
    nodes = cluster.start(run.node(), run.node())
    nodes[0].wait_for("resumed after step (4|8)")
    assert codes(nodes, within=60) == {0: 0, 1: 0}
    assert numbers(run) == numbers(whole)
    last = "step_16"
    assert weights(run.config.folder / last) == weights(whole.config.folder / last)


@pytest.mark.slow
def test_sigterm_to_one_node_saves_once_and_ends_both(cluster: Cluster, experiment: Make) -> None:
    run = experiment(train__steps=4000)
    node = run.node(ranks=2)
    nodes = cluster.start(node, node)
    nodes[0].wait_for(r"step +3/")
    since = time.monotonic()
    for rank in (2, 3):
        nodes[1].signal(rank, signal.SIGTERM)
    assert codes(nodes, 30, since) == dict.fromkeys(range(4), 75)
    (saved,) = steps(run.config.folder)
    assert verify(saved)["progress"]["step"] == len(runs.metrics(run.config))
    stopped = [line for node in nodes for line in node.said.splitlines() if "SIGTERM came" in line]
    assert len(stopped) == 1


@pytest.mark.slow
def test_a_rank_that_holds_the_lock_of_python_for_long_is_not_lost(
    cluster: Cluster, experiment: Make
) -> None:
    run = experiment(train__steps=4)
    busy = partial(patches.at_step, 2, partial(patches.hold_the_lock, 50))
    nodes = cluster.start(run.node(), run.node(patch=busy))
    assert codes(nodes, within=120) == {0: 0, 1: 0}
    assert [node.errors for node in nodes] == [[], []]
    assert max(line["step_seconds"] for line in runs.metrics(run.config)) > 45


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_replicas_that_differ_end_the_run_before_a_checkpoint_has_its_name(
    cluster: Cluster, experiment: Make, tensor: int
) -> None:
    run = experiment(train__steps=8, checkpoint__every=4, parallel__tensor=tensor)
    differs = partial(patches.weight_differs, 7)
    nodes = cluster.start(run.node(), run.node(patch=differs))
    assert codes(nodes, within=60) == {0: 2, 1: 2}
    assert [path.name for path in steps(run.config.folder)] == ["step_4"]
    for node in nodes:
        (error,) = node.errors
        assert "node0" in error
        assert "node1" in error
    manifest = json.loads((run.config.folder / "step_4/manifest.json").read_text())
    assert manifest["progress"]["step"] == 4
