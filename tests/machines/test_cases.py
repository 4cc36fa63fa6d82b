"""What goes wrong between machines: one test, or a few, for each numbered case.

What differs between ranks ends all of them before the first step, and every node says why, once.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import parse_args

from mcore_sft import config as configuration
from tests import runs
from tests.machines import linux, patches
from tests.machines.cluster import (
    Cluster,
    Experiment,
    Started,
    codes,
    logs,
    unchanged,
    until,
)
from tests.machines.node import ROOT, Node

SOON = 10.0
LOST = r"lost rank 1 on node1 \(10\.77\.0\.2\)"
ROWS = {
    "name": "rows",
    "path": str(runs.FIXTURES / "rows.jsonl"),
    "problem": "problem",
    "answer": "expected_answer",
}
"""A benchmark."""
Make = Callable[..., Experiment]
Folders = tuple[Path, Path]


def refused(nodes: Sequence[Started], *parts: str, within: float = SOON) -> None:
    """Every rank ends with exit code 2, and each node says one sentence that has these parts."""
    assert set(codes(nodes, within).values()) == {2}, logs(nodes)
    for node in nodes:
        assert "Traceback" not in node.said
        assert len(node.errors) == 1, logs(nodes)
        assert [part for part in parts if part not in node.errors[0]] == [], logs(nodes)


def refused_as_different(nodes: Sequence[Started], *parts: str) -> None:
    """So, and both hosts are named."""
    refused(nodes, "node0", "node1", *parts)


def pair(cluster: Cluster, run: Experiment, *overrides: str, **surroundings: Any) -> list[Started]:
    """Two nodes, of which the second has overrides or surroundings of its own."""
    return cluster.start(run.node(), run.node(*overrides, **surroundings))


# --- 01: the run's folder


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_01_a_folder_that_each_node_has_for_itself_is_refused(
    cluster: Cluster, experiment: Make, two_folders: Folders, tensor: int
) -> None:
    run = experiment(train__steps=4, parallel__tensor=tensor)
    with unchanged(*two_folders):
        nodes = cluster.start(*(run.node(local={run.config.folder: disk}) for disk in two_folders))
        refused_as_different(nodes, str(run.config.folder))


def test_01_checkpoints_in_folders_that_are_not_shared_stay_as_they_were(
    cluster: Cluster, experiment: Make, two_folders: Folders, begun: Path
) -> None:
    run = experiment(train__steps=6, checkpoint__every=2, checkpoint__keep=1)
    for disk in two_folders:
        shutil.copytree(begun, disk, dirs_exist_ok=True)
    with unchanged(*two_folders):
        nodes = cluster.start(*(run.node(local={run.config.folder: disk}) for disk in two_folders))
        refused_as_different(nodes, str(run.config.folder))


def test_01_a_relative_output_in_two_working_directories_is_refused(
    cluster: Cluster, experiment: Make, two_folders: Folders
) -> None:
    run = experiment(train__steps=4)
    with unchanged(*two_folders):
        nodes = cluster.start(*(run.node("output=null", folder=disk) for disk in two_folders))
        refused_as_different(nodes, "results/equality")


# --- 02, 03: what lies under a path


@pytest.mark.parametrize(
    "parallel", [{"parallel__pipeline": 2}, pytest.param({}, marks=pytest.mark.slow)]
)
def test_02_another_dataset_under_the_same_path_is_refused(
    cluster: Cluster, experiment: Make, other_dataset: Path, parallel: dict[str, int]
) -> None:
    run = experiment(train__steps=4, **parallel)
    refused_as_different(pair(cluster, run, local={run.config.packed: other_dataset}), "dataset")


@pytest.mark.parametrize(
    ("file", "named"), [("model.safetensors", "weights"), ("config.json", "config.json")]
)
def test_03_another_model_under_the_same_path_is_refused(
    cluster: Cluster, experiment: Make, model: Path, other_model: Path, file: str, named: str
) -> None:
    run = experiment(train__steps=4)
    refused_as_different(pair(cluster, run, local={model / file: other_model / file}), named)


# --- 04, 05: the configuration


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("optimizer.lr", "0.0001", "0.002"),
        ("train.seed", "42", "43"),
        ("train.global_batch", "10", "20"),
        ("optimizer.clip_grad", "1.0", "0.5"),
        pytest.param("train.micro_batch", "1", "2", marks=pytest.mark.slow),
        pytest.param("train.precision", "fp32", "bf16", marks=pytest.mark.slow),
    ],
)
def test_04_another_value_is_refused_with_both(
    cluster: Cluster, experiment: Make, key: str, ours: str, theirs: str
) -> None:
    run = experiment(train__steps=4, optimizer__clip_grad=1.0)
    refused_as_different(pair(cluster, run, f"{key}={theirs}"), key, ours, theirs)


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("train.steps", "8", "6"),
        ("checkpoint.every", "4", "3"),
        ("train.validate_every", "4", "2"),
        ("parallel.tensor", "1", "2"),
    ],
)
def test_05_a_value_that_would_let_one_node_wait_is_refused(
    cluster: Cluster, experiment: Make, key: str, ours: str, theirs: str
) -> None:
    run = experiment(
        train__steps=8,
        checkpoint__every=4,
        train__validate_every=4,
        data__validation=[{"path": "rows.jsonl", "limit": 3}],
    )
    refused_as_different(pair(cluster, run, f"{key}={theirs}"), key, ours, theirs)


# --- 06: one node does not come


@pytest.mark.slow
def test_06_a_node_that_never_comes_is_named(cluster: Cluster, experiment: Make) -> None:
    run = experiment(train__connect_seconds=5)
    refused(cluster.start(run.node(), None), "rank 1", "train.connect_seconds", within=5 + SOON)


@pytest.mark.slow
def test_06_a_head_that_never_comes_is_named(cluster: Cluster, experiment: Make) -> None:
    run = experiment(train__connect_seconds=5)
    nodes = cluster.start(None, run.node())
    refused(nodes, "node0", "train.connect_seconds", within=5 + SOON)


@pytest.mark.slow
@pytest.mark.parametrize("typist", [0, 1])
def test_06_a_typo_on_one_node_is_said_on_both(
    cluster: Cluster, experiment: Make, typist: int
) -> None:
    run = experiment()
    node = [run.node(), run.node()]
    node[typist] = run.node("train.stepz=6")
    refused(cluster.start(*node), f"rank {typist} (node{typist})", "train.stepz")


@pytest.mark.slow
def test_06_a_model_that_one_node_lacks_is_said_on_both(
    cluster: Cluster, experiment: Make, model: Path, two_folders: Folders
) -> None:
    nodes = pair(cluster, experiment(), local={model: two_folders[1]})
    refused(nodes, "rank 1 (node1)", str(model))


# --- 07: the code


def test_07_another_version_of_our_code_is_refused(
    cluster: Cluster, experiment: Make, tmp_path: Path
) -> None:
    ours, theirs = ROOT / "mcore_sft/training/optimizer.py", tmp_path / "theirs.py"
    theirs.write_text(ours.read_text().replace("lr", "10 * lr", 1))
    refused_as_different(pair(cluster, experiment(), local={ours: theirs}), "mcore_sft")


# --- 08: the first cause is on another node


def lost(
    nodes: Sequence[Started], since: float, *parts: str, within: float = SOON
) -> dict[int, int]:
    """Rank 0 says once that it lost rank 1; returns the exit code of every rank."""
    found = codes(nodes, within, since)
    assert "Traceback" not in nodes[0].said
    assert len(nodes[0].errors) == 1, logs(nodes)
    (error,) = nodes[0].errors
    assert re.search(rf"^error: rank 0 \(node0\): {LOST}", error), error
    assert [part for part in parts if part not in error] == [], error
    return found


@pytest.mark.slow
def test_08_a_dataset_that_one_node_lacks_is_said_on_both(
    cluster: Cluster, experiment: Make, two_folders: Folders
) -> None:
    run = experiment()
    nodes = pair(cluster, run, local={run.config.packed: two_folders[1]})
    refused(nodes, "node1", str(run.config.packed))


def test_08_a_rank_that_dies_in_a_step_is_named(cluster: Cluster, experiment: Make) -> None:
    run = experiment(train__steps=4000, checkpoint__every=5)
    nodes = pair(cluster, run)
    nodes[0].wait_for(r"step +7/")
    since = time.monotonic()
    nodes[1].signal(1, signal.SIGKILL)
    found = lost(nodes, since, "in step ", "Start again to continue from step_")
    assert found == {0: 2, 1: -signal.SIGKILL}
    assert nodes[1].errors == []


def test_08_a_node_that_dies_in_a_save_is_named_and_the_run_goes_on_from_the_save_before(
    cluster: Cluster, experiment: Make
) -> None:
    run = experiment(train__steps=4, checkpoint__every=2, parallel__tensor=2)
    nodes = pair(cluster, run, patch=partial(patches.slow_save, 4, 60.0))
    assert until(lambda: list(run.config.folder.glob(".step_4*")), 30), nodes[0].said
    time.sleep(1)
    since = time.monotonic()
    nodes[1].kill()
    assert lost(nodes, since, "Start again to continue from step_2") == {0: 2}
    assert not (run.config.folder / "step_4").exists()
    assert codes(pair(cluster, run), within=60) == {0: 0, 1: 0}
    assert (run.config.folder / "step_4").exists()


@pytest.mark.slow
def test_08_the_loss_of_rank_0_is_said_by_the_others(cluster: Cluster, experiment: Make) -> None:
    run = experiment(train__steps=4000, checkpoint__every=5)
    nodes = cluster.start(run.node(), run.node(ranks=2))
    nodes[0].wait_for(r"step +7/")
    since = time.monotonic()
    nodes[0].kill()
    assert codes(nodes, SOON, since) == {1: 2, 2: 2}
    (error,) = nodes[1].errors
    assert "lost rank 0 on node0" in error


# --- 09: a whole checkpoint that one node does not see


def test_09_a_checkpoint_that_one_node_does_not_see_is_no_damage(
    cluster: Cluster, experiment: Make, two_folders: Folders, begun: Path
) -> None:
    run = experiment(train__steps=6, checkpoint__every=2)
    shutil.copytree(begun, run.config.folder, dirs_exist_ok=True)
    with unchanged(run.config.folder):
        nodes = pair(cluster, run, local={run.config.folder / "step_4": two_folders[1]})
        refused(nodes, "step_4", "node1")


@pytest.fixture
def shared(model: Path, tmp_path: Path) -> Path:
    """All that a run needs, which everybody may read, and write: /mnt of each node."""
    folder, at = tmp_path / "shared", Path("/mnt")
    shutil.copytree(model, folder / "model")
    shutil.copytree(runs.FIXTURES / "tokenizer", folder / "tokenizer")
    (folder / "run").mkdir()
    places = {"model__tokenizer": str(at / "tokenizer"), "data__root": str(at)}
    config = runs.experiment(at / "run", at / "model", train__steps=2, **places)
    (folder / "experiment.yaml").write_text(configuration.dump(config))
    open_to_all(folder)
    return folder


def open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o644)


def user(number: int, shared: Path, *overrides: str, **surroundings: Any) -> Node:
    """A node on which a user who is not root starts the run."""
    return Node(
        arguments=("--config", "/mnt/experiment.yaml", *overrides),
        local={Path("/mnt"): shared, **surroundings.pop("local", {})},
        user=number,
        environment={"HOME": "/tmp"},
        **surroundings,
    )


@pytest.mark.slow
def test_09_a_checkpoint_that_one_node_may_not_read_is_no_damage(
    cluster: Cluster, shared: Path, begun: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(begun, shared / "run", dirs_exist_ok=True))
    open_to_all(run)
    share = next((run / "step_4/weights").glob("*.distcp"))
    closed = Path(shutil.copy(share, tmp_path))
    closed.chmod(0o600)
    at = Path("/mnt") / share.relative_to(shared)
    with unchanged(run):
        nodes = cluster.start(
            user(1001, shared, "train.steps=6"),
            user(1001, shared, "train.steps=6", local={at: closed}),
        )
        refused(nodes, share.name, "node1")


# --- 10: hangs outside of the steps


@pytest.mark.slow
def test_10_a_cable_that_is_cut_while_the_ranks_load_ends_both(
    cluster: Cluster, experiment: Make
) -> None:
    run = experiment(train__hang_seconds=4)
    node = run.node(patch=partial(patches.slow_load, 4.0))
    nodes = cluster.start(node, node)
    time.sleep(4)
    since = time.monotonic()
    cluster.cut(1)
    assert codes(nodes, 1.5 * 4 + 4 + SOON, since) == {0: 124, 1: 124}
    assert "train.hang_seconds" in "".join(nodes[0].errors)


@pytest.mark.slow
def test_10_a_node_that_dies_at_its_start_ends_the_other(
    cluster: Cluster, experiment: Make
) -> None:
    nodes = pair(cluster, experiment(train__connect_seconds=5))
    time.sleep(0.3)
    nodes[1].kill()
    assert codes(nodes, 5 + SOON) == {0: 2}
    (error,) = nodes[0].errors
    assert "rank 1" in error


@pytest.mark.slow
def test_10_a_cable_that_is_cut_in_the_last_evaluation_ends_both(
    cluster: Cluster, experiment: Make
) -> None:
    run = experiment(
        train__steps=2,
        train__hang_seconds=10,
        train__evaluate_every=2,
        checkpoint__every=2,
        evaluation__benchmarks=[ROWS],
    )
    node = run.node(patch=patches.endless_evaluation)
    nodes = cluster.start(node, node)
    nodes[0].wait_for("waiting for the evaluation")
    since = time.monotonic()
    cluster.cut(1)
    assert set(codes(nodes, 1.5 * 10 + SOON, since).values()) <= {2, 124}, logs(nodes)
    assert len(nodes[0].errors) == 1, logs(nodes)


# --- 11: one node is left out


ALONE = {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
"""What torchrun tells its ranks where no other node has come."""


def test_11_a_node_of_a_slurm_job_that_is_left_alone_is_refused(
    cluster: Cluster, experiment: Make
) -> None:
    node = experiment().node(environment={**ALONE, "SLURM_NNODES": "2"})
    refused(cluster.start(node), "1 machine(s)", "expected 2 (SLURM_NNODES)")


def test_11_our_slurm_script_starts_without_a_clock(tmp_path: Path) -> None:
    """Each node is told its number and the head, and no torchrun looks how old the others are."""
    for name, does in {
        "scontrol": 'printf "node0\\nnode1\\n"',
        "srun": 'while [[ "$1" == -* ]]; do shift; done; SLURM_NODEID=1 SLURM_PROCID=1 "$@"',
        "torchrun": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    told = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    said = subprocess.run(
        [ROOT / "docs/launch/train_slurm.sh", "configs/X.yaml", "train.steps=3"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHRUN": "torchrun", **told},
        capture_output=True,
        text=True,
        check=True,
    )
    asked = parse_args(said.stdout.splitlines())
    assert (asked.rdzv_backend, asked.nnodes, asked.node_rank) == ("static", "2", 1)
    assert (asked.master_addr, asked.max_restarts) == ("node0", 0)
    assert asked.training_script_args == ["--config", "configs/X.yaml", "train.steps=3"]


# --- 12: names of hosts


def debian(number: int) -> str:
    """As its installer writes it: a machine's own name is an address that others cannot reach."""
    return f"127.0.0.1 localhost\n127.0.1.1 node{number}\n10.77.0.{2 - number} node{1 - number}\n"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["10.77.0.1", "node0"])
