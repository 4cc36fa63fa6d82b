"""A package index in, a kit for a GPU machine without one out: `make gpu-report KIT=DIR` takes it.

    .venv/bin/python tools/carry_wheels.py DIR --environment DIR [--architecture 90]
                                           [--has FILE] [--piece-mib 55]

--environment names a virtual environment with the Python and the torch of that machine; nvcc of the
same CUDA is at hand, and both machines are Linux on x86_64. The kit is one file, ready to run: what
requirements/ pins for that Python but what only checks the sources, the operators of csrc/, and
Transformer Engine with code for one GPU architecture and its extension built for that torch (many
minutes; kept in the environment). --has names what that machine holds, as `pip freeze` prints it:
what fits our ranges is left out. With --piece-mib, DIR gets folders of at most that size, to be
carried one by one.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import fatbin
from gpu_report import KIT, SUMS, commit, sources
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import setup
from mcore_sft import command
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Parser, say

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / "requirements"
LEFT_OUT = re.compile(
    r"mypy|mypy-extensions|ruff|grimp|import-linter|librt|ast-serialize|types-.*|uv"
)
EXTENSION = "transformer-engine-torch"
"""Released as source alone."""
CORE = "libtransformer_engine.so"
BUILDERS = ("setuptools", "wheel", "ninja", "pybind11")


class CarryError(UserError):
    """The kit cannot be made."""


def main() -> None:
    """Gather, cut, pack."""
    options = _arguments()
    folder: Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        raise CarryError(f"{folder} is not empty; name a new folder")
    python = options.environment / "bin" / "python"
    made_for = ask(python)
    everything = pinned(made_for["python"])
    there = read_freeze(options.has) if options.has else {}
    pins = lacking(everything, there, made_for["python"])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        kit = Path(name)
        site = kit / "site"
        _pip(python, "install", *_BINARY, *(f"{name}=={everything[name]}" for name in BUILDERS))
        extension = build_extension(python, everything[EXTENSION])
        say(f"{len(pins)} packages for Python {made_for['python']}, torch {made_for['torch']}")
        wheels = [f"{name}=={version}" for name, version in pins.items() if name != EXTENSION]
        # Together, since pip adds nothing to a package that lies in a target already.
        _pip(python, "install", "--target", site, "--no-compile", *_BINARY, *wheels, extension)
        build_operators(python, site, kit / "operators")
        if options.architecture:
            for library in site.rglob(CORE):
                say(f"{CORE}: {cut_library(library, options.architecture)}")
        about = made_for | {
            "architectures": [options.architecture] if options.architecture else "all",
            "commit": commit(),
            "sources": sources(),
            "packages": pins,
        }
        (kit / "kit.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        whole = pack(kit)
        sums = checksums([whole])
        groups = cut([whole], folder, options.piece_mib and options.piece_mib * 2**20)
    (groups[0] / SUMS).write_text(sums, encoding="utf-8")
    for group in groups:
        size = sum(file.stat().st_size for file in group.iterdir())
        say(f"{group}: {size / 2**20:.1f} MiB")


def ask(python: Path) -> dict[str, Any]:
    """Python's, torch's and CUDA's versions in an environment."""
    program = (
        "import json, sys, torch; print(json.dumps({'python': '%d.%d' % sys.version_info[:2], "
        "'torch': torch.__version__.partition('+')[0], 'cuda': torch.version.cuda}))"
    )
    try:
        ran = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    except OSError as error:
        raise CarryError(f"--environment: {python} does not run ({error}); {_MAKE_ONE}") from None
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1]
        raise CarryError(f"--environment: {python} has no torch ({last}); {_MAKE_ONE}")
    found: dict[str, Any] = json.loads(ran.stdout)
    if not found["cuda"]:
        raise CarryError(f"--environment: its torch {found['torch']} is a CPU build; {_MAKE_ONE}")
    return found


_MAKE_ONE = "make one: python3.12 -m venv DIR && DIR/bin/pip install torch==VERSION"


def read_freeze(file: Path) -> dict[str, str | None]:
    """Name -> version of `name==version` lines; None where a line has the name alone."""
    found: dict[str, str | None] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("#")[0].strip().partition("==")
        if name:
            found[_plain(name)] = version or None
    return found


def pinned(python: str) -> dict[str, str]:
    """Name -> version of all that requirements/ pins for `python` to run there."""
    files = [PINNED / f"python{python}.txt", PINNED / "gpu_cu13.txt"]
    if not files[0].exists():
        raise CarryError(f"Python {python}: nothing pins its packages (expected 3.11 to 3.13)")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    pins = {}
    for line in re.findall(r"^[^\s#-][^\\\n]*", text, re.MULTILINE):
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            (exact,) = pin.specifier
            pins[_plain(pin.name)] = exact.version
    return {name: version for name, version in pins.items() if not LEFT_OUT.fullmatch(name)}


