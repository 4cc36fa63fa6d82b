import json
from pathlib import Path

import compare
import pytest
import summarize

from mcore_sft.base.errors import UserError
from mcore_sft.evaluation.errors import EvaluationError
from tests.tools.runs import write_run


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, arguments)])
    compare.main()


def test_flipped_problems_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "a", [True] * 5 + [False] * 5)
    b = write_run(tmp_path / "b", [True] * 4 + [False] + [True] * 3 + [False] * 2)
    call(monkeypatch, a, b, "--html", tmp_path / "b.html", "--show", 2)
    printed = capsys.readouterr().out
    assert "mine, 10 problems" in printed
    table = [line.split() for line in printed.splitlines()]
    assert ["4", "1", "3", "2"] in table
    # 2 * (1 + 4) / 16
    assert "B less A: +20.00 points" in printed
    assert "p = 0.625" in printed
    assert ["p4", "5", "5", "(no_box)"] in table
    assert "B alone was right: 3" in printed
    assert ["p6", "5", "(no_box)", "5"] in table
    assert "and 1 more: --show 3" in printed
    assert (tmp_path / "b.html").read_text().startswith("<!doctype html>")


def test_two_versions_of_the_grader_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_run(tmp_path / "a", [True]), write_run(tmp_path / "b", [True])
    report = json.loads((b / "report.json").read_text())
    (b / "report.json").write_text(json.dumps(report | {"grader": {"version": 9}}))
    call(monkeypatch, a, b)
    assert "graded by versions 9 and unknown of the grader" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["summarize.py", str(tmp_path)])
    summarize.main()
    assert "graded by versions 9 and unknown of the grader" in capsys.readouterr().out


def test_other_problems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write_run(tmp_path / "a", [True] * 2), write_run(tmp_path / "b", [True] * 3)
    with pytest.raises(EvaluationError, match="not asked the same: 1 problems differ, p2 first"):
        call(monkeypatch, a, b)


def test_a_folder_that_is_not_there_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_run(tmp_path / "a", [True]), write_run(tmp_path / "b", [True])
    with pytest.raises(UserError, match="there is no folder"):
        call(monkeypatch, a, b, "--html", tmp_path / "none/b.html")
    assert not capsys.readouterr().out


def test_what_is_no_evaluation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write_run(tmp_path / "a", [True]), write_run(tmp_path / "b", [True])
    (b / "verdicts.jsonl").write_text("[1]\n")
    with pytest.raises(EvaluationError, match=r"b/verdicts\.jsonl, row 1: expected a JSON object"):
        call(monkeypatch, a, b)
    (b / "report.json").write_text("[]")
    with pytest.raises(EvaluationError, match=r"b/report\.json: expected a JSON object"):
        call(monkeypatch, a, b)
