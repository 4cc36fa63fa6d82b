"""4: the packs of a step are a function of configuration and dataset, on every layout."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mcore_sft import config as configuration
from mcore_sft.config import ConfigError, ParallelConfig
from mcore_sft.data.packs.batch import collate
from mcore_sft.data.packs.pack import Pack
from mcore_sft.model import families
from mcore_sft.plan.layout import Layout
from mcore_sft.training.beside.metrics import Metrics
from tests import runs, tiny

RECIPE = Path("configs/llama31_8b_openmathinstruct2.yaml")
PACKS = 5
EXAMPLES = 13
"""As many as PACKS hold, and no multiple of two ranks or stages."""


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on one process, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    runs.train(experiment(folder, model))
    return folder


def experiment(folder: Path, model: Path, **changes: Any) -> Any:
    given = {"train__steps": 2, "train__global_batch": EXAMPLES, "checkpoint__every": 1, **changes}
    return runs.experiment(folder, model, **given)


def assert_same_steps(found: list[dict[str, Any]], folder: Path) -> None:
    """As the run in `folder` has taken them on one process."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for ours, theirs in zip(found, map(json.loads, lines), strict=True):
        for count in ("step", "examples", "tokens", "supervised_tokens"):
            assert ours[count] == theirs[count]
        assert runs.relative(ours["loss"], theirs["loss"]) < 1e-5
        assert runs.relative(ours["grad_norm"], theirs["grad_norm"]) < 1e-4


def test_04_packs_of_a_step_are_the_same_on_every_layout(
    model: Path, tmp_path: Path, alone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two stages of two chunks take the five micro-batches in one group of three and one of two."""
    config = experiment(tmp_path / "run", model, checkpoint__every=0)
    assert_same_steps(runs.train(config, "pp2_vp2"), alone)
    said = "5 packs a step (about 13 examples) and 0 % empty packs, "
    assert said in capfd.readouterr().err


def test_04_a_run_that_stopped_on_one_process_goes_on_on_two(
    model: Path, tmp_path: Path, alone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the packs a step that its checkpoint records, whatever is asked for now.

    The sixth pack of the two ranks is empty.
    """
    config = experiment(tmp_path / "run", model, train__global_batch=40)
    config.folder.mkdir()
    shutil.copytree(alone / "step_1", config.folder / "step_1")
    shutil.copyfile(alone / "metrics.jsonl", config.folder / "metrics.jsonl")
    assert_same_steps(runs.train(config, "dp2"), alone)
    said = capfd.readouterr().err
    named = "17 % empty packs (none with train.packs=4 train.global_batch=null), "
    assert f"{PACKS} packs a step (about 13 examples) and {named}" in said
    assert f"this run has taken {PACKS} packs a step so far and goes on so" in said
    assert "asks for 16" in said
    manifest = json.loads((config.folder / "step_2" / "manifest.json").read_text())
    assert manifest["progress"]["fixed"]["packs of a step"] == PACKS


def test_04_train_packs_states_packs_per_step(model: Path, tmp_path: Path) -> None:
    stated = experiment(
        tmp_path / "run", model, train__steps=1, train__global_batch=None, train__packs=7
    )
    assert (stated.train.packs, stated.train.global_batch) == (7, None)
    runs.train(stated)
    manifest = json.loads((stated.folder / "step_1" / "manifest.json").read_text())
    assert manifest["progress"]["fixed"]["packs of a step"] == 7
    assert configuration.parse(yaml.safe_load(configuration.dump(stated))) == stated


def test_04_train_packs_and_a_stated_global_batch_exclude_each_other() -> None:
    tree: dict[str, Any] = {"name": "x", "model": {"path": "none"}, "train": {"global_batch": 512}}
    with pytest.raises(ConfigError, match=r"packs: 64 and global_batch: 512 are two sizes"):
        configuration.parse(tree, ["train.packs=64"])
    stated = configuration.parse(tree, ["train.packs=64", "train.global_batch=null"])
    assert (stated.train.packs, stated.train.global_batch) == (64, None)
    assert configuration.parse({**tree, "train": {}}).train.global_batch == 512


def test_04_the_plan_gives_the_share_of_empty_packs(tmp_path: Path) -> None:
    """59 packs at DP 48: the nearest count that fills the layout is named."""
    shape = tiny.make_model(tmp_path / "model")
    words = ["train.packs=59", "train.global_batch=null", f"model.path={shape}"]
    command = [sys.executable, "tools/plan.py", "--config", str(RECIPE), "--gpus", "48", *words]
    whole = ["parallel.tensor=1", "parallel.sequence=false", "--json", str(tmp_path / "plan.json")]
    ran = subprocess.run([*command, *whole], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "59 packs a step and 39 % empty packs (none with train.packs=48 " in ran.stdout
    rows = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert {row["packs"] for row in rows} == {59}
    assert str(Layout(data=16).filling(59)) == "8 % empty packs"


def test_04_mfu_counts_real_packs_only(model: Path) -> None:
    """Neither an empty pack nor what a pack is filled up with is work."""
    mesh = SimpleNamespace(context=SimpleNamespace(size=1), world=SimpleNamespace(size=2))
    here: Any = SimpleNamespace(architecture=families.read(model), peak=1e12, mesh=mesh)
    result: Any = SimpleNamespace(tokens=101, supervised=90)
    pack = tiny.make_pack([20, 31, 50], seed=1)
    found = [
        Metrics._mfu(here, result, batches, 1.0)
        for batches in (
            [collate([pack], 101, pad_id=0)],
            [collate([pack], 512, pad_id=0)],
            [collate([pack], 512, pad_id=0), collate([Pack.empty()], 512, pad_id=0)],
        )
    ]
    assert found[0] == found[1] == found[2]


def test_04_groups_of_micro_batches_are_the_smallest_that_megatron_core_accepts() -> None:
    from mcore_sft.training.interleaving import group_size

    for stages in range(2, 9):
        for micro_batches in range(stages, 40):
            accepted = [
                size
                for size in range(stages, micro_batches + 1)
                if micro_batches % size == 0 or micro_batches % size >= stages
            ]
            assert group_size(micro_batches, stages) == accepted[0]
    assert ParallelConfig(pipeline=4, virtual=2).fewest_micro_batches == 4
