import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcore_sft.evaluation.grade import Grader, Pair


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout=1.5, processes=1) as made:
        yield made


def test_grades_in_whatever_order_by_position(grader: Grader) -> None:
    rows = [
        ("2", r"\boxed{3}", False),
        (r"3\sqrt{13}", r"\boxed{\sqrt{117}}", False),
        ("2", "2", False),
        ("2", "thinking", True),
    ]
    graded = dict(grader.grade_all(rows))
    outcomes = [graded[place].verdict.outcome for place in range(4)]
    assert outcomes == ["different", "equal", "no_answer", "no_answer"]
    assert graded[3].verdict.rule == "truncated"


@pytest.mark.parametrize(
    "payload",
    [
        r"\boxed{__import__('pathlib').Path('MARKER').touch()}",
        r"\boxed{open('MARKER','w')}",
        r"\boxed{\text{open('MARKER','w')}}",
        r"\boxed{\operatorname{open('MARKER','w')}(x)}",
        r"\boxed{x + open('MARKER','w')}",
    ],
)
def test_an_answer_is_never_executed(grader: Grader, payload: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    graded = grader.grade("5", payload.replace("MARKER", str(marker)))
    assert graded.verdict.outcome != "equal"
    assert not marker.exists()


@pytest.mark.parametrize("bomb", [r"\binom{10^9}{5\cdot 10^8}", "(10^9)!"])
def test_a_bomb_costs_the_deadline_and_never_the_run(grader: Grader, bomb: str) -> None:
    grader.grade("m+2", r"\boxed{2+m}")  # a worker is warm
    start = time.monotonic()
    assert grader.grade("5", rf"\boxed{{{bomb}}}").verdict.outcome == "timeout"
    assert time.monotonic() - start < 1.5 + 1
    assert grader.grade("m+2", r"\boxed{2+m}").verdict.outcome == "equal"


def test_a_bomb_harms_no_other_answer(grader: Grader) -> None:
    pairs = [Pair(gold="a+b", prediction=p) for p in ("b+a", "(10^9)!", "a-b")]
    verdicts = dict(grader.judge_all(pairs))
    assert [verdicts[place].outcome for place in range(3)] == ["equal", "timeout", "different"]
