"""Tests that take too long for every change in, their record out.

pytest -> tests.xml -> Record

A suite whose tests.xml is there at this commit is not run again.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mcore_sft.base import files
from nightly import commits, work
from nightly.history import Outcome, Record
from nightly.judge import Finding
from nightly.run import Night, told
from nightly.tier import Suite
from nightly.work import Crash

EVERY_SPEED = "not gpu and not vllm"
"""Tests that are marked slow, too."""


class SuiteRun:
    """One suite of a night."""

    def __init__(self, night: Night, suite: Suite) -> None:
        self.night, self.suite = night, suite
        self.folder = night.folder / suite.name

    def check(self) -> None:
        """Raise `UserError` of whatever can be seen to be wrong: nothing of a suite."""

    def record(self) -> Record:
        """Run the tests unless they were run at this commit, and read their report."""
        report = self.folder / "tests.xml"
        try:
            if not report.exists():
                self._run(report)
            return self._judged(report)
        except Exception as error:  # whatever it is, the rest of the night is run
            return self._record("crashed", datetime.now(UTC), crash=told(error))

    def _run(self, report: Path) -> None:
        """Leave `report`, if pytest comes to its end; raises `Crash` if it does not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = report.with_name(".tests.xml.tmp")
        beside.unlink(missing_ok=True)
        words = ["-q", *self.suite.tests, "-m", EVERY_SPEED, f"--junitxml={beside}"]
        command = ["python", "-m", "pytest", "-p", "no:cacheprovider", *words]
        try:
            work.run(command, self.folder / "tests.log", threads=1, until=self.night.until)
        except Crash:
            if not beside.exists():  # pytest writes it where tests fail
                raise
        files.sync(beside)
        files.rename(beside, report)

    def _judged(self, report: Path) -> Record:
        root = ElementTree.parse(report).getroot()
        cases = list(root.iter("testcase"))
        failed = list(_failed(cases))
        passed = len(cases) - len(failed) - sum(case.find("skipped") is not None for case in cases)
        summary = Finding(
            gate="tests",
            passed=bool(passed) and not failed,
            value=passed,
            limit=len(cases),
            sentence=f"{passed} of {len(cases)} tests passed",
        )
        seconds = sum(float(suite.get("time", 0)) for suite in root.iter("testsuite"))
        return self._record(
            "passed" if summary.passed else "failed",
            datetime.fromtimestamp(report.stat().st_mtime, UTC),
            findings=(*failed, summary),
            figures={"tests_passed": passed, "tests": len(cases), "seconds": seconds},
        )

    def _record(self, outcome: Outcome, when: datetime, **found: Any) -> Record:
        night, name = self.night, self.suite.name
        own = [record for record in night.earlier if record.benchmark == name]
        said: dict[str, Any] = {"findings": (), "figures": {}} | found
        return Record(
            tier=night.tier.name,
            benchmark=name,
            commit=night.commit,
            commit_time=night.commit_time,
            date=when.isoformat(timespec="seconds"),
            machine=night.machine,
            outcome=outcome,
            curve=None,
            reference=None,
            commits=None if outcome == "passed" else commits.suspects(own, night.commit, outcome),
            **said,
        )


def _failed(cases: list[ElementTree.Element]) -> Iterator[Finding]:
    """A finding of each test that failed, with the first line of its error."""
    for case in cases:
        for one in (*case.findall("failure"), *case.findall("error")):
            error = (one.get("message") or one.text or "no message").strip()
            name = f"{case.get('classname')}::{case.get('name')}"
            sentence = work.tail(f"{name}: {error.splitlines()[0]}", 1)
            yield Finding(gate="tests", passed=False, sentence=sentence)
            break


def full_run(record: Record) -> str:
    """What a page says of the last full run of a suite."""
    figures = record.figures
    return (
        f"{figures['tests_passed']:.0f} of {figures['tests']:.0f} tests passed on "
        f"{record.date[:10]} at commit {record.commit}"
    )
