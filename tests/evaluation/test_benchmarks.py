import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from mcore_sft.config import BenchmarkConfig
from mcore_sft.evaluation import benchmarks
from mcore_sft.evaluation.errors import EvaluationError


def write(folder: Path, *rows: Mapping[str, object] | str) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "b.jsonl"


def load(folder: Path, name: str = "mine", **changes: object) -> benchmarks.Benchmark:
    config = BenchmarkConfig.model_validate({"name": name, "path": "b.jsonl", **changes})
    return benchmarks.load(config, folder)


def test_gsm8k_answers_stand_after_the_marks(tmp_path: Path) -> None:
    write(tmp_path, {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2", "idx": 7})
    (problem,) = load(tmp_path, "gsm8k").problems
    assert (problem.id, problem.problem, problem.answer) == ("7", "1+1?", "2")
    assert problem.solution == "1+1=<<1+1=2>>2\n#### 2"


def test_math_takes_the_answer_or_else_the_last_box(tmp_path: Path) -> None:
    write(tmp_path, {"problem": "p", "solution": r"so $\boxed{3}$", "level": 2})
    (problem,) = load(tmp_path, "math").problems
    assert problem.answer == "3"
    assert problem.extra == {"level": 2, "solution": r"so $\boxed{3}$"}
    write(tmp_path, {"problem": "p", "solution": r"so $\boxed{3}$", "answer": "4"})
    (other,) = load(tmp_path, "math").problems
    assert other.answer == "4"
    assert problem.solution == other.solution == r"so $\boxed{3}$"
    write(tmp_path, {"problem": "p", "answer": " 4 "})
    assert load(tmp_path, "math").problems[0].solution is None


def test_ids_that_repeat_give_way_to_numbers(tmp_path: Path) -> None:
    row = {"problem": "p", "answer": "1"}
    write(tmp_path, row | {"id": "x", "idx": 4}, row | {"id": "x", "idx": 5})
    assert [problem.id for problem in load(tmp_path).problems] == ["4", "5"]
    write(tmp_path, row | {"id": "x"}, row | {"id": "x"})
    assert [problem.id for problem in load(tmp_path).problems] == ["0", "1"]


def test_limit_and_columns_and_numbers(tmp_path: Path) -> None:
    write(tmp_path, {"q": "a", "r": 12}, {"q": "b", "r": 13})
    made = load(tmp_path, problem="q", answer="r", limit=1)
    assert [(problem.problem, problem.answer) for problem in made.problems] == [("a", "12")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"problem": "p", "answer": "1"}, "{broken"], "line 2: broken JSON"),
        ([{"problem": "p", "answer": "1"}, "[1]"], "line 2: expected a JSON object"),
        ([{"probelm": "p", "answer": "1"}], "did you mean probelm?"),
        ([{"problem": "p", "answer": "1"}, {"problem": "p"}], "line 2: column 'answer' is null"),
        ([{"problem": "p", "answer": " "}], "line 1: column 'answer'"),
        ([], "no rows"),
    ],
)
def test_bad_files_are_met_with_a_sentence(
    tmp_path: Path, rows: list[dict[str, object] | str], said: str
) -> None:
    write(tmp_path, *rows)
    with pytest.raises(EvaluationError, match=r"b\.jsonl") as error:
        load(tmp_path)
    assert said in str(error.value)


def test_a_solution_without_a_box_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"problem": "p", "solution": "so 3"})
    with pytest.raises(EvaluationError, match=r"line 1: no answer in column 'solution'"):
        load(tmp_path, "math")


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("amc23", {"id": 0, "question": "p", "answer": "27"}, "27"),
        ("amc23", {"id": 0, "problem": "p", "answer": 27.0}, "27.0"),
        ("aime24", {"id": 60, "problem": "p", "solution": "s", "answer": "025"}, "025"),
        ("aime24", {"id": 60, "problem": "p", "expected_answer": 25}, "25"),
    ],
)
def test_forms_in_which_benchmarks_come(
    tmp_path: Path, name: str, row: dict[str, object], answer: str
) -> None:
    write(tmp_path, row)
    (problem,) = load(tmp_path, name).problems
    assert (problem.id, problem.problem, problem.answer) == (str(row["id"]), "p", answer)


def test_no_hub_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EvaluationError, match=r"cannot be loaded from the Hugging Face hub .*path"):
        benchmarks.load(BenchmarkConfig(name="aime24"), tmp_path)


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="did you mean math-500"):
        benchmarks.load(BenchmarkConfig(name="math500"), tmp_path)
    with pytest.raises(EvaluationError, match=r"none\.jsonl: cannot be read"):
        benchmarks.load(BenchmarkConfig(name="x", path="none.jsonl"), tmp_path)


def test_every_shipped_row_is_whole() -> None:
    rows = benchmarks.shipped()
    assert {"math", "math-500", "gsm8k"} <= set(rows)
    assert all(row.dataset for row in rows.values())
