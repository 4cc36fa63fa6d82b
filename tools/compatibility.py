"""The records of lanes and the ranges of pyproject.toml in, docs/compatibility.md out.

make compatibility
"""

import json
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mcore_sft.base import files
from mcore_sft.base.terminal import say

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
NAMES = {
    "python": "Python",
    "torch": "torch",
    "megatron-core": "Megatron-core",
    "transformer-engine": "Transformer Engine",
    "transformers": "transformers",
    "vllm": "vLLM",
}
HEAD = """# Compatibility

Made by `make compatibility` from the ranges of pyproject.toml and from docs/compatibility/: a
record there is what `make lane RECORD=docs/compatibility` (or `make canary`) wrote, and
`known.yaml` adds what no lane can show. Only what stands under "tested" has been run.

Machines: Linux on x86_64. For aarch64 (Grace) the CPU operators compile, by a cross compiler
(g++ 12); nothing has run there yet.
"""


def main() -> None:
    """Write the page."""
    files.replace(PAGE, page(FOLDER, ROOT / "pyproject.toml"))
    say(f"compatibility: {PAGE.relative_to(ROOT)}")


def page(folder: Path, pyproject: Path) -> str:
    """The whole page."""
    files = sorted(folder.glob("*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    records.sort(key=lambda one: (one["date"], one["python"]), reverse=True)
    known = yaml.safe_load((folder / "known.yaml").read_text(encoding="utf-8"))
    allowed = ranges(pyproject)
    rows = [
        [
            NAMES[name],
            "<br>".join(_range(one) for one in allowed[name]),
            "<br>".join([*_tested(name, records), *known["tested"].get(name, [])]) or "not run yet",
            "<br>".join(known["broken"].get(name, [])),
        ]
        for name in NAMES
    ]
    return "\n".join(
        [
            HEAD,
            _table(["", "allowed", "tested", "known not to work"], rows),
            "## The lanes\n",
            _table([*_LANE, *NAMES.values()], [_lane(one) for one in records]),
            "## Elsewhere\n",
            _table(
                ["", *NAMES.values(), "by our ranges", "source"],
                [_elsewhere(one, allowed) for one in known["elsewhere"]],
            ).rstrip()
            + "\n",
        ]
    )


def ranges(pyproject: Path) -> dict[str, list[Requirement]]:
    """What pyproject.toml allows of each, Python included."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["gpu"], *extras["vllm"]]
    found = [Requirement(f"python{project['requires-python']}"), *map(Requirement, lines)]
    return {name: [one for one in found if canonicalize_name(one.name) == name] for name in NAMES}


def trouble(versions: dict[str, str], allowed: dict[str, list[Requirement]]) -> list[str]:
    """Which of `versions` lie outside our ranges for that Python."""
    python = ".".join(versions["python"].split(".")[:2])
    return [
        f"{NAMES[name]} {version} is not {one.specifier}"
        for name, version in versions.items()
        for one in allowed[name]
        if one.marker is None or one.marker.evaluate({"python_version": python})
        if not one.specifier.contains(version, prereleases=True)
    ]


_LANE = ["date", "command", "commit", "passed", "failed", "skipped", "minutes", "CPU"]


def _lane(record: dict[str, Any]) -> list[str]:
    parts = record["parts"].values()
    counts = [sum(part[kind] for part in parts) for kind in ("passed", "skipped")]
    cpu = f"{record['cores']} of {record['cpu']}"
    told = [f"`{record['command']}`", record["commit"] or "-", counts[0], _failed(record)]
    versions = [record[name] or "-" for name in NAMES]
    return [record["date"], *map(str, told), str(counts[1]), str(record["minutes"]), cpu, *versions]


def _failed(record: dict[str, Any]) -> int:
    return sum(len(part["failures"]) for part in record["parts"].values())


def _tested(name: str, records: list[dict[str, Any]]) -> list[str]:
    """Each version once, by its newest run."""
    newest: dict[str, str] = {}
    for one in records:
        if one[name] is not None:
            ended = f", {_failed(one)} FAILED" if _failed(one) else ""
            newest.setdefault(one[name], f"{one[name]} (`{one['command']}`, {one['date']}{ended})")
    return list(newest.values())


def _range(one: Requirement) -> str:
    bounds = ", ".join(sorted(map(str, one.specifier), reverse=True)) or "any"
    when = (
        str(one.marker).replace("python_version", "Python").replace('"', "") if one.marker else ""
    )
    return f"{bounds} ({when})" if when else bounds


def _elsewhere(stack: dict[str, Any], allowed: dict[str, list[Requirement]]) -> list[str]:
    versions = {name: str(version) for name, version in stack["versions"].items()}
    ended = "; ".join(trouble(versions, allowed)) or "allowed, not run yet"
    return [stack["what"], *(versions.get(name, "-") for name in NAMES), ended, stack["source"]]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