def test_12_a_machine_whose_own_name_is_a_loopback_address_takes_part(
    cluster: Cluster, experiment: Make, head: str
) -> None:
    run = experiment(train__steps=2)
    nodes = cluster.start(*(run.node(hosts=debian(number)) for number in (0, 1)), head=head)
    assert codes(nodes, within=60) == {0: 0, 1: 0}
    assert len(runs.metrics(run.config)) == 2


@pytest.mark.slow
def test_12_a_head_whose_name_nobody_knows_is_said(cluster: Cluster, experiment: Make) -> None:
    run = experiment(train__connect_seconds=5)
    refused(cluster.start(run.node(), run.node(), head="nowhere"), "nowhere", within=5 + SOON)


# --- 13, 18: a cable is cut in a step


@pytest.mark.slow
def test_13_a_hang_ends_ranks_that_cannot_write_their_stacks(
    cluster: Cluster, experiment: Make
) -> None:
    run = experiment(train__steps=4000, train__hang_seconds=10)
    folder = run.config.folder
    closed = partial(patches.at_step, 5, partial(linux.read_only, folder))
    nodes = pair(cluster, run, local={folder: folder}, patch=closed)
    nodes[0].wait_for(r"step +7/")
    since = time.monotonic()
    cluster.cut(1)
    # Rank 0 waits 20 s for the stacks of rank 1.
    assert codes(nodes, 10 + 20 + SOON, since) == {0: 124, 1: 124}
    assert "train.hang_seconds" in "".join(nodes[0].errors)
    assert ["Traceback" in node.said for node in nodes] == [False, False]


