"""The benchmark of the loss runs from end to end; what it measures is nobody's business here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loss
from mcore_sft.ops import devices
from mcore_sft.ops.head import Head, Inputs, Machine, Options


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


def test_what_there_was_no_time_for_is_named_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = loss.Case(device="cpu", rows=40, width=16, vocab=101, dtype="bf16")
    both = [case, replace(case, width=32)]
    monkeypatch.setattr(loss, "cases_of", lambda device, quick: both)
    monkeypatch.setattr(loss.Deadline, "over", property(lambda self: self.minutes < 1))
    measure = loss.measure

    def then_time_is_up(*asked: Any) -> list[loss.Result]:
        monkeypatch.setattr(loss.Deadline, "over", True)
        return measure(*asked)

    monkeypatch.setattr(loss, "measure", then_time_is_up)
    file = tmp_path / "rows.json"
    words = ["--quick", "--minutes", "5", "--only", "ours", "--json", str(file)]
    assert loss.main(words) == 1
    assert {row["width"] for row in json.loads(file.read_text())["rows"]} == {16}
    assert "H=32" in (told := capsys.readouterr().out)
    assert "not run: the 5 min were over" in told


@pytest.mark.parametrize("masked", [0, 35])
@pytest.mark.parametrize("into_main_grad", [True, False])
def test_the_memory_that_is_asked_for_is_that_of_the_chunks(
    masked: int, into_main_grad: bool
) -> None:
    case = replace(loss.H100, masked=masked)
    made: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    hidden = torch.empty(case.supervised, case.width, **made)
    weight = torch.empty(case.vocab, case.width, **made)
    labels = torch.empty(case.supervised, device="meta", dtype=torch.int64)
    cuda = Machine(devices._chunk_rows_cuda, 128, *2 * [devices._add_product_cuda])
    main_grad = torch.empty_like(weight, dtype=torch.float32) if into_main_grad else None
    inputs, options = Inputs(hidden, weight, labels, None), Options(case.vocab, "", False)
    head = Head(cuda, inputs, options, True, True, main_grad=main_grad)
    rows = max(chunk.stop - chunk.start for chunk in head.chunks)
    needed = rows * case.vocab * 2 + 2 * hidden.nbytes
    assert head.grad_weight.dtype == (torch.float32 if into_main_grad else torch.bfloat16)
    (asked,) = [
        goal
        for goal in loss.goals_of(case, into_main_grad=into_main_grad)
        if goal.figure == "memory"
    ]
    assert needed <= asked.limit < 1.03 * needed
