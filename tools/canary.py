"""The newest release of everything that we need in, what breaks with it out.

    make canary [RECORD=DIR]

On the newest supported Python, in an environment and a copy of the sources that are thrown away:
what pyproject.toml asks for without its upper bounds, then the lane. Transformer Engine and vLLM
are left out: the lane needs neither. The exit code is 0 if nothing broke.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_report
import lane
import newest_python
from gpu_report import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PINS = ROOT / "requirements"
# What uv says of versions that do not go together, a compiler or linker of a build, and uv of both.
CAUSES = (
    r"cause: (?!The build backend|Call to).*",
    r".*(?:: error: |: cannot find ).*",
    r"error: .*",
)


def main() -> int:
    """Make the environment, run the lane there, print what was tried; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=Path, default=Path("results/lanes"), metavar="DIR")
    folder = parser.parse_args().record
    base, uv = newest_python.newest(), shutil.which("uv", path=_path())
    if base is None or uv is None:
        absent = "supported Python" if base is None else "uv"
        sys.exit(f"error: the canary needs {absent}, and none is on PATH; install it")
    with tempfile.TemporaryDirectory(prefix="canary-") as name:
        scratch = Path(name)
        sources, python = scratch / "sources", str(scratch / "venv" / "bin" / "python")
        shutil.copytree(ROOT, sources, ignore=_left_out)
        subprocess.run(
            [uv, "venv", "--quiet", "--seed", "--python", base, scratch / "venv"], check=True
        )
        found = json.loads(
            _ask(python, "import json, sys; print(json.dumps(sys.version_info[:2]))")
        )
        version = ".".join(map(str, found))
        ours = requirements(ROOT / "pyproject.toml", version)
        installation = install([uv, "pip", "install", "--python", python], ours, sources)
        program, records = sources / "tools" / "lane.py", scratch / "records"
        command = [python, str(program), "--record", str(records)]
        code = subprocess.run(command, cwd=sources, check=False).returncode
        for file in records.glob("*.json"):
            content = amended(json.loads(file.read_text(encoding="utf-8")), installation)
            print(f"canary: the record is {lane.keep(content, folder)}")
        print(table(ours, pinned(PINS, version), versions(python), installation.failures))
    return int(bool(code or installation.failures))


def requirements(pyproject: Path, python: str) -> list[Requirement]:
    """What a build, a run and the tests need on a version of Python, as pyproject.toml says it."""
    content = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    project = content["project"]
    extras = project["optional-dependencies"]
    lines = [*content["build-system"]["requires"], "wheel", *project["dependencies"]]
    found = [Requirement(line) for line in [*lines, *extras["dev"], *extras["plot"]]]
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    wanted = [one for one in found if one.marker is None or one.marker.evaluate(here)]
    return list({canonicalize_name(one.name): one for one in wanted}.values())


def unbounded(one: Requirement) -> str:
    """The requirement without upper bounds: what was exact is a lower bound."""
    kept = [f">={s.version}" for s in one.specifier if s.operator in ("==", "~=", ">=", ">")]
    return one.name + str(SpecifierSet(",".join(kept)))


def install(command: list[str], ours: Sequence[Requirement], sources: Path) -> lane.Part:
    """Install all together; where that fails one by one, so that the others are there."""
    begun = time.monotonic()
    wanted = {one.name: [unbounded(one)] for one in ours}
    failures = {}
    if _fails(command, [word for words in wanted.values() for word in words]):
        failures = {
            name: said for name, words in wanted.items() if (said := _fails(command, words))
        }
        failures = failures or {"all together": "each alone can be installed, all together cannot"}
    if said := _fails(command, ["--no-deps", "--no-build-isolation", "-e", str(sources)]):
        failures["mcore-sft"] = said
    minutes = round((time.monotonic() - begun) / 60, 1)
    count = len(wanted) + 1 - len(failures)
    return lane.Part(passed=count, skipped=0, minutes=minutes, failures=failures)


def amended(content: dict[str, Any], installation: lane.Part) -> dict[str, Any]:
    """The lane's record as the canary's: its command, our commit, and the installation."""
    parts = {"installation": asdict(installation), **content["parts"]}
    minutes = round(content["minutes"] + installation.minutes, 1)
    ours = {"command": "make canary", "commit": gpu_report.commit(), "minutes": minutes}
    return {**content, **ours, "parts": parts}


def pinned(folder: Path, python: str) -> dict[str, str]:
    """The versions that our environment for a version of Python has."""
    found: dict[str, str] = {}
    for file in (folder / "torch.txt", folder / f"python{python}.txt"):
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            if re.match(r"[\w.-]+==", line):
                one = Requirement(line.split("--hash")[0].rstrip("\\ "))
                if one.marker is None or one.marker.evaluate({"python_version": python}):
                    found[canonicalize_name(one.name)] = str(one.specifier).removeprefix("==")
    return found


def versions(python: str) -> dict[str, str]:
    """What the environment of `python` holds, its packages and Python itself."""
    program = (
        "import json, platform\n"
        "from importlib import metadata\n"
        "found = {one.name: one.version for one in metadata.distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    return {canonicalize_name(k): v for k, v in json.loads(_ask(python, program)).items()}


def table(
    ours: Sequence[Requirement],
    pins: dict[str, str],
    tried: dict[str, str],
    failures: dict[str, str],
) -> str:
    """A row for each package: what we allow, what we pin, what the canary had, what went wrong."""
    rows = [("package", "allowed", "pinned", "tried")]
    rows.append(("python", "", "", tried["python"]))
    for one in ours:
        name = canonicalize_name(one.name)
        had = tried.get(name, "-")
        rows.append((name, str(one.specifier), pins.get(name, "-"), had))
    lines = ["  ".join(word.ljust(20) for word in row).rstrip() for row in rows]
    lines += [f"FAILED to install {name}: {said}" for name, said in failures.items()]
    return "\n".join(f"canary: {line}" for line in lines)


def _fails(command: list[str], words: list[str]) -> str:
    """Why an installation failed, on one line; empty where it did not."""
    print(f"canary: installing {' '.join(words)}", flush=True)
    ended = subprocess.run(
        [*command, "--quiet", "--upgrade", *words], stderr=subprocess.PIPE, text=True, check=False
    )
    print(ended.stderr, end="", flush=True)
    if not ended.returncode:
        return ""
    found = [cause[0].strip() for one in CAUSES if (cause := re.search(one, ended.stderr))]
    return (found or [f"exit code {ended.returncode}"])[0][:200]


def _ask(python: str, program: str) -> str:
    return subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=True
    ).stdout


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What is not source: what was built and, in the root, what is hidden or was made by runs."""
    made = [*fnmatch.filter(names, "*.so"), "__pycache__"]
    if Path(folder) == ROOT:
        made += [*fnmatch.filter(names, ".*"), "build", "dist", "results", "data"]
    return set(made)


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


if __name__ == "__main__":
    sys.exit(main())
