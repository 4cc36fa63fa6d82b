import json
from pathlib import Path
from typing import Any

import compatibility
import yaml
from lane import Part, keep, record

PYPROJECT = """
[project]
requires-python = ">=3.11,<3.14"
dependencies = [
  "torch>=2.11,<2.16",
  "megatron-core==0.16.1; python_version < '3.12'",
  "megatron-core>=0.19,<0.20; python_version >= '3.12'",
  "transformers>=5",
]
optional-dependencies = { gpu = ["Transformer_Engine[pytorch]>=2.9,<2.21"], vllm = ["vllm>=0.32"] }
"""
KNOWN: dict[str, Any] = {
    "tested": {"vllm": ["0.32.0: by hand"]},
    "broken": {"python": ["3.14: no wheels"]},
    "elsewhere": [{"what": "a container", "versions": {"python": "3.12.3"}, "source": "its notes"}],
}


def made(folder: Path, *records: dict[str, Any], versions: dict[str, str]) -> list[list[str]]:
    """The rows of the page for these records and one stack elsewhere."""
    (folder / "pyproject.toml").write_text(PYPROJECT)
    KNOWN["elsewhere"][0]["versions"] = versions
    (folder / "known.yaml").write_text(yaml.safe_dump(KNOWN))
    for one in records:
        keep({**record({}), "transformer-engine": None, "vllm": None, **one}, folder)
    lines = compatibility.page(folder, folder / "pyproject.toml").splitlines()
    return [line[2:-2].split(" | ") for line in lines if line.startswith("|")]


def stack(date: str, python: str, torch: str, failed: int = 0) -> dict[str, Any]:
    failures = {f"test_{number}": "it broke" for number in range(failed)}
    part = Part(passed=85 - failed, skipped=2, minutes=3.5, failures=failures)
    return {
        **record({"equalities": part}),
        **{"date": date, "python": python, "torch": torch, "commit": "abc"},
        **{"megatron-core": "0.19.2", "transformers": "5.24.0", "cpu": "a CPU", "cores": 2},
    }


def test_the_page_is_what_make_compatibility_writes() -> None:
    written = compatibility.PAGE.read_text(encoding="utf-8")
    assert written == compatibility.page(
        compatibility.FOLDER, compatibility.ROOT / "pyproject.toml"
    ), "run `make compatibility` and commit what it writes"


def test_a_version_is_tested_by_its_newest_record_and_failures_are_told(tmp_path: Path) -> None:
    records = (
        stack("2026-11-01", "3.13.0", "2.14.1", failed=3),
        stack("2026-11-02", "3.12.1", "2.14.1"),
        stack("2026-11-03", "3.13.1", "2.15.0", failed=2),
    )
    rows = made(tmp_path, *records, versions={"python": "3.12.3"})
    torch = next(row for row in rows if row[0] == "torch")
    assert torch[1:3] == [
        ">=2.11, <2.16",
        "2.15.0 (`make lane`, 2026-11-03, 2 FAILED)<br>2.14.1 (`make lane`, 2026-11-02)",
    ]
    megatron = next(row for row in rows if row[0] == "Megatron-core")
    assert megatron[1] == "==0.16.1 (Python < 3.12)<br>>=0.19, <0.20 (Python >= 3.12)"
    lanes = [row for row in rows if row[0].startswith("2026")]
    assert [(row[0], row[3:6]) for row in lanes] == [
        ("2026-11-03", ["83", "2", "2"]),
        ("2026-11-02", ["85", "0", "2"]),
        ("2026-11-01", ["82", "3", "2"]),
    ]


def test_what_no_lane_has_run_is_never_tested(tmp_path: Path) -> None:
    rows = made(tmp_path, versions={"python": "3.12.3", "torch": "2.14.0a0+abc.nv26.09"})
    table = {row[0]: row[1:] for row in rows}
    assert table["torch"][1] == "not run yet"
    assert table["vLLM"][1] == "0.32.0: by hand"
    assert table["Python"][1:] == ["not run yet", "3.14: no wheels"]
    assert table["a container"][-2:] == ["allowed, not run yet", "its notes"]


def test_a_stack_elsewhere_is_held_against_the_ranges_of_its_python(tmp_path: Path) -> None:
    versions = {"python": "3.11.9", "megatron-core": "0.19.2", "transformer-engine": "2.21.0"}
    (row,) = (row for row in made(tmp_path, versions=versions) if row[0] == "a container")
    assert (
        row[-2]
        == "Megatron-core 0.19.2 is not ==0.16.1; Transformer Engine 2.21.0 is not <2.21,>=2.9"
    )


def test_committed_records_have_no_place_of_a_machine() -> None:
    for file in compatibility.FOLDER.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert json.loads(text)["command"] in ("make lane", "make canary")
        assert "/home/" not in text
        assert "/tmp/" not in text
