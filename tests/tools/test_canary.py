import sys
from pathlib import Path

import canary
import lane
import pytest
from packaging.requirements import Requirement

PYPROJECT = """
[build-system]
requires = ["setuptools>=77", "torch>=2.11,<2.16"]
[project]
dependencies = [
  "torch>=2.11,<2.16",
  "megatron-core==0.16.1; python_version < '3.12'",
  "megatron-core>=0.19,<0.20; python_version >= '3.12'",
]
optional-dependencies = { gpu = ["transformer-engine"], plot = ["matplotlib"], dev = ["PyTest"] }
"""
# Stands in for `uv pip install`: what is named there cannot be installed.
UV = """
import sys
if broken := [one for one in sys.argv if one.startswith(tuple({broken!r}))]:
    print("error: No solution found", file=sys.stderr)
    print("  cause: Because " + broken[0] + " has no wheels", file=sys.stderr)
    sys.exit(1)
"""


def names(python: str, folder: Path) -> list[str]:
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return [str(one) for one in canary.requirements(folder / "pyproject.toml", python)]


def test_what_is_asked_for_is_that_of_the_canarys_python(tmp_path: Path) -> None:
    new = names("3.13", tmp_path)
    asked = ["setuptools", "torch", "wheel", "megatron-core", "PyTest", "matplotlib"]
    assert [Requirement(one).name for one in new] == asked
    assert 'megatron-core<0.20,>=0.19; python_version >= "3.12"' in new
    assert 'megatron-core==0.16.1; python_version < "3.12"' in names("3.11", tmp_path)


@pytest.mark.parametrize(
    ("ours", "asked"),
    [
        ("torch>=2.11,<2.16", "torch>=2.11"),
        ("math-verify==0.9.0", "math-verify>=0.9.0"),
        ("numpy", "numpy"),
        ("x~=1.4,!=1.5", "x>=1.4"),
    ],
)
def test_upper_bounds_are_left_out(ours: str, asked: str) -> None:
    assert canary.unbounded(Requirement(ours)) == asked


@pytest.mark.parametrize(
    ("broken", "failures"),
    [
        ([], {}),
        (["b"], {"b": "cause: Because b>=2 has no wheels"}),
        (["-e"], {"mcore-sft": "cause: Because -e has no wheels"}),
    ],
)
def test_what_cannot_be_installed_is_a_row_and_the_rest_is_there(
    tmp_path: Path,
    broken: list[str],
    failures: dict[str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    ours = [Requirement("a<3"), Requirement("b==2"), Requirement("c")]
    part = canary.install([sys.executable, "-c", UV.format(broken=broken)], ours, tmp_path)
    assert (part.failures, part.passed) == (failures, 4 - len(failures))
    asked = [line for line in capfd.readouterr().out.splitlines() if "installing" in line]
    assert len(asked) == (5 if broken == ["b"] else 2), "one by one where all together fail"
    told = canary.table(ours, {"b": "2.0"}, {"python": "3.13.0", "a": "4.0"}, part.failures)
    rows = [line.split()[1:] for line in told.splitlines()]
    assert rows[1:5] == [
        ["python", "3.13.0"],
        ["a", "<3", "-", "4.0"],
        ["b", "==2", "2.0", "-"],
        ["c", "-", "-"],
    ]
    assert [" ".join(row[3:]) for row in rows[5:]] == [f"{k}: {v}" for k, v in failures.items()]


def test_pins_are_read_with_and_without_hashes(tmp_path: Path) -> None:
    (tmp_path / "torch.txt").write_text(
        'torch==2.13.0; python_version < "3.12"\ntorch==2.14.1; python_version >= "3.12"\n'
    )
    (tmp_path / "python3.13.txt").write_text(
        "# a comment\nnumpy==2.5.0 \\\n    --hash=sha256:0 \\\n    --hash=sha256:1\nPyYAML==6.0.3\n"
    )
    assert canary.pinned(tmp_path, "3.13") == {
        "torch": "2.14.1",
        "numpy": "2.5.0",
        "pyyaml": "6.0.3",
    }


def test_the_record_is_the_canarys() -> None:
    installation = lane.Part(passed=3, skipped=0, minutes=2.0, failures={"b": "no wheels"})
    content = canary.amended({**lane.record({}), "minutes": 1.5}, installation)
    assert (content["command"], content["minutes"]) == ("make canary", 3.5)
    assert content["parts"]["installation"]["failures"] == {"b": "no wheels"}


def test_the_copy_has_all_sources_and_nothing_that_was_made() -> None:
    root = ["csrc", "data", "mcore_sft", "results", ".venv", ".git", "pyproject.toml"]
    assert canary._left_out(str(canary.ROOT), root) >= {"data", "results", ".venv", ".git"}
    assert not canary._left_out(str(canary.ROOT), root) & {"csrc", "mcore_sft", "pyproject.toml"}
    assert not canary._left_out(str(canary.ROOT / "tests"), [".metadata"]) & {".metadata"}
    package = canary._left_out(str(canary.ROOT / "mcore_sft"), ["data", "_C.abi3.so", "ops"])
    assert package & {"data", "_C.abi3.so", "ops"} == {"_C.abi3.so"}
