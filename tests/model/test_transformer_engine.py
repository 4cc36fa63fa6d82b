"""The model of Transformer Engine's layers, in a process that imports a stand-in for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_with_a_stand_in() -> None:
    _run("not slow")


@pytest.mark.slow
def test_with_a_stand_in_on_more_layouts() -> None:
    _run("slow")


def _run(which: str) -> None:
    paths = [str(TESTS / "stand_ins"), str(TESTS.parent)]
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", which),
            str(TESTS / "model" / "transformer_engine_checks.py"),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
