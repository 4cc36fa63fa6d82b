import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.evaluation.comparison import Result, compare, read, read_report
from mcore_sft.evaluation.errors import EvaluationError
from tests.tools.runs import write_run


def row(name: str, right: bool, **more: Any) -> dict[str, Any]:
    return {
        "id": name, "sample": 0, "problem": f"What is {name}?", "expected_answer": "5",
        "verdict": "equal" if right else "different", **more,
    }  # fmt: skip


def result(*rows: dict[str, Any], policy: str = "last_box") -> Result:
    report = {"benchmark": {"name": "mine"}, "evaluation": {"policy": policy}}
    return Result(folder=Path("run"), report=report, rows=rows)


def test_greedy_answers_are_paired_by_problem() -> None:
    a = result(row("p", True), row("q", True), row("r", False), row("r", True, sample=1))
    b = result(row("r", True), row("q", False), row("p", True), row("r", False, sample=1))
    made = compare(a, b)
    assert (made.paired.both, made.paired.only_a, made.paired.only_b) == (1, 1, 1)
    assert made.paired.neither == 0
    assert [left["id"] for left, _ in made.lost] == ["q"]
    assert [right["id"] for _, right in made.won] == ["r"]


def test_verdicts_of_two_versions_are_compared_with_a_warning() -> None:
    a, b = result(row("p", True)), result(row("p", False))
    assert compare(a, b).warning is None
    b = replace(b, report={**b.report, "grader": {"kind": "mathematics", "version": 7}})
    said = compare(a, b).warning
    assert said is not None
    assert "graded by versions 7 and unknown of the grader" in said
    assert compare(b, b).warning is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (result(row("q", True)), "not asked the same: 2 problems differ, p first"),
        (result(row("p", True, problem="?")), "not asked the same: 1 problems differ, p first"),
        (result(row("p", True, expected_answer="6")), "1 problems differ"),
        (result(row("p", True, sample=1)), "it has no greedy answers"),
        (result(row("p", True), policy="nemo_rl"), "by policy last_box, run by nemo_rl"),
    ],
)
def test_other_problems_are_not_compared(other: Result, said: str) -> None:
    with pytest.raises(EvaluationError) as error:
        compare(result(row("p", True)), other)
    assert said in str(error.value)


def test_reports_of_another_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no report\.json that can be read"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(EvaluationError, match="its format is 1, expected 2; evaluate again"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([], "report.json: expected a JSON object, given list; evaluate again"),
        ({"benchmark": None}, "report.json: benchmark is NoneType, expected dict"),
        ({"benchmark": {"name": "mine"}}, "report.json, benchmark: there is no problems"),
        ({"evaluation": {}}, "report.json, evaluation: there is no policy"),
        ({"score": {}}, "report.json, score: there is no symbolic_correct"),
        ({"score": {"symbolic_correct": {}}}, "score, symbolic_correct: there is no percent"),
        ({"score": {"symbolic_correct": {"percent": 5}}}, "there is no wilson95"),
        ({"score": {"symbolic_correct": {"percent": "5"}}}, "percent is str, expected int | float"),
    ],
)
def test_a_report_without_what_is_read_is_named(tmp_path: Path, change: Any, said: str) -> None:
    folder = write_run(tmp_path / "a", [True])
    path = folder / "report.json"
    report = json.loads(path.read_text()) | change if isinstance(change, dict) else change
    path.write_text(json.dumps(report))
    with pytest.raises(EvaluationError) as error:
        read_report(folder)
    assert str(error.value).startswith(f"{path}")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "row 2: expected a JSON object, given list; evaluate again"),
        ({}, "row 2: there is no id; evaluate again"),
        ({"id": [1]}, "row 2: id is list, expected str"),
        ({"id": "p", "sample": 0}, "row 2: there is no problem"),
    ],
)
def test_a_row_without_what_is_read_is_named(tmp_path: Path, row: Any, said: str) -> None:
    folder = write_run(tmp_path / "a", [True])
    with (folder / "verdicts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(EvaluationError) as error:
        read(folder)
    assert f"{folder / 'verdicts.jsonl'}, {said}" in str(error.value)
