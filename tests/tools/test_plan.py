import json
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_sft.plan.layout import Layout
from tests.tiny import make_model

CONFIG = "configs/llama31_8b_openmathinstruct2.yaml"


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("plan") / "model", num_key_value_heads=4)


def test_a_plan_is_a_table_and_a_file(model, tmp_path):
    command = ("tools/plan.py", "--config", CONFIG, f"model.path={model}", "--gpus", 8)
    ran = call(*command, "--gpu", "h100", "--top", 3, "--json", tmp_path / "plan.json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "on 8 x h100" in ran.stdout
    assert "nothing is measured" in ran.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["configured"]["layout"]["tensor"] == 4
    own = found["configured"]
    assert own["run_hours"] == pytest.approx(own["seconds"] * 60_000 / 3600)
    assert own["tokens_per_second_per_gpu"] == pytest.approx(64 * 4096 / 8 / own["seconds"])
    assert len(found["layouts"]) > 3
    for row in found["layouts"][:3]:
        keys = Layout(**row["layout"]).keys
        for key, value in keys.items():
            assert f"{key}={str(value).lower()}" in ran.stdout
        assert keys or "the defaults" in ran.stdout


@pytest.mark.parametrize(
    ("gpu", "layers", "told"),
    [("a100-80", "auto", True), ("a100-80", "local", False), ("h200", "auto", False)],
)
def test_a_plan_tells_which_gpus_need_flash_attn(model, gpu, layers, told):
    keys = (f"model.path={model}", f"model.layers={layers}")
    ran = call("tools/plan.py", "--config", CONFIG, *keys, "--gpus", 8, "--gpu", gpu)
    assert ran.returncode == 0, ran.stderr
    assert ("documents of a pack needs flash-attn" in ran.stdout) == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", 8, "--gpu", "h1000"), "--gpu h1000: expected one of a100-40"),
        ((), "required: --gpus"),
        (("--gpus", 6), "6 GPU(s) cannot be split into parallel.tensor 4"),
        (("--gpus", 0), "expected a whole number, 1 or more; given '0'"),
        (("--gpus", 8, "--efficiency", 2), "expected a share above 0, at most 1; given '2'"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(model, arguments, message):
    ran = call("tools/plan.py", "--config", CONFIG, f"model.path={model}", *arguments)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_configuration_is_printed_whatever_the_gpus():
    ran = call("tools/plan.py", "--config", CONFIG, "--print-config", "train.steps=7")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "steps: 7" in ran.stdout


def test_a_dry_run_counts_the_real_objects(model):
    train = ("mcore_sft/train.py", "--config", CONFIG, f"model.path={model}")
    ran = call(*train, "--dry-run", "--gpus", 8)
    assert ran.returncode == 0, ran.stderr
    assert "on 8 GPU(s)" in ran.stdout
    assert "from the real objects" in ran.stdout
    refused = call(*train, "--gpus", 8)
    assert "--gpus goes with --dry-run" in refused.stderr
    refused = call(*train, "--dry-run", "--gpus", 0)
    assert "expected a whole number, 1 or more; given '0'" in refused.stderr
