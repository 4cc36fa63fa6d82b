"""A package index in, a folder that `make gpu-report WHEELS=DIR` installs without one out.

    .venv/bin/python tools/carry_wheels.py DIR [--python 3.12] [--piece-mib 55]

For Linux on x86_64 with its own torch for CUDA 13: all that requirements/ pins for that Python but
what only checks the sources, and all of requirements/gpu_cu13.txt. With --piece-mib, DIR gets
folders of at most that size, to be carried one by one; larger files are cut and joined again.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_report import SUMS

from mcore_sft import command
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Parser, say

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / "requirements"
LEFT_OUT = re.compile(
    r"mypy|mypy-extensions|ruff|grimp|import-linter|librt|ast-serialize|types-.*|uv"
)
SOURCES = ("transformer-engine-torch",)
"""Released as source alone."""
GLIBC = (39, 35, 34, 31, 28, 27, 26, 24, 17)
"""Wheels for glibc 2.N."""


class CarryError(UserError):
    """Not all could be fetched."""


def main() -> None:
    """Fetch, check, cut."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=command.path, metavar="DIR", help="new, or empty")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the GPU machine")
    parser.add_argument("--piece-mib", type=command.count, metavar="N")
    options = parser.parse_args()
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise CarryError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    wheels, sources = wanted(options.python)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        fetched = Path(name)
        say(f"{len(wheels)} wheels for Python {options.python}, {len(sources)} source")
        _pip(*_wheels_for(options.python), *wheels, to=fetched)
        _sources(sources, fetched)
        files = sorted(fetched.iterdir())
        if len(files) != len(wheels) + len(sources):
            raise CarryError(
                f"{len(files)} files came for {len(wheels) + len(sources)} packages; look whether "
                "one is pinned twice"
            )
        sums = checksums(files)
        groups = cut(files, folder, options.piece_mib and options.piece_mib * 2**20)
    (groups[0] / SUMS).write_text(sums, encoding="utf-8")
    for group in groups:
        size = sum(file.stat().st_size for file in group.iterdir())
        say(f"{group}: {size / 2**20:.1f} MiB")


def wanted(python: str) -> tuple[list[str], list[str]]:
    """NAME==VERSION of what comes as a wheel, and of what comes as source."""
    files = [PINNED / f"python{python}.txt", PINNED / "gpu_cu13.txt"]
    if not files[0].exists():
        raise CarryError(f"--python {python}: nothing pins its packages (expected 3.11 to 3.13)")
    pins = [pin for file in files for pin in re.findall(r"^[^\s#-][^\s;]*", file.read_text(), re.M)]
    kept = [pin for pin in pins if not LEFT_OUT.fullmatch(pin.partition("==")[0])]
    sources = [pin for pin in kept if pin.partition("==")[0] in SOURCES]
    return [pin for pin in kept if pin not in sources], sources


def checksums(files: list[Path]) -> str:
    """A line of SHA-256 and name for each file."""
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)


def cut(files: list[Path], folder: Path, most: int | None) -> list[Path]:
    """Move `files` into `folder`, or into as many folders of it as `most` bytes each ask for."""
    if most is None:
        for file in files:
            file.rename(folder / file.name)
        return [folder]
    most -= 2**16  # room for the list of checksums
    groups: list[Path] = []
    room = 0
    for file in files:
        content = file.read_bytes()
        pieces = [content[at : at + most] for at in range(0, len(content), most)]
        for number, piece in enumerate(pieces):
            if len(piece) > room:
                groups.append(folder / f"{len(groups):02d}")
                groups[-1].mkdir()
                room = most
            suffix = f".piece{number:03d}" if len(pieces) > 1 else ""
            (groups[-1] / f"{file.name}{suffix}").write_bytes(piece)
            room -= len(piece)
    return groups


def _wheels_for(python: str) -> list[str]:
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    old = ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    kind = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    return [*kind, *platforms, *old]


def _sources(pinned: list[str], folder: Path) -> None:
    """Fetch sources; that of Transformer Engine asks which CUDA torch is made for, as pip looks."""
    with tempfile.TemporaryDirectory() as name:
        Path(name, "sitecustomize.py").write_text(
            'import torch.version\ntorch.version.cuda = torch.version.cuda or "13.0"\n'
        )
        environment = {"PYTHONPATH": name, "NVTE_FRAMEWORK": "pytorch"}
        options = ("--no-binary=:all:", "--no-build-isolation")
        _pip(*options, *pinned, to=folder, environment=environment)


def _pip(*words: str, to: Path, environment: dict[str, str] | None = None) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command = [*pip, "--no-deps", "--dest", str(to), *words]
    if subprocess.run(command, env=os.environ | (environment or {}), check=False).returncode:
        raise CarryError("pip could not fetch all of it; its own words are above")


if __name__ == "__main__":
    command.run(main)
