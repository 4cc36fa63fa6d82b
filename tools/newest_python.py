"""Nothing in, the newest supported Python that runs here and is newer than this one out.

    python3 tools/newest_python.py

It looks on PATH and among pyenv's versions, and prints the program; with none, exit code 1. It
needs nothing but Python, an old one too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    Version = tuple[int, int]

ROOT = Path(__file__).resolve().parent.parent


def supported() -> list[Version]:
    """The versions that pyproject.toml allows, the newest first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', text)
    if bounds is None:
        raise SystemExit('error: pyproject.toml: requires-python must be ">=3.X,<3.Y"')
    return [(3, minor) for minor in reversed(range(int(bounds[1]), int(bounds[2])))]


def newest(above: Version = (0, 0)) -> str | None:
    """The program of the newest supported Python above `above` that starts; None without one."""
    wanted = [version for version in supported() if version > above]
    return next((one for version in wanted for one in _programs(version) if _runs(one)), None)


def _programs(version: Version) -> Iterator[str]:
    name = f"python{version[0]}.{version[1]}"
    if found := shutil.which(name):
        yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob(f"versions/*/bin/{name}")))


def _runs(program: str) -> bool:
    """Whether it starts and can make environments; a shim of pyenv may name nothing."""
    try:
        return not subprocess.run(
            [program, "-c", "import ensurepip, venv"], capture_output=True
        ).returncode
    except OSError:
        return False


if __name__ == "__main__":
    found = newest(above=sys.version_info[:2])
    print(found or "")
    sys.exit(found is None)
