from pathlib import Path

import pytest

from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.few_shot import examples
from mcore_sft.evaluation.grading.extract.extract import last_box

SHOTS = """
prefix: "See. "
template: "{problem}={solution}; "
suffix: "Now "
examples: [{problem: p1, solution: s1}, {problem: p2, solution: s2}]
"""


@pytest.fixture
def shots(tmp_path: Path) -> str:
    path = tmp_path / "shots.yaml"
    path.write_text(SHOTS)
    return str(path)


def test_the_first_of_a_file(shots: str) -> None:
    assert examples(shots, 1) == "See. p1=s1; Now "
    assert examples(shots, 2) == "See. p1=s1; p2=s2; Now "


def test_none_is_nothing_at_all() -> None:
    assert examples("never read", 0) == ""


def test_what_is_wrong_is_said(shots: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"few_shot 3: .* has 2 examples; ask for fewer"):
        examples(shots, 3)
    with pytest.raises(EvaluationError, match="one of the shipped: math"):
        examples("nothere", 1)
    (tmp_path / "half.yaml").write_text("prefix: ''\nexamples: []\n")
    with pytest.raises(EvaluationError, match=r"(?s)half\.yaml: .*template.*expected prefix"):
        examples(str(tmp_path / "half.yaml"), 1)


def test_shipped_examples_are_solved() -> None:
    made = examples("math", 5)
    solutions = made.split("Solution:\n")[1:]
    assert [last_box(solution) for solution in solutions] == [
        "34", "12", "9", r"\frac{60}{13}", r"\frac{\pi}{6}, \frac{11\pi}{6}",
    ]  # fmt: skip
    assert made.endswith("Problem:\n")
