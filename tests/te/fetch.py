"""Transformer Engine's Python for this Python: a wheel in, a folder of changed files out.

    [TE_OLDEST=1] python -m tests.te.fetch

The files take CPU tensors where they ask for a GPU's: `WORDS` are changed. The wheel holds nothing
compiled; requirements/transformer_engine.txt pins it, and a file beside it the oldest release that
we allow. Where the release is installed, its files are copied. The last line says which it is.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
OLDEST = "_oldest" if os.environ.get("TE_OLDEST") else ""
PINS = ROOT / "requirements" / f"transformer_engine{OLDEST}.txt"
STAMP = "stamp"
FOLDER = ROOT / ".te" / f"python{sys.version_info[0]}.{sys.version_info[1]}{OLDEST}"
WORDS = {
    'load_framework_extension("torch")': "import transformer_engine_torch",
    'torch.device("cuda", torch.cuda.current_device())': 'torch.device("cpu")',
    "torch.distributed._coalescing_manager": "torch.te_cuda.coalescing",
    "torch.version.cuda": "torch.te_cuda.VERSION",
    "torch.cuda": "torch.te_cuda",
    ".is_cuda": ".is_cpu",
    ".cuda()": ".cpu()",
    '"cuda"': '"cpu"',
}
"""What is written in the files, and what stands there afterwards: tests/te/cuda.py is `te_cuda`."""


def main() -> None:
    """Fetch the files unless they are there already."""
    _fetch()
    print(f"transformer-engine {release()}")


def _fetch() -> None:
    stamp = PINS.read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")
    if (FOLDER / STAMP).exists() and (FOLDER / STAMP).read_text(encoding="utf-8") == stamp:
        return
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as made:
        _install(Path(made))
        (Path(made) / STAMP).write_text(stamp, encoding="utf-8")
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(made, FOLDER)


def release() -> str:
    """The version that is pinned for this Python."""
    lines = [line for line in PINS.read_text(encoding="utf-8").splitlines() if "==" in line]
    pins = [Requirement(line.partition(" --hash")[0]) for line in lines]
    (pin,) = [one for one in pins if one.marker is None or one.marker.evaluate()]
    return str(pin.specifier).removeprefix("==")


def _install(folder: Path) -> None:
    if not _copy(folder):
        _download(folder)
    for file in folder.glob("transformer_engine/**/*.py"):
        file.write_text(_changed(file.read_text(encoding="utf-8")), encoding="utf-8")


def _copy(folder: Path) -> bool:
    """Whether the pinned release is installed, and now lies in `folder` too."""
    try:
        found = metadata.distribution("transformer-engine")
    except metadata.PackageNotFoundError:
        return False
    if found.version != release():
        return False
    for file in found.files or ():
        if (source := Path(found.locate_file(file))).exists() and ".." not in file.parts:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / file)
    return True


def _download(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    asked = ["--no-deps", "--no-compile", "--require-hashes", "--requirement", str(PINS)]
    done = subprocess.run([*pip, "--quiet", "--target", str(folder), *asked], check=False)
    if done.returncode:
        sys.exit("error: pip failed (see above); fix the cause and run make fetch-te again")


def _changed(text: str) -> str:
    for word, other in WORDS.items():
        text = text.replace(word, other)
    return text


if __name__ == "__main__":
    main()
