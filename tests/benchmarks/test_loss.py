"""The benchmark of the loss runs from end to end; what it measures is nobody's business here."""

import json
from pathlib import Path

import pytest

from benchmarks import loss


def test_small_cases_are_measured_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = loss.Case(device="cpu", rows=40, width=16, vocab=101, dtype="bf16", masked=35)
    monkeypatch.setattr(loss, "cases_of", lambda device, quick: [case])
    assert loss.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    measured = {row["contestant"]: row for row in rows if not row["reason"]}
    assert {"eager", "eager, gathered rows", "ours", "ours, main_grad"} <= set(measured)
    assert all(row["ms"] > 0 and row["rounds"] >= 7 for row in measured.values())
    assert "35 % masked" in capsys.readouterr().out


def test_what_is_wrong_is_shown_as_wrong_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = loss.Contestant(
        name="ours", variants=loss.only(lambda problem: 1.1 * loss.eager(problem)), ours=True
    )
    case = loss.Case(device="cpu", rows=40, width=16, vocab=101, dtype="fp32")
    monkeypatch.setattr(loss, "cases_of", lambda device, quick: [case])
    monkeypatch.setattr(loss, "CONTESTANTS", (loss.CONTESTANTS[0], wrong))
    assert loss.main(["--quick"]) == 1
    assert "ours: WRONG" in capsys.readouterr().out
