import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

from mcore_sft.base.errors import UserError
from mcore_sft.runtime import megatron_core

ROOT = Path(__file__).parents[2]
IMPORTERS = sorted(
    path
    for path in (ROOT / "mcore_sft").rglob("*.py")
    if "from megatron" in path.read_text(encoding="utf-8")
)


def test_known_releases_are_accepted_and_others_refused() -> None:
    megatron_core.check_version()
    for known in ("0.16.1", "0.16.0", "0.19.0", "0.19.2", "0.19.2+cuda"):
        megatron_core.check_version(Version(known))
    for other in ("0.15.3", "0.17.1", "0.18.2", "0.20.0", "1.0"):
        with pytest.raises(UserError, match=rf"megatron-core {other} is installed"):
            megatron_core.check_version(Version(other))


@pytest.mark.parametrize("path", IMPORTERS, ids=lambda path: path.stem)
def test_megatron_is_imported_after_the_file_that_makes_it_importable(path: Path) -> None:
    assert first_of(path, set()) == "ours"


def first_of(path: Path, seen: set[Path]) -> str | None:
    """Whether a file first imports `ours`, runtime/megatron_core.py, or `theirs`, however deep."""
    if path in seen:
        return None
    seen.add(path)
    if path.name == "megatron_core.py":
        return "ours"
    for name in imported(path):
        if name.split(".")[0] == "megatron":
            return "theirs"
        file = ROOT / (name.replace(".", "/") + ".py")
        if file.exists() and (found := first_of(file, seen)):
            return found
    return None


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports as it is imported, in order."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


WITHOUT_TRITON = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else found(name, *a)
sys.meta_path.insert(0, Absent())
import mcore_sft.training.loop
"""


def test_all_of_a_run_is_imported_where_triton_is_absent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["transformer_engine/pytorch", "transformer_engine"])
def test_all_of_a_run_is_imported_beside_what_pip_left_of_transformer_engine(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", "import mcore_sft.training.loop"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
