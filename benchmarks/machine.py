"""Nothing in, where and with what a benchmark is measured out."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mcore_sft.base.terminal import Parser

EMULATED = "tests.te.plugin" in sys.modules
"""Whether Transformer Engine's own Python runs on the CPU here: `python -m tests.te FILE`."""


def machine(*packages: str, device: str | None = None) -> dict[str, Any]:
    """The `device` (the CPU where none is named), its cores, versions, commit, date and command."""
    return {
        "device": device or _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        **{name: _version(name) for name in packages},
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def require(device: str, parser: Parser) -> None:
    """End with a sentence where `--device cuda` is asked for and torch finds none."""
    import torch  # late: benchmarks without a device measure processes that are free of it

    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; use --device cpu")


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _cpu() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
