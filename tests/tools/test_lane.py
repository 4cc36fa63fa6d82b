import json
import shlex
import sys
from pathlib import Path

import gpu_report
import lane
import pytest
from lane import Part

TESTS = """
import os, pytest
def test_well(): assert os.environ["OMP_NUM_THREADS"] == "1"
def test_wrong(): assert 1 + 1 == 3, "the sum\\nis wrong"
@pytest.mark.skip
def test_not_here(): pass
@pytest.fixture
def broken(): raise RuntimeError("no such version")
def test_never_starts(broken): pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    return tmp_path


def test_tests_are_counted_and_what_failed_is_named_by_its_first_line(here: Path) -> None:
    (here / "test_some.py").write_text(TESTS)
    part = lane.run_tests("some", "test_some.py")
    assert (part.passed, part.skipped) == (1, 1)
    assert part.failures == {
        "test_some::test_wrong": "AssertionError: the sum",
        "test_some::test_never_starts": 'failed on setup with "RuntimeError: no such version"',
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os; os.abort()", "exit code 134|signal 6"),
        ("import not_there_at_all", "ModuleNotFoundError|collection failure"),
        ("", "exit code 5: no tests ran"),
    ],
)
def test_tests_that_crash_or_do_not_load_or_are_absent_have_failed(
    here: Path, text: str, said: str
) -> None:
    (here / "test_some.py").write_text(text)
    (error,) = lane.run_tests("some", "test_some.py").failures.values()
    assert any(one in error for one in said.split("|"))


def test_a_demo_that_fails_is_told_with_its_first_error(here: Path) -> None:
    (here / "demo.py").write_text(
        "print('error: no such layer\\nerror: `train.py` ended with code 1'); raise SystemExit(2)"
    )
    part = lane.run_demo("demo.py", "--short")
    assert part.passed == 0
    assert part.failures == {"demo.py --short": "exit code 2: error: no such layer"}
    (here / "demo.py").write_text("")
    assert lane.run_demo("demo.py").passed == 1


def test_all_parts_run_and_one_failure_fails_the_lane_and_stands_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tests(name: str, *place: str) -> Part:
        failures = {"test_it": "AssertionError"} if name == "equalities" else {}
        return Part(passed=7, skipped=0, minutes=0.5, failures=failures)

    monkeypatch.setattr(lane, "fetch_megatron", lambda folder: False)
    monkeypatch.setattr(lane, "fetch_engine", lambda: "2.99.0")
    monkeypatch.setattr(lane, "run_tests", tests)
    monkeypatch.setattr(lane, "run_demo", lambda *_: Part(passed=1, skipped=0, minutes=1.0))
    monkeypatch.setattr(sys, "argv", ["lane.py", "--record", str(tmp_path / "kept")])
    assert lane.main() == 1
    told = capsys.readouterr().out
    assert "lane: FAILED equalities: test_it: AssertionError" in told
    assert "lane: short demo       1.0 min, 1 passed, 0 failed, 0 skipped" in told
    (file,) = (tmp_path / "kept").iterdir()
    kept = json.loads(file.read_text())
    assert list(kept["parts"]) == [*lane.TESTS, lane.ENGINE, "short demo"]
    assert kept["parts"]["equalities"]["failures"] == {"test_it": "AssertionError"}
    assert kept["minutes"] == 1.5 + 0.5 * len(lane.TESTS)
    assert kept["python"] == ".".join(map(str, sys.version_info[:3]))
    assert file.name.startswith(f"python-{kept['python']}_torch-{kept['torch']}_megatron-core-")
    assert kept["transformer-engine"] == "2.99.0, its Python alone"
    assert kept["command"] == "make lane"
    # One part alone is a record of its own, beside that of all.
    command = ["lane.py", "--record", str(tmp_path / "kept"), "--only", lane.ENGINE]
    monkeypatch.setattr(sys, "argv", command)
    assert lane.main() == 0
    (other,) = set((tmp_path / "kept").iterdir()) - {file}
    assert other.name == file.name.replace(".json", "_transformer-engine-2.99.0.json")
    kept = json.loads(other.read_text())
    assert list(kept["parts"]) == [lane.ENGINE]
    assert shlex.split(kept["command"]) == ["make", "lane", f"ONLY={lane.ENGINE}"]


def test_the_parts_are_there() -> None:
    for place in (*lane.TESTS.values(), "tools/demo.py"):
        assert (gpu_report.ROOT / place).exists()
