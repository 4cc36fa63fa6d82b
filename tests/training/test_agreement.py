"""What the ranks compare before the first step: one error on all of them for what differs."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mcore_sft.base.errors import UserError
from mcore_sft.config import RunConfig, without_paths
from mcore_sft.runtime.launch import Launch, host
from mcore_sft.runtime.peers import Peers
from mcore_sft.training import agreement, probe
from tests import runs
from tests.distributed import run_ranks


def _refusal(configs: list[RunConfig]) -> str:
    """What a rank is told, of ranks with one configuration each."""
    launch = Launch.read()
    try:
        with Peers(launch, 10.0) as peers, agreement.agreed(configs[launch.rank], peers):
            return ""
    except UserError as error:
        return str(error)


def _refused(*configs: RunConfig) -> str:
    (told,) = set(run_ranks(len(configs), _refusal, list(configs)))
    return told


def test_ranks_that_were_started_alike_go_on(model: Path, tmp_path: Path) -> None:
    config = runs.experiment(tmp_path / "run", model)
    assert _refused(config, config) == ""
    assert not config.folder.exists()


@pytest.mark.parametrize(
    ("change", "got", "expected"),
    [
        ({"optimizer__lr": 0.5}, "0.5", "optimizer.lr"),
        ({"train__seed": 9}, "9", "train.seed"),
        ({"train__steps": 5}, "5", "train.steps"),
        ({"checkpoint__every": 7}, "7", "checkpoint.every"),
        ({"parallel__tensor": 2}, "2", "parallel.tensor"),
        ({"data__seed": 9}, "9", "data.seed"),
    ],
)
def test_a_key_that_differs_is_named_with_both_values_and_hosts(
    model: Path, tmp_path: Path, change: dict[str, Any], got: str, expected: str
) -> None:
    first = runs.experiment(tmp_path / "run", model)
    other = runs.experiment(tmp_path / "run", model, **change)
    told = _refused(first, other)
    was = without_paths(first)[expected]
    assert f"rank 1 ({host()}) differs in {expected} (got {got}" in told
    assert f"expected {was} as on {host()})" in told
    assert not first.folder.exists()


def test_paths_are_compared_by_what_lies_there(model: Path, tmp_path: Path) -> None:
    first = runs.experiment(tmp_path / "run", model)
    copies = {name: tmp_path / name for name in ("model", "data")}
    shutil.copytree(model, copies["model"])
    shutil.copytree(first.packed, copies["data"])
    changes: dict[str, Any] = {
        "model__path": str(copies["model"]),
        "data__packed": str(copies["data"]),
        "output": str(first.folder.parent / "." / first.folder.name),
    }
    other = runs.experiment(tmp_path / "run", model, **changes)
    assert without_paths(first) == without_paths(other)
    assert agreement._files(first) == agreement._files(other)


def _another_config(folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"rms_norm_eps": 0.5}))


def _another_weight(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_another_config, "config.json of model.path"),
        (_another_weight, "weights of model.path"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights of model.path"),
    ],
)
def test_other_files_are_other_files(model: Path, tmp_path: Path, change: Any, what: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    change(copy)
    records = [
        agreement._files(runs.experiment(tmp_path / "run", folder)) for folder in (model, copy)
    ]
    peers: Any = SimpleNamespace(hosts=("node0", "node0", "node1"))
    with pytest.raises(UserError, match=rf"rank 2 \(node1\) differs in {what}"):
        agreement._compare([records[0], None, records[1]], peers)
    agreement._compare([records[0], None, records[0]], peers)


def test_versions_and_sources_are_part_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = agreement._versions()
    assert mine["torch"]
    (tmp_path / "mcore_sft").mkdir()
    (tmp_path / "mcore_sft" / "a.py").write_text("LR = 1")
    monkeypatch.setattr(agreement.mcore_sft, "__file__", str(tmp_path / "mcore_sft" / "a.py"))
    other = agreement._versions()
    assert other["mcore_sft's code"] != mine["mcore_sft's code"]
    (tmp_path / "mcore_sft" / "_C.so").write_text("never compared")
    assert agreement._versions() == other
    (tmp_path / "mcore_sft" / "a.py").write_text("LR = 10")
    assert agreement._versions() != other


# --- the run's folder ---


class _Machines:
    """The peers of a machine that is not rank 0's."""

    hosts = ("node0", "node1")
    launch = Launch(rank=1, size=2, address="x")
    is_first_here = True

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def exchange(self, value: Any, decide: Any) -> Any:
        self.answers.append(value)
        return decide([None, value])


def test_a_folder_that_both_see_is_found_and_the_probe_removed(tmp_path: Path) -> None:
    peers: Any = _Machines()
    with probe.laid(tmp_path) as name:
        probe.check(tmp_path / name, peers)
        assert peers.answers == ["left"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_machine_does_not_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "LOCAL_SECONDS", 0.2)
    monkeypatch.setattr(probe, "SEEN_SECONDS", 0.2)
    peers: Any = _Machines()
    expected = "is not the same folder on node1 as on node0"
    with pytest.raises(UserError, match=expected):
        probe.check(tmp_path / ".agree-elsewhere", peers)
    assert peers.answers == ["unseen"]

    # The other machine has left its file in a folder of its own.
    with probe.laid(tmp_path) as name, pytest.raises(UserError, match=expected):
        probe._see(tmp_path / name, [None, "left"], peers)
    assert list(tmp_path.iterdir()) == []