@pytest.mark.slow
def test_18_a_cable_that_is_cut_in_a_step_is_a_loss_after_a_minute(
    cluster: Cluster, experiment: Make
) -> None:
    run = experiment(train__steps=4000, checkpoint__every=5)
    nodes = pair(cluster, run)
    nodes[0].wait_for(r"step +7/")
    since = time.monotonic()
    cluster.cut(1)
    found = lost(nodes, since, "in step ", "Start again to continue from step_", within=75)
    assert found == {0: 2, 1: 2}
    (error,) = nodes[1].errors
    assert "lost rank 0 on node0" in error


# --- 14: restarts and growth by torchrun


@pytest.mark.parametrize(
    ("environment", "named"),
    [({"TORCHELASTIC_MAX_RESTARTS": "3"}, "--max-restarts"), (ALONE, "train.nodes")],
)
def test_14_restarts_and_growth_are_refused_at_the_start(
    cluster: Cluster, experiment: Make, environment: dict[str, str], named: str
) -> None:
    node = experiment(train__nodes=2).node(environment=environment)
    refused(cluster.start(node), named)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1")


@pytest.mark.slow
def test_14_torchrun_with_restarts_is_refused(cluster: Cluster, experiment: Make) -> None:
    run = experiment()
    head = ("--nnodes", "2", "--max-restarts", "3", "--master-addr", "node0")
    nodes = cluster.start(
        *(
            Node(command=(*TORCHRUN, *head, "--node-rank", str(number), *script(run)), folder=ROOT)
            for number in (0, 1)
        )
    )
    assert codes(nodes, within=120) == {0: 1, 1: 1}  # torchrun's own
    assert all("--max-restarts" in error for node in nodes for error in node.errors[:1])
    assert run.config.folder.exists()


