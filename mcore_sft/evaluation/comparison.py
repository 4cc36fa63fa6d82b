"""Two evaluations of the same problems in, how far apart they are out.

verdicts.jsonl of A and of B -> Comparison (paired counts, the problems that flipped)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from mcore_sft.evaluation.answers import read_rows
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.run import FORMAT, REPORT, VERDICTS
from mcore_sft.evaluation.scores.statistics import Paired
from mcore_sft.evaluation.scores.summary import Row, is_graded, is_right


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one evaluation left in its folder."""

    folder: Path
    report: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def greedy(self) -> dict[str, Row]:
        """The greedy answer of each problem."""
        return {row["id"]: row for row in self.rows if row["sample"] == 0}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A and B on the same problems, by their greedy answers."""

    benchmark: str
    paired: Paired
    lost: tuple[tuple[Row, Row], ...]
    """Answers (of A, of B) to problems that A alone had right."""
    won: tuple[tuple[Row, Row], ...]
    """Answers (of A, of B) to problems that B alone had right."""
    not_graded: int
    """Problems that are left out, because an answer to them could not be graded."""
    warning: str | None
    """Why the difference may be one of grading, if it may."""


_Fields = Mapping[str, type | UnionType]
# What is read of a report and of a row of verdicts, and what it has to be.
_REPORT: Mapping[str, _Fields] = {
    "benchmark": {"name": str, "problems": int},
    "evaluation": {"policy": str},
    "model": {"folder": str},
    "score": {"symbolic_correct": dict},
}
_ROW: _Fields = {
    "id": str, "sample": int, "problem": str, "expected_answer": str, "response": str,
    "extracted": str | None, "verdict": str, "rule": str,
}  # fmt: skip


def read_report(folder: Path) -> dict[str, Any]:
    """The report.json of an evaluation."""
    path = folder / REPORT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise EvaluationError(
            f"{folder}: no {REPORT} that can be read; give a folder that tools/evaluate.py wrote"
        ) from None
    _require(content, {}, str(path))
    form = content.get("format")
    if form != FORMAT:
        raise EvaluationError(
            f"{path}: its format is {form}, expected {FORMAT}; evaluate again with this version: "
            "what is answered is not asked again"
        )
    for name, fields in _REPORT.items():
        _require(content, {name: dict}, str(path))
        _require(content[name], fields, f"{path}, {name}")
    for name, figure in content["score"].items():
        _require(figure, {"percent": int | float}, f"{path}, score, {name}")
        interval = "interval95" if "interval95" in figure else "wilson95"
        _require(figure, {interval: list}, f"{path}, score, {name}")
    return dict(content)


def read(folder: Path) -> Result:
    """The evaluation in `folder`."""
    report = read_report(folder)
    path = folder / VERDICTS
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        _require(row, _ROW, f"{path}, row {number}")
    return Result(folder=folder, report=report, rows=rows)


def _require(content: Any, fields: _Fields, where: str) -> None:
    """Raise `EvaluationError` where `content` is no object that holds `fields`."""
    if not isinstance(content, dict):
        raise EvaluationError(
            f"{where}: expected a JSON object, given {type(content).__name__}; evaluate again"
        )
    for name, kind in fields.items():
        if name not in content:
            raise EvaluationError(f"{where}: there is no {name}; evaluate again")
        if not isinstance(content[name], kind):
            raise EvaluationError(
                f"{where}: {name} is {type(content[name]).__name__}, expected "
                f"{kind.__name__ if isinstance(kind, type) else kind}; evaluate again"
            )


def compare(a: Result, b: Result) -> Comparison:
    """Pair the answers of two runs; raises `EvaluationError` where they were asked other things."""
    _check(a, b)
    left, right = a.greedy, b.greedy
    asked = [(left[name], right[name]) for name in left]
    pairs = [pair for pair in asked if all(map(is_graded, pair))]
    kinds: dict[tuple[bool, bool], list[tuple[Row, Row]]] = {}
    for pair in pairs:
        kinds.setdefault((is_right(pair[0]), is_right(pair[1])), []).append(pair)
    lost, won = kinds.get((True, False), []), kinds.get((False, True), [])
    return Comparison(
        benchmark=a.report["benchmark"]["name"],
        paired=Paired(
            both=len(kinds.get((True, True), [])),
            only_a=len(lost),
            only_b=len(won),
            neither=len(kinds.get((False, False), [])),
        ),
        lost=tuple(lost),
        won=tuple(won),
        not_graded=len(asked) - len(pairs),
        warning=grader_warning([a.report, b.report]),
    )


def grader_warning(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """What is said of reports that several versions of the grader made; none of others."""
    versions = {str(report.get("grader", {}).get("version", "unknown")) for report in reports}
    if len(versions) < 2:
        return None
    return (
        f"warning: graded by versions {' and '.join(sorted(versions))} of the grader, which may "
        "count the same answer otherwise. Fix: evaluate the older again with this version; what is "
        "answered is not asked again"
    )


def _check(a: Result, b: Result) -> None:
    for result in (a, b):
        if not result.greedy:
            raise EvaluationError(
                f"{result.folder}: it has no greedy answers, which are what is compared; evaluate "
                "with evaluation.greedy=true"
            )
    asked = [
        {name: (row["problem"], row["expected_answer"]) for name, row in result.greedy.items()}
        for result in (a, b)
    ]
    if asked[0] != asked[1]:
        other = [name for name in asked[0] | asked[1] if asked[0].get(name) != asked[1].get(name)]
        raise EvaluationError(
            f"{a.folder} and {b.folder} were not asked the same: {len(other)} problems differ, "
            f"{other[0]} first; evaluate both on one benchmark, with one --limit"
        )
    policies = [result.report["evaluation"]["policy"] for result in (a, b)]
    if policies[0] != policies[1]:
        raise EvaluationError(
            f"{a.folder} was graded by policy {policies[0]}, {b.folder} by {policies[1]}; evaluate "
            "one again with the other's evaluation.policy: what is answered is not asked again"
        )
