"""The benchmark of the head runs from end to end; what it measures is nobody's business here."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import head, kernels


def test_rates_steps_and_their_kernels_are_measured_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert head.main(["--json", str(tmp_path / "head.json")]) == 0
    told = json.loads((tmp_path / "head.json").read_text())
    assert {"square", "logits", "dX", "dW in bf16", "copy"} <= told["rates"].keys()
    assert all(rate > 0 for rate in told["rates"].values())
    for step, masked in zip(told["steps"], (0, 35), strict=True):
        assert step["masked"] == masked
        assert step["of_floor"] == pytest.approx(step["ms"] / step["floor_ms"])
        assert step["met"] is None, "a CPU has no goal"
        assert any("mm" in kernel["kernel"] for kernel in step["kernels"])
    assert "35 % masked" in capsys.readouterr().out


def test_a_round_on_a_gpu_is_queued_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    event = SimpleNamespace(
        record=lambda: done.append("mark"), synchronize=lambda: None, elapsed_time=lambda end: 6.0
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("wait"), raising=False)
    call = partial(done.append, "call")
    assert head.milliseconds(call, "cuda", rounds=1, calls=3) == 2.0
    assert done == 3 * ["wait", "mark", "call", "call", "call", "mark"]


def test_the_longest_come_first_and_long_names_keep_their_ends() -> None:
    a, b = torch.ones(400, 400), torch.ones(4)
    found = kernels.kernels(lambda: (a @ a, b + b), "cpu")
    assert found[0]["kernel"] == "aten::mm"
    assert found[0]["calls"] == 1
    assert [row["ms"] for row in found] == sorted((row["ms"] for row in found), reverse=True)
    (line,) = kernels.lines([{"kernel": "a" * 100 + "b" * 100, "calls": 2, "ms": 1.5}], width=20)
    assert line == "    1.500 ms      2 x  aaaaaaaa .. bbbbbbbb"
