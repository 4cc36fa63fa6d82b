"""The other commands on several machines: each needs what it reads, and no node that trained."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_sft.data import manifest
from tests import runs
from tests.machines.cluster import Cluster, Experiment, codes, logs
from tests.machines.node import ROOT, Node

Make = Callable[..., Experiment]


def command(tool: str, *words: str, **surroundings: object) -> Node:
    return Node(
        command=(sys.executable, str(ROOT / "tools" / tool), *words), folder=ROOT, **surroundings
    )


@pytest.mark.slow
def test_shards_that_two_nodes_prepare_are_merged_into_the_dataset_of_one(
    cluster: Cluster, experiment: Make, tmp_path: Path
) -> None:
    run = experiment(data__packed=str(tmp_path / "packed"))
    prepare = (*run.arguments, "--overwrite")
    shards = [command("preprocess.py", *run.arguments, "--shard", f"{n}/2") for n in (0, 1)]
    nodes = cluster.start(*shards)
    assert codes(nodes, within=90) == {0: 0, 1: 0}, logs(nodes)
    nodes = cluster.start(command("preprocess.py", *run.arguments, "--merge", "2"))
    assert codes(nodes, within=60) == {0: 0}, logs(nodes)
    merged = manifest.read(run.config.packed)
    nodes = cluster.start(command("preprocess.py", *prepare))
    assert codes(nodes, within=60) == {0: 0}, logs(nodes)
    assert manifest.read(run.config.packed)["fingerprint"] == merged["fingerprint"]


@pytest.mark.slow
def test_a_node_that_never_trained_exports_and_evaluates(
    cluster: Cluster, begun: Path, model: Path, tmp_path: Path
) -> None:
    """It has neither the base model nor the dataset, which lies beside that."""
    empty = tmp_path / "empty"
    empty.mkdir()
    away = {model: empty}
    export = ("--checkpoint", str(begun / "step_4"), "--output", str(tmp_path / "hf"))
    nodes = cluster.start(command("to_hf.py", *export, local=away))
    assert codes(nodes, within=90) == {0: 0}, logs(nodes)
    shutil.copy(runs.FIXTURES / "rows.jsonl", tmp_path / "rows.jsonl")
    benchmark = (
        f"evaluation.benchmarks=[{{name: rows, path: {tmp_path / 'rows.jsonl'}, limit: 2, "
        "problem: problem, answer: expected_answer}]"
    )
    evaluate = (
        *("--model", str(tmp_path / "hf"), "--benchmark", "rows"),
        *("--output", str(tmp_path / "scored"), benchmark, "evaluation.max_new_tokens=4"),
    )
    nodes = cluster.start(command("evaluate.py", *evaluate, local=away))
    assert codes(nodes, within=120) == {0: 0}, logs(nodes)
    (report,) = (tmp_path / "scored").rglob("report.json")
    assert json.loads(report.read_text())["score"]
