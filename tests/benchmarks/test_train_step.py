"""The benchmark of the training step runs from end to end, here in one process."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_step
from benchmarks.train_step_turn import take_turn


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case whose steps take milliseconds."""
    case = train_step.Case(
        device="cpu",
        shape=train_step.TINY | {"num_hidden_layers": 2},
        length=128,
        packs=2,
        mean=32,
        steps=train_step.WARM + 1,
    )
    monkeypatch.setattr(train_step, "cases_of", lambda *_, **__: [case])
    monkeypatch.setattr(train_step, "in_own_process", take_turn)


@pytest.mark.usefixtures("small")
def test_contestants_agree_with_the_reference_and_are_measured_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_step.main(["--quick", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["contestant"]: row for row in report["rows"]}
    for name, row in rows.items():
        if "fp8" in name:
            assert "NVIDIA GPU" in row["reason"]
            continue
        assert row["reason"] == "", name
        assert 0 < row["layers_ms"] < row["step_ms"]
        assert row["useful_per_second"] < row["total_per_second"]
    assert "Megatron-core's own loss" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_what_is_wrong_is_shown_as_wrong_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def turn(job: dict[str, Any]) -> dict[str, Any]:
        told = take_turn(job)
        if job["contestant"]["kind"] == "reference":
            told["loss"] *= 1.01
        return told

    monkeypatch.setattr(train_step, "in_own_process", turn)
    monkeypatch.setattr(train_step, "CONTESTANTS", train_step.CONTESTANTS[:1])
    assert train_step.main(["--quick"]) == 1
    assert "WRONG: loss of the first step" in capsys.readouterr().out


def test_layers_are_as_many_as_fit() -> None:
    room = [int(gigabytes * 0.9e9) for gigabytes in (85, 150)]
    small, large = (train_step.layers_that_fit(train_step.LLAMA_8B, 8192, r) for r in room)
    assert 4 <= small < large < 32
    with pytest.raises(SystemExit, match="larger GPU"):
        train_step.layers_that_fit(train_step.LLAMA_8B, 8192, 10**9)
