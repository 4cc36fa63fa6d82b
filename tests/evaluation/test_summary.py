from typing import Any

import pytest

from mcore_sft.evaluation.benchmarks import Benchmark, Problem
from mcore_sft.evaluation.scores.report import details
from mcore_sft.evaluation.scores.summary import Verdicts, describe, lengths


def row(name: str, sample: int, verdict: str, **more: Any) -> dict[str, Any]:
    return {
        "id": name, "sample": sample, "verdict": verdict, "rule": "number", "missing": None,
        "boxes_differ": False, "disputed": False, "class": 0, "finish_reason": "stop",
        "num_tokens": 10, "subject": None, "level": None, **more,
    }  # fmt: skip


BENCHMARK = Benchmark(
    name="mine",
    dataset_name="Mine",
    source="here",
    problems=(
        Problem(id="a", problem="?", answer="1", extra={"solution": r"\boxed{1} or \boxed{2}"}),
        Problem(id="b", problem="?", answer="1", extra={"solution": r"\boxed{1}"}),
    ),
)


def test_breakdowns_count_the_greedy_answers() -> None:
    easy = {"subject": "Algebra", "level": 1}
    hard = {"subject": "Algebra", "level": 2}
    cut = {"missing": "truncated", "rule": "truncated", "finish_reason": "length"}
    rows = [
        row("a", 0, "equal", **easy),
        row("a", 1, "different", **easy),
        row("b", 0, "no_answer", num_tokens=30, **hard, **cut),
        row("b", 1, "different", **hard),
    ]
    told = describe(Verdicts(rows=rows), BENCHMARK)
    assert told["score"]["symbolic_correct"]["hits"] == 1
    assert told["score"]["no_answer"]["percent"] == 50
    assert told["by"]["subject"]["Algebra"]["total"] == 2
    assert {level: one["hits"] for level, one in told["by"]["level"].items()} == {"1": 1, "2": 0}
    assert told["by_subject_level"]["Algebra"]["1"]["percent"] == 100
    assert told["missing"] == {"truncated": 1}
    assert told["rules"] == {"equal": {"number": 1}, "no_answer": {"truncated": 1}}
    assert (told["truncated"], told["mean_tokens"]) == (1, 20)
    assert told["gold_defects"] == [
        {"id": "a", "reason": "the boxes of its solution do not say the same"}
    ]


def test_modes_of_samples() -> None:
    verdicts = Verdicts(
        rows=[
            # two right answers that are spelled otherwise are one class
            row("a", 1, "equal", **{"class": 0}),
            row("a", 2, "different", **{"class": 1}),
            row("a", 3, "equal", **{"class": 0}),
            row("b", 1, "no_answer", **{"class": -1}),
            row("b", 2, "no_answer", **{"class": -1}),
            row("b", 3, "equal", **{"class": 0}),
        ]
    )
    modes = verdicts.modes()
    right = {mode: found.percent for mode, (found, _) in modes.items()}
    assert right == {"majority@3": 100, "pass@3": 100, "pass@1[3]": pytest.approx(50)}
    silent = {mode: found.percent for mode, (_, found) in modes.items()}
    assert silent == {"majority@3": 0, "pass@3": 0, "pass@1[3]": pytest.approx(100 / 3)}
    of_two = verdicts.modes_at(2)
    # pass@2 is the estimate from all three answers: b has one right one in three
    assert {mode: found.percent for mode, (found, _) in of_two.items()} == {
        "majority@2": pytest.approx(25),
        "pass@2": pytest.approx(100 * (1 + 2 / 3) / 2),
        "pass@1[2]": pytest.approx(25),
    }
    assert of_two["pass@2"][1].percent == 50


def test_without_greedy_answers_the_score_is_the_mean_of_samples() -> None:
    rows = [
        row("a", 1, "equal", **{"class": 0}),
        row("a", 2, "equal", **{"class": 0}),
        row("a", 3, "different", **{"class": 1}),
    ]
    score = describe(Verdicts(rows=rows), BENCHMARK)["score"]
    assert score["majority@3"]["percent"] == 100
    assert score["symbolic_correct"]["percent"] == pytest.approx(200 / 3)


def test_lengths_hold_every_answer_once() -> None:
    few = [row(str(n), 0, "equal", num_tokens=tokens) for n, tokens in enumerate([5] * 8 + [9])]
    bins = lengths(few)
    assert bins[0]["from"] == 5
    assert bins[-1]["to"] is None
    assert sum(one["total"] for one in bins) == 9
    many = lengths([row(str(n), 0, "equal", num_tokens=n) for n in range(100)])
    assert len(many) == 10
    assert {one["total"] for one in many} <= {9, 10, 11}
    assert sum(one["total"] for one in many) == 100
    assert lengths([]) == []


def test_lengths_that_no_server_told_are_not_counted() -> None:
    rows = [row("a", 0, "equal", num_tokens=None), row("b", 0, "equal", num_tokens=8)]
    told = describe(Verdicts(rows=rows), BENCHMARK)
    assert told["mean_tokens"] == 8
    assert [one["total"] for one in told["lengths"]] == [1]
    told = describe(Verdicts(rows=rows[:1]), BENCHMARK)
    assert (told["mean_tokens"], told["lengths"]) == (None, [])
    assert "tokens" not in details(told | {"evaluation": {"second_opinion": False}})
