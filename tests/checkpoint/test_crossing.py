"""Checkpoints cross between Megatron-core's releases: two of them, one Python, one torch.

OTHER_MEGATRON names a folder that holds another release than the environment's, as `pip install
--no-deps --target FOLDER megatron-core==0.16.1` makes it; `make lane` does.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.checkpoint.export import export
from tests import runs, tiny

OTHER = os.environ.get("OTHER_MEGATRON", "")
ROOT = Path(__file__).parents[2]
LAYOUTS = ("one", "tp2_sp", "dp2_do")

pytestmark = pytest.mark.skipif(not OTHER, reason="OTHER_MEGATRON names no second Megatron-core")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four steps, saved after two: `installed` and `other` whole, then each gone on with
    by the other release from its second step."""
    found = tmp_path_factory.mktemp("crossing")
    model = tiny.make_model(found / "model", vocab_size=703)
    runs.pack_rows(runs.experiment(found / "run", model))
    paths = {"installed": str(ROOT), "other": os.pathsep.join([OTHER, str(ROOT)])}
    for one in paths:
        train_all(found, one, paths[one])
    for one, another in (("installed", "other"), ("other", "installed")):
        for layout in LAYOUTS:
            begun = found / one / layout
            crossed = found / f"{one}_to_{another}" / layout
            shutil.copytree(begun / "step_2", crossed / "step_2")
            (crossed / "latest").write_text("step_2\n", encoding="utf-8")
        train_all(found, f"{one}_to_{another}", paths[another])
    return found


def train_all(folder: Path, name: str, path: str) -> None:
    """Train on each layout in a process that sees `path`."""
    code = "import sys; from tests.checkpoint.test_crossing import go; go(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "model"), str(folder / name)],
        env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (folder / name / "version").write_text(done.stdout.splitlines()[-1], encoding="utf-8")


def go(model: str, output: str) -> None:
    """Train on each layout, then print which Megatron-core did."""
    for layout in LAYOUTS:
        changes: dict[str, Any] = {"train__steps": 4, "checkpoint__every": 2, "checkpoint__keep": 0}
        runs.train(runs.experiment(Path(output, layout), Path(model), **changes), layout)
    print(version("megatron-core"))


def test_two_releases_took_part(folder: Path) -> None:
    (other,) = (d.version for d in distributions(name="megatron-core", path=[OTHER]))
    assert (folder / "installed" / "version").read_text() == version("megatron-core") != other
    assert (folder / "other" / "version").read_text() == other
    assert (folder / "installed_to_other" / "version").read_text() == other
    assert (folder / "other_to_installed" / "version").read_text() == version("megatron-core")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("crossing", ["installed_to_other", "other_to_installed"])
def test_a_run_goes_on_under_the_other_release_bit_for_bit(
    folder: Path, crossing: str, layout: str
) -> None:
    begun = crossing.partition("_to_")[0]
    expected, found = (told(folder / name / layout)[2:] for name in (begun, crossing))
    assert len(found) == 2
    assert found == expected
    assert exported(folder / crossing / layout) == exported(folder / begun / layout)


def told(run: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; a run that went on has none of the steps before."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}
    return [by_step.get(step, (0.0, 0.0)) for step in range(1, 5)]


def exported(run: Path) -> bytes:
    """The weights of the last step as this release exports them."""
    target = run / "hf"
    if not target.exists():
        export(run / "step_4", target)
    return (target / "model.safetensors").read_bytes()