def lacking(pins: dict[str, str], there: dict[str, str | None], python: str) -> dict[str, str]:
    """What of `pins` is not `there`, or is there in a version that we do not run with."""
    declared = [Requirement(line) for line in metadata.requires("mcore-sft") or ()]
    ranges = {
        _plain(one.name): one.specifier
        for one in declared
        if one.marker is None or one.marker.evaluate({"python_version": python, "extra": ""})
    }

    def fits(name: str) -> bool:
        version = there.get(name)
        return name in there and (version is None or version in ranges.get(name, SpecifierSet()))

    return {name: version for name, version in pins.items() if not fits(name)}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def build_extension(python: Path, version: str) -> Path:
    """The wheel of Transformer Engine's extension for the torch of `python`, built once."""
    kept = python.parent.parent / "built"
    pattern = f"{EXTENSION.replace('-', '_')}-{version}-*.whl"
    if not any(kept.glob(pattern)):
        say(f"building {EXTENSION} {version} for this torch; this takes many minutes")
        source = (f"--no-binary={EXTENSION}", "--no-build-isolation", "--no-cache-dir")
        place = python.parent.resolve()
        environment = building(python) | {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}
        words = ("wheel", "--wheel-dir", kept, *source, f"{EXTENSION}=={version}")
        _pip(python, *words, environment=environment)
    return next(kept.glob(pattern))


def building(python: Path) -> dict[str, str]:
    """The variables by which the extension is built where there is no GPU.

    The headers of cuDNN and NCCL come with torch, in packages that no compiler knows of. Those of
    CUDA are not all there: the rest is nvcc's, whose toolkit nothing finds behind a script.
    """
    nvcc = setup.find_nvcc()
    if nvcc is None:
        raise CarryError("no nvcc was found; put one on PATH, or name its toolkit by CUDA_HOME")
    try:
        toolkit, _ = setup.find_toolkit(nvcc)
    except setup.NoCudaError as error:
        raise CarryError(str(error)) from None
    program = "import nvidia; print(*nvidia.__path__, sep='\\n')"
    told = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    roots = [Path(line) for line in told.stdout.splitlines()]
    headers = [
        str(folder)
        for root in roots
        for part in ("cudnn", "nccl", "cu13")
        if (folder := root / part / "include").is_dir()
    ]
    cudnn = [str(root / "cudnn") for root in roots if (root / "cudnn").is_dir()]
    return {
        "CUDA_HOME": str(toolkit),
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        "MAX_JOBS": str(len(os.sched_getaffinity(0))),
        "CPATH": os.pathsep.join([*headers, *filter(None, [os.environ.get("CPATH")])]),
        **({"CUDNN_PATH": cudnn[0]} if cudnn else {}),
    }


def build_operators(python: Path, site: Path, folder: Path) -> None:
    """Put the compiled csrc into `folder`, and what pip knows of this package into `site`."""
    place = python.parent.resolve()
    environment = {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}
    words = ("install", "--target", site, "--no-compile", "--no-build-isolation", ROOT)
    _pip(python, *words, environment=environment)
    package = site / "mcore_sft"
    if not list(package.glob("_C_cuda.*so")):
        why = next((file.read_text() for file in package.glob("*.reason")), "no nvcc was found")
        raise CarryError(f"csrc/cuda was not built: {why.strip()}")
    folder.mkdir()
    for operators in package.glob("_C*.so"):
        shutil.move(operators, folder)
    shutil.rmtree(package)  # the sources are those of the clone that the kit is used in


def cut_library(library: Path, architecture: int) -> str:
    """Leave machine code for one architecture in a library; what was done."""
    content = bytearray(library.read_bytes())
    try:
        done = fatbin.keep(content, {architecture})
    except fatbin.FatbinError as error:
        raise CarryError(
            f"{library.name} cannot be cut to architecture {architecture}: {error}; leave "
            "--architecture 0 to carry all of it"
        ) from None
    library.write_bytes(content)
    return f"{done['kept'] / 1e6:.0f} of {(done['kept'] + done['dropped']) / 1e6:.0f} MB of code"


def pack(kit: Path) -> Path:
    """One compressed file of all that lies in `kit`."""
    whole = kit / KIT
    with tarfile.open(whole, "w:xz") as tar:
        for name in ("kit.json", "operators", "site"):
            tar.add(kit / name, name)
    return whole


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


_BINARY = ("--only-binary=:all:",)


def _pip(python: Path, *words: str | Path, environment: dict[str, str] | None = None) -> None:
    quiet = ("--disable-pip-version-check", "--no-input", "--quiet")
    verb, *others = words
    ran = subprocess.run(
        [python, "-m", "pip", *quiet, verb, "--no-deps", *others],
        env=os.environ | (environment or {}),
        check=False,
    )
    if ran.returncode:
        raise CarryError(f"pip {verb} failed; its own words are above")


def _arguments() -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=command.path, metavar="DIR", help="new, or empty")
    parser.add_argument(
        "--environment",
        type=command.path,
        metavar="DIR",
        required=True,
        help="a virtual environment with the Python and the torch of the GPU machine",
    )
    parser.add_argument(
        "--architecture",
        type=int,
        default=90,
        metavar="N",
        help="what Transformer Engine holds code for (default: 90, Hopper); 0 is all",
    )
    parser.add_argument("--has", type=command.path, metavar="FILE", help="`pip freeze` there")
    parser.add_argument("--piece-mib", type=command.count, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    command.run(main)
