import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcore_sft.evaluation.grading import grade
from mcore_sft.evaluation.grading.compare.equivalence import Outcome
from mcore_sft.evaluation.grading.grade import Grader, Pair
from tests.evaluation.forks import BOMB, wait_for_busy_fork, wait_until_gone, workers


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout=1.0, processes=1) as made:
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


@pytest.mark.parametrize("bomb", [r"\binom{10^9}{5\cdot 10^8}", BOMB])
def test_a_bomb_costs_its_time_and_no_new_process(grader: Grader, bomb: str) -> None:
    assert grader.grade("2^m+2", r"\boxed{2+2^m}").verdict.outcome == "equal"
    (worker,) = workers(grader)
    process, fork = worker._process, worker._fork
    for _ in range(2):
        assert grader.grade("5", rf"\boxed{{{bomb}}}").verdict.outcome == "timeout"
        assert grader.grade("2^m+2", r"\boxed{2+2^m}").verdict.outcome == "equal"
    assert worker._process is process
    assert worker._fork != fork


def test_a_bomb_harms_no_other_answer(grader: Grader) -> None:
    pairs = [Pair(gold="2^a+b", prediction=p) for p in ("b+2^a", "(10^9)!", "a-b")]
    verdicts = dict(grader.judge_all(pairs))
    assert [verdicts[place].outcome for place in range(3)] == ["equal", "timeout", "different"]


def test_workers_end_with_the_grader() -> None:
    with Grader(timeout=60, processes=1) as grader:
        left = grader.judge_all(
            [Pair(gold="2^m+2", prediction="2+2^m"), Pair(gold="5", prediction=BOMB)]
        )
        next(left)
        fork = wait_for_busy_fork(grader)
    wait_until_gone(fork)


@pytest.mark.parametrize(
    ("gold", "response", "outcome"),
    [
        ("4", "so x is 4 and then", "equal"),
        ("4", r"\boxed{5} no, \boxed{4}", "different"),
        ("52_8", r"\boxed{52_7}", "equal"),
        (r"\frac12", "no number at all", "different"),
    ],
)
def test_nemo_rl_grades_as_it_does_there(gold: str, response: str, outcome: Outcome) -> None:
    with Grader(timeout=10, policy="nemo_rl", processes=1) as grader:
        assert grader.grade(gold, response).verdict.outcome == outcome


def test_a_second_opinion_names_what_is_disputed() -> None:
    rows = [
        ("52_8", r"\boxed{52_7}", False),
        ("5", r"\boxed{5}", False),
        ("5", r"\boxed{6}", False),
        ("5", "nothing", False),
    ]
    with Grader(timeout=10, second_opinion=True, processes=1) as grader:
        graded = dict(grader.grade_all(rows))
    assert [graded[place].second for place in range(4)] == ["equal", "equal", "different", None]
    assert [graded[place].disputed for place in range(4)] == [True, False, False, False]


def test_answers_that_mean_the_same_are_one_class(grader: Grader) -> None:
    answers = [["1/2", None, r"\frac12", "3", "0.5", "3.0"], [None], ["b+2^a", "2^a+b", "a"]]
    assert grader.classes(answers) == [(0, -1, 0, 1, 0, 1), (-1,), (0, 0, 1)]


def test_the_page_of_grading_says_what_happens_and_needs_no_torch() -> None:
    page = (Path(grade.__file__).parent / "README.md").read_text(encoding="utf-8")
    program = page.partition("```python\n")[2].partition("```")[0]
    program = f"""responses = ["42", r"\\boxed{{42}}"]
import sys
{program}
assert same_answer("42", "42.0").correct and not same_answer("p+q", "q-p").correct
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
