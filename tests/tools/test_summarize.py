from pathlib import Path

import pytest
import summarize

from mcore_sft.evaluation.errors import EvaluationError
from tests.tools.runs import write_run


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["summarize.py", *map(str, arguments)])
    summarize.main()


def test_all_results_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "a_worse/mine", [True, False, False])
    write_run(runs / "b_better/mine", [True, True, False])
    write_run(runs / "c/killed", [True])
    (runs / "c/killed/report.txt").unlink()
    (runs / "dataset").mkdir()
    (runs / "dataset/report.json").write_text("{}")
    call(monkeypatch, runs, runs / "a_worse")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "runs/" in line]
    assert [line[1:4] for line in lines[:2]] == [
        [str(runs / "b_better/mine"), "3", "66.67%"],
        [str(runs / "a_worse/mine"), "3", "33.33%"],
    ]
    assert lines[2:] == [f"{runs}/c/killed: not finished; evaluate again".split()]


def test_nothing_found_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match=r"tools/evaluate\.py writes them"):
        call(monkeypatch, tmp_path)
    with pytest.raises(EvaluationError, match="none: no such folder"):
        call(monkeypatch, tmp_path / "none")


def test_a_report_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "a", [True])
    (folder / "report.json").write_text("[]")
    with pytest.raises(
        EvaluationError, match=r"a/report\.json: expected a JSON object, given list"
    ):
        call(monkeypatch, tmp_path)
