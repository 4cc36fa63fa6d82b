"""Transformer Engine's Python for this Python: a wheel in, a folder of changed files out.

    python -m tests.te.fetch

The files take CPU tensors where they ask for a GPU's: `WORDS` are changed. The wheel holds nothing
compiled; requirements/transformer_engine.txt pins it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINS = ROOT / "requirements" / "transformer_engine.txt"
FOLDER = ROOT / ".te" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
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
    stamp = PINS.read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")
    kept = FOLDER / "stamp"
    if kept.exists() and kept.read_text(encoding="utf-8") == stamp:
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    asked = ["--no-deps", "--no-compile", "--require-hashes", "--requirement", str(PINS)]
    subprocess.run([*pip, "--quiet", "--target", str(FOLDER), *asked], check=True)
    for file in FOLDER.glob("transformer_engine/**/*.py"):
        file.write_text(_changed(file.read_text(encoding="utf-8")), encoding="utf-8")
    kept.write_text(stamp, encoding="utf-8")


def _changed(text: str) -> str:
    for word, other in WORDS.items():
        text = text.replace(word, other)
    return text


if __name__ == "__main__":
    main()
