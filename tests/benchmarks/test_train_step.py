"""The benchmark of the training step runs from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_step
from benchmarks.machine import Deadline
from benchmarks.train_step_turn import take_turn
from tests.distributed import run_ranks


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
    monkeypatch.setattr(train_step, "in_own_process", forked)


def forked(job: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
    """A turn in a process of its own that has imported everything."""
    (told,) = run_ranks(1, take_turn, job)
    return dict(told)


@pytest.mark.usefixtures("small")
def test_contestants_agree_with_the_reference_and_are_measured_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_step.main(["--quick", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["contestant"]: row for row in report["rows"]}
    for name, row in rows.items():
        if "fp8" in name or "Liger" in name:
            assert "NVIDIA GPU" in row["reason"]
            continue
        assert row["reason"] == "", name
        assert row["kernels"][0]["ms"] > 0
        assert 0 < row["layers_ms"] < row["step_ms"]
        assert row["useful_per_second"] < row["total_per_second"]
    assert "Megatron-core's own loss" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_what_is_wrong_is_shown_as_wrong_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def turn(job: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
        told = forked(job, deadline)
        if job["contestant"]["kind"] == "reference":
            told["loss"] *= 1.01
        return told

    monkeypatch.setattr(train_step, "in_own_process", turn)
    monkeypatch.setattr(train_step, "CONTESTANTS", train_step.CONTESTANTS[:1])
    assert train_step.main(["--quick"]) == 1
    assert "WRONG: loss of the first step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("print(1); print('{\"loss\": 2}'); exit(9)", {"loss": 2, "note": "exit code 9"}),
        ("exit('no GPU')", {"reason": "not run: exit code 1: no GPU"}),
        ("print('{\"loss\": 2}')", {"loss": 2}),
    ],
)
def test_a_turn_that_ends_badly_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, told: dict[str, Any]
) -> None:
    (tmp_path / "turn.py").write_text(program)
    monkeypatch.setattr(train_step, "TURN", tmp_path / "turn.py")
    assert train_step.in_own_process({"case": {"device": "cpu"}}, Deadline(1)) == told


def test_what_has_no_time_is_not_begun_and_what_runs_into_the_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The part of a report that it is has a limit, at which all that it has measured is lost."""
    turn = tmp_path / "turn.py"
    turn.write_text(
        "import json, sys, time\n"
        "job = json.load(open(sys.argv[1]))\n"
        "if job['contestant']['kind'] == 'megatron': time.sleep(60)\n"
        "told = {'seconds': [1] * 9, 'layer_seconds': [1] * 9, 'peak_bytes': 0, 'kernels': []}\n"
        "print(json.dumps(told | {'loss': 1.0, 'grad_norm': 1.0}))\n"
    )
    monkeypatch.setattr(train_step, "TURN", turn)
    file = tmp_path / "report.json"
    assert train_step.main(["--quick", "--minutes", "0.05", "--json", str(file)]) == 0
    rows = {row["contestant"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows[train_step.OURS]["step_ms"] == 1000
    late = "not run: the 0.05 min were over"
    assert rows["Megatron-core's own loss, bf16"]["reason"] == f"{late}, and it was not done"
    assert rows["transformers, bf16"]["reason"] == late
    assert late in capsys.readouterr().out


def test_later_rounds_that_have_no_time_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = train_step.cases_of("cpu", quick=True, layers=1)[0]
    figures = {"seconds": [1.0], "layer_seconds": [1.0], "peak_bytes": 0, "kernels": []}
    turns = []
    deadline = Deadline(1)

    def turn(job: dict[str, Any], _: Deadline) -> dict[str, Any]:
        turns.append(job["contestant"]["name"])
        if len(turns) == 3:
            deadline.end = 0.0
            return {"reason": "late", "late": True}
        return dict(figures)

    monkeypatch.setattr(train_step, "in_own_process", turn)
    two = [train_step.CONTESTANTS[0], train_step.CONTESTANTS[-2]]
    results = train_step.measure(case, two, 3, {}, deadline)
    assert turns[:2] == [one.name for one in two]
    assert len(turns) == 3
    assert [(len(one.seconds), one.reason) for one in results] == [(1, ""), (1, "")]


def test_layers_are_as_many_as_fit() -> None:
    room = [int(gigabytes * 0.9e9) for gigabytes in (85, 150)]
    small, large = (train_step.layers_that_fit(train_step.LLAMA_8B, 8192, r) for r in room)
    assert 4 <= small < large < 32
    with pytest.raises(SystemExit, match="larger GPU"):
        train_step.layers_that_fit(train_step.LLAMA_8B, 8192, 10**9)


def test_documents_have_the_lengths_that_are_told() -> None:
    case = train_step.Case(
        device="cuda",
        shape=train_step.LLAMA_8B | {"num_hidden_layers": 1},
        length=4096,
        packs=8,
        mean=512,
        steps=1,
    )
    work = train_step.workload(case)
    assert 460 < sum(work["lengths"]) / len(work["lengths"]) < 560
    assert 0.95 < work["useful"] / work["total"] <= 1
    assert 0.6 < work["supervised"] / work["useful"] < 0.75


def test_goals_are_judged_where_both_sides_have_run() -> None:
    rows = [
        {"length": 8, "contestant": train_step.OURS, "fp8": "none", "mfu": 0.4},
        {"length": 8, "contestant": "ours, fp8 x", "fp8": "x", "layers_speedup": 1.4},
        {"length": 8, "contestant": "peer", "fp8": "none", "step_speedup": 0.8},
    ]
    verdicts = {goal["goal"]: goal["met"] for goal in train_step.goals_of(rows)}
    assert verdicts == {
        "bf16 MFU": False,
        "ours, fp8 x: layers over bf16": True,
        "ours, fp8 x: step over bf16": None,
        f"{train_step.OURS}: step over peer": True,
    }
