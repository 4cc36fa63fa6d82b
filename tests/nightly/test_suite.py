"""Tests that are run at night are recorded like the benchmarks, and published."""

from pathlib import Path

import pytest

from mcore_sft.base.errors import UserError
from nightly import history, night, page, tier
from nightly.run import Night
from nightly.suite import SuiteRun, full_run
from tests.nightly import sample

ROOT = Path(__file__).parent.parent.parent
TESTS = """
import os, pytest
@pytest.mark.slow
def test_slow(): assert {slow}
@pytest.mark.gpu
def test_gpu(): raise KeyError
def test_other(): {other}
"""


@pytest.mark.parametrize(
    ("slow", "other", "outcome", "said"),
    [
        ("True", "pass", "passed", "2 of 2 tests passed"),
        ("0, 'layout tp2: w differs first'", "pass", "failed", "layout tp2: w differs first"),
        ("True", "os._exit(9)", "crashed", "exit code 9"),
    ],
)
def test_the_nightly_records_a_suite_like_the_others(
    tmp_path: Path, slow: str, other: str, outcome: str, said: str
) -> None:
    tests = tmp_path / "test_sample.py"
    tests.write_text(TESTS.format(slow=slow, other=other))
    night, suite = _night(tmp_path, tests)
    record = SuiteRun(night, suite).record()
    assert record.outcome == outcome
    assert said in " ".join([*(f.sentence for f in record.findings), record.crash or ""])
    if outcome != "crashed":
        tests.write_text("it is not run again")
        assert SuiteRun(night, suite).record() == record
    history.append(tmp_path / "history.jsonl", record)
    page.write(tmp_path / "history.jsonl", tmp_path / "page.html")
    shown = (tmp_path / "page.html").read_text()
    assert f"<td class={outcome}>{outcome}" in shown


def _night(folder: Path, tests: Path) -> tuple[Night, tier.Suite]:
    suite = tier.Suite(name="sample", tests=(str(tests),))
    return sample.night(tier.named("cpu"), folder, 60), suite


def test_the_readme_names_date_and_commit_of_the_last_full_run() -> None:
    file = ROOT / "benchmarks" / "results" / "equalities.json"
    told = "none recorded yet"
    if file.exists():
        told = full_run(history.Record.from_json(file.read_text()))
    assert f"\nLast full run: {told}.\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_suite_is_published_with_its_commit(tmp_path: Path) -> None:
    figures = {"tests": 240.0, "tests_passed": 239.0}
    record = sample.record(1, "equalities", outcome="failed", figures=figures)
    night.publish([record], tmp_path)
    kept = history.Record.from_json((tmp_path / "equalities.json").read_text())
    assert kept == record
    said = f"239 of 240 tests passed on 2025-06-02 at commit {record.commit}"
    assert full_run(kept) == said


@pytest.mark.parametrize("changes", [{"commit": "abc-dirty"}, {"outcome": "crashed"}])
def test_what_was_not_run_to_its_end_at_a_commit_is_not_published(
    tmp_path: Path, changes: dict[str, str]
) -> None:
    with pytest.raises(UserError, match="was not published"):
        night.publish([sample.record(1, "equalities", **changes)], tmp_path)
    assert not list(tmp_path.iterdir())
