import json
from pathlib import Path

import pytest

from mcore_sft.config import BenchmarkConfig
from mcore_sft.evaluation import benchmarks
from mcore_sft.evaluation.benchmarks import Problem
from mcore_sft.evaluation.graders import ProblemGrader, open_grader

CHOICES = ("4", "a red fox", r"$5\text{ cm}$", "none of these")
CHOICE = Problem(id="1", problem="?", answer="C", extra={}, choices=CHOICES)


def choice() -> ProblemGrader:
    return open_grader("choice", timeout=1, policy="last_box")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{\text{c}}", "C"),
        (r"\boxed{C. $5\text{ cm}$}", "C"),
        (r"\boxed{\text{Option C}}", "C"),
        (r"\boxed{C - it is 5}", "C"),
        (r"\boxed{5\text{ cm}}", "C"),
        (r"\boxed{\text{None of these}}", "D"),
        (r"\boxed{7}. The answer is (B).", "B"),
        ("The answer is (C).", "C"),
        ("The answer is a red fox", "B"),
        ("The correct option is C.", "C"),
        ("Option C is correct, since it is.", "C"),
        ("I choose D.", "D"),
        ("Work.\n\n**B**", "B"),
        ("<answer>C</answer>", "C"),
        ("Work.\n\nC", "C"),
        (r"<think> \boxed{A} </think> \boxed{C}", "C"),
        # none, several, or not one of four
        (r"\boxed{A and C}", None),
        (r"\boxed{E}", None),
        ("Answer: (A), (C)", None),
        ("A cat is here.", None),
        ("It is a large number.", None),
        ("The answer is not A.", None),
    ],
)
def test_the_letter_of_an_option(response: str, letter: str | None) -> None:
    graded = choice().grade(CHOICE, response)
    assert graded.extraction.answer == letter
    outcome = {None: "no_answer", "C": "equal"}.get(letter, "different")
    assert graded.verdict.outcome == outcome


def test_a_choice_that_was_cut_is_none() -> None:
    graded = choice().grade(CHOICE, "The answer is (C).", truncated=True)
    assert (graded.verdict.outcome, graded.verdict.rule) == ("no_answer", "truncated")


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        (r"\boxed{Paris}", "equal"),
        (r"\boxed{ PARIS. }", "equal"),
        (r"\boxed{Paris, France}", "different"),
        ("Paris", "no_answer"),
    ],
)
def test_exact_match(response: str, outcome: str) -> None:
    problem = Problem(id="1", problem="?", answer="Paris", extra={})
    grader = open_grader("exact", timeout=1, policy="last_box")
    assert grader.grade(problem, response).verdict.outcome == outcome


def test_mathematics_is_what_the_policy_finds_and_whether_it_means_the_same() -> None:
    problem = Problem(id="1", problem="?", answer=r"\frac12", extra={})
    with open_grader("mathematics", timeout=10, policy="last_box", processes=1) as grader:
        graded = [grader.grade(problem, response) for response in (r"\boxed{0.5}", "0.5")]
        assert grader.classes([["1/2", None, "0.5"]]) == [(0, -1, 0)]
    assert [each.verdict.outcome for each in graded] == ["equal", "no_answer"]


def test_votes_are_for_texts() -> None:
    assert choice().classes([["C", None, "A", "C"], []]) == [(0, -1, 1, 0), ()]


# A small file of our own, in the columns of MMLU-Pro and in those of GPQA.
QUESTIONS = [
    ("How many legs has a spider?", ["4", "6", "8", "10"], 2),
    ("Which of these is a prime number?", ["91", "97"], 1),
    ("What is the derivative of $x^2$?", ["$2x$", "$x$", "$x^3/3$"], 0),
]


def load(folder: Path, name: str, rows: list[dict[str, object]]) -> benchmarks.Benchmark:
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return benchmarks.load(BenchmarkConfig(name=name, path="b.jsonl"), folder)


def test_options_are_shown_under_their_letters(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question_id": n, "question": question, "options": options, "answer": "ABC"[right]}
        for n, (question, options, right) in enumerate(QUESTIONS)
    ]
    made = load(tmp_path, "mmlu_pro", rows)
    assert made.grader == "choice"
    first = made.problems[0]
    assert first.problem == "How many legs has a spider?\n\nA. 4\nB. 6\nC. 8\nD. 10"
    assert (first.answer, first.choices) == ("C", ("4", "6", "8", "10"))
    by_index: list[dict[str, object]] = [
        {"question": question, "options": options, "answer_index": right}
        for question, options, right in QUESTIONS
    ]
    again = load(tmp_path, "mmlu_pro", by_index).problems
    assert [problem.answer for problem in again] == ["C", "B", "A"]


def test_options_are_shuffled_alike_in_each_run(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {
            "Record ID": f"r{n}", "Question": "?", "Correct Answer": f"right {n}",
            **{f"Incorrect Answer {k}": f"wrong {n} {k}" for k in (1, 2, 3)},
        }
        for n in range(40)
    ]  # fmt: skip
    made = load(tmp_path, "gpqa", rows)
    for number, problem in enumerate(made.problems):
        place = "ABCD".index(problem.answer)
        assert problem.choices[place] == f"right {number}"
        assert f"{problem.answer}. right {number}" in problem.problem
    letters = [problem.answer for problem in made.problems]
    assert all(letters.count(letter) >= 4 for letter in "ABCD")
    assert load(tmp_path, "gpqa", rows).fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "options": ["1", "2"], "answer": "C"}, "'C', which is none of the 2"),
        ({"question": "?", "options": ["1"], "answer": "A"}, "expected 2 to 10 texts"),
        ({"question": "?", "options": ["1", 2], "answer": "A"}, "expected 2 to 10 texts"),
        ({"question": "?", "options": ["1", "2"], "answer_index": 2}, "'2', which is none"),
        ({"question": "?", "answer": "A"}, "no column options for the choices"),
    ],
)
def test_options_that_cannot_be_meant_are_said(
    tmp_path: Path, row: dict[str, object], said: str
) -> None:
    with pytest.raises(benchmarks.EvaluationError) as error:
        load(tmp_path, "mmlu_pro", [row])
    assert said in str(error.value)


def test_a_list_of_answers_is_all_of_them(tmp_path: Path) -> None:
    made = load(tmp_path, "olympiadbench", [{"question": "?", "final_answer": ["$2$", "$3$"]}])
    assert made.problems[0].answer == "$2$, $3$"


def test_what_nobody_has_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        benchmarks, "_read_hub", lambda row, source: [(source, {"problem": "?", "answer": "1"})]
    )
    benchmarks.load(BenchmarkConfig(name="aime25"), tmp_path)
    assert "aime25: nobody has run this benchmark" in capsys.readouterr().err
    benchmarks.load(BenchmarkConfig(name="aime24"), tmp_path)
    assert capsys.readouterr().err == ""