@pytest.mark.slow
def test_14_torchrun_that_would_begin_with_fewer_nodes_is_refused(
    cluster: Cluster, experiment: Make
) -> None:
    run = experiment(train__nodes=2)
    growing = ("--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500")
    command = (*TORCHRUN, *growing, "--rdzv-conf", "last_call_timeout=2", *script(run))
    nodes = cluster.start(Node(command=command, folder=ROOT))
    assert codes(nodes, within=120) == {0: 1}
    assert "train.nodes" in nodes[0].errors[0]


def script(run: Experiment) -> tuple[str, ...]:
    return (str(ROOT / "mcore_sft/train.py"), *run.arguments)


# --- 15: an error of all ranks


@pytest.mark.slow
def test_15_an_error_of_all_ranks_is_said_once_on_each_node(
    cluster: Cluster, experiment: Make
) -> None:
    four = experiment(train__global_batch=900_000).node(ranks=2)
    nodes = cluster.start(four, four)
    refused(nodes, "train.global_batch")
    for node in nodes:
        assert re.search(r"rank \d \(node\d\)", node.errors[0]), node.errors


# --- 16: other users


@pytest.mark.slow
def test_16_two_nodes_of_one_user_who_is_not_root_train(cluster: Cluster, shared: Path) -> None:
    nodes = cluster.start(user(1001, shared), user(1001, shared))
    assert codes(nodes, within=60) == {0: 0, 1: 0}


