"""Nothing in, where, with what and for how long a benchmark is measured out."""

import os
import platform
import re
import shlex
import subprocess
import sys
import time
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


class Deadline:
    """`--minutes N` of a command line, after which nothing begins; without it there is time."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @staticmethod
    def add_to(parser: Parser) -> None:
        """Let `parser` know the option."""
        told = "begin nothing after so many; what is not measured says so"
        parser.add_argument("--minutes", type=float, metavar="N", help=told)

    @property
    def left(self) -> float | None:
        """Seconds, at least none; None where there is no end."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return self.left == 0.0

    @property
    def reason(self) -> str:
        """Why what comes later is not measured."""
        return f"not run: the {self.minutes:g} min were over"


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
