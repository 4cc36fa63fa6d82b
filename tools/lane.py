"""An environment in, whether what depends on its versions holds there out, with a record of it.

    make lane [VENV=DIR] [RECORD=DIR] [ONLY='Transformer Engine']

Equalities, planted faults, checkpoint, faults, model, runtime and training, Transformer Engine's
own Python over kernels on the CPU, then a short demo. Each part is a process of its own, and all
run; the exit code is 0 if all passed. ONLY runs one part; TE_OLDEST=1 takes the oldest Transformer
Engine that is allowed. The record is JSON: with RECORD=docs/compatibility, `make compatibility`
puts it into the table. This file needs nothing but Python: what the canary installs may fail.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gpu_report

from mcore_sft.base import files

PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "transformers", "vllm", "datasets"),
    "triton",
)
TESTS = {
    "equalities": "tests/test_equalities.py",
    "planted faults": "tests/test_planted.py",
    **{room: f"tests/{room}" for room in ("checkpoint", "faults", "model", "runtime", "training")},
}
ENGINE, DEMO = "Transformer Engine", "short demo"
ENGINE_TESTS = (
    *("-p", "tests.te.plugin", "-m", "te and not slow"),
    *("tests/te", "tests/model/test_transformer_engine.py", "tests/test_gpu.py"),
)
MINUTES = 40
"""No part may take longer."""
CROSSED = "0.16.1"
"""The megatron-core that checkpoints cross with, where another is installed."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """How one part ended; `failures` has what failed, with the first line of each error."""

    passed: int
    skipped: int
    minutes: float
    failures: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Run the lane on the Python that runs this; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=Path, default=Path("results/lanes"), metavar="DIR")
    parser.add_argument("--only", choices=(*TESTS, ENGINE, DEMO), metavar="PART")
    options = parser.parse_args()
    wanted = (options.only,) if options.only else (*TESTS, ENGINE, DEMO)
    parts: dict[str, Part] = {}
    with tempfile.TemporaryDirectory() as other:
        rooms = [name for name in TESTS if name in wanted]
        if rooms and installed("megatron-core") != CROSSED and fetch_megatron(other):
            os.environ["OTHER_MEGATRON"] = other
        parts |= {name: run_tests(name, TESTS[name]) for name in rooms}
    engine = fetch_engine() if ENGINE in wanted else None
    if engine:
        parts[ENGINE] = run_tests(ENGINE, *ENGINE_TESTS)
    if DEMO in wanted:
        parts[DEMO] = run_demo("tools/demo.py", "--short")
    failed = tell(parts)
    print(f"lane: the record is {keep(record(parts, engine, options.only), options.record)}")
    return failed


def fetch_megatron(folder: str) -> bool:
    """Whether the megatron-core that checkpoints cross with could be installed in `folder`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    done = subprocess.run([*command, f"megatron-core=={CROSSED}"], check=False).returncode == 0
    if not done:
        print(f"lane: no checkpoint crosses: pip could not install megatron-core {CROSSED}")
    return done


def fetch_engine() -> str | None:
    """The release of Transformer Engine whose Python is there now; None if it cannot be had."""
    command = [sys.executable, "-m", "tests.te.fetch"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print("lane: Transformer Engine's Python is not run: it could not be fetched")
        return None
    return done.stdout.split()[-1]


def run_tests(name: str, *place: str) -> Part:
    """Run the tests of a file or folder; those that fail are known from pytest's own report."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "tests.xml")
        words = ("-m", "pytest", "-q", *place, f"--junitxml={file}")
        ended = _run(name, "env", "OMP_NUM_THREADS=1", sys.executable, *words)
        cases = list(ElementTree.parse(file).iter("testcase")) if file.exists() else []
    failures = {}
    for case in cases:
        for one in (*case.iter("failure"), *case.iter("error")):
            error = (one.get("message") or one.text or "").strip() or "no message"
            failures[f"{case.get('classname')}::{case.get('name')}"] = _first_line(error)
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failures) - skipped
    if not ended.passed and not failures:  # it crashed, hung, or found no test
        failures[" ".join(place)] = _first_line(": ".join([ended.ended, *ended.last_lines[-1:]]))
    minutes = round(ended.seconds / 60, 1)
    return Part(passed=passed, skipped=skipped, minutes=minutes, failures=failures)


def run_demo(*words: str) -> Part:
    """Run a command that tells by its exit code and an error's sentence."""
    ended = _run(DEMO, sys.executable, *words)
    failures = {}
    if not ended.passed:
        errors = [line for line in ended.last_lines if line.startswith("error: ")]
        failures[" ".join(words)] = _first_line(": ".join([ended.ended, *errors[:1]]))
    minutes = round(ended.seconds / 60, 1)
    return Part(passed=int(ended.passed), skipped=0, minutes=minutes, failures=failures)


def tell(parts: dict[str, Part]) -> int:
    """Print what failed, then a line for each part; 1 if anything failed."""
    for name, part in parts.items():
        for what, error in part.failures.items():
            print(f"lane: FAILED {name}: {what}: {error}")
    for name, part in parts.items():
        counts = f"{part.passed} passed, {len(part.failures)} failed, {part.skipped} skipped"
        print(f"lane: {name:14} {part.minutes:5.1f} min, {counts}", flush=True)
    return int(any(part.failures for part in parts.values()))


def record(
    parts: dict[str, Part], engine: str | None = None, only: str | None = None
) -> dict[str, Any]:
    """What was run, where, with which versions, and what came of it.

    `engine` is the release of Transformer Engine that was run, whatever is installed.
    """
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["make", "lane", *([f"ONLY={only}"] if only else [])]),
        "commit": gpu_report.commit(),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "transformer-engine": f"{engine}, its Python alone" if engine else None,
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "minutes": round(sum(part.minutes for part in parts.values()), 1),
        "parts": {name: asdict(part) for name, part in parts.items()},
    }


def installed(package: str) -> str | None:
    """The version of `package` here; None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def keep(content: dict[str, Any], folder: Path) -> Path:
    """Write a record; each stack has one file, where its newest run replaces the older one."""
    names = ["python", "torch", "megatron-core"]
    if list(content["parts"]) == [ENGINE]:
        names.append("transformer-engine")
    stack = "_".join(f"{name}-{content[name]}".partition(",")[0] for name in names)
    files.make_folder(folder)
    file = folder / f"{stack}.json"
    files.replace(file, json.dumps(content, indent=2) + "\n")
    return file


def _run(name: str, *words: str) -> gpu_report.Outcome:
    return gpu_report.run(gpu_report.Part(name=name, command=words, minutes=MINUTES))


def _first_line(text: str) -> str:
    return gpu_report.without_places(text.splitlines()[0])[:200]


if __name__ == "__main__":
    sys.exit(main())