@pytest.mark.slow
def test_16_another_user_on_one_node_is_refused(cluster: Cluster, shared: Path) -> None:
    nodes = cluster.start(user(1001, shared), user(1002, shared))
    refused(nodes, "rank 1 (node1)", "/mnt/run")


@pytest.mark.slow
def test_16_a_lock_of_another_user_is_said(cluster: Cluster, shared: Path) -> None:
    lock = shared / "run/.lock"
    lock.touch(0o644)
    nodes = cluster.start(user(1001, shared), user(1001, shared))
    refused(nodes, "/mnt/run/.lock")


@pytest.mark.slow
def test_16_weights_that_one_node_cannot_read_are_named(
    cluster: Cluster, shared: Path, tmp_path: Path
) -> None:
    weights = Path("/mnt/model/model.safetensors")
    closed = Path(shutil.copy(shared / "model" / weights.name, tmp_path))
    closed.chmod(0o600)
    nodes = cluster.start(user(1001, shared), user(1001, shared, local={weights: closed}))
    refused(nodes, "rank 1 (node1)", str(weights))


@pytest.mark.slow
def test_16_a_folder_that_one_node_cannot_write_is_named(
    cluster: Cluster, experiment: Make
) -> None:
    run = experiment(train__steps=2)
    folder = run.config.folder
    nodes = pair(cluster, run, local={folder: folder}, read_only=(folder,))
    refused(nodes, "node1", str(folder))


# --- 17: rank 0 is elsewhere at the second start


def test_17_shards_of_folders_that_are_not_shared_are_not_swept(
    cluster: Cluster, experiment: Make, two_folders: Folders, begun: Path
) -> None:
    run = experiment(train__steps=6, checkpoint__every=2)
    for disk in two_folders:
        shutil.copytree(begun / "step_4", disk / ".step_4.tmp")
    first, second = ({run.config.folder: disk} for disk in two_folders)
    with unchanged(*two_folders):
        nodes = cluster.start(
            run.node(local=first, first=1), run.node(local=second, first=0), head="node1"
        )
        refused_as_different(nodes, str(run.config.folder))
