import json
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.config import EvaluationConfig
from mcore_sft.data.prompt import Prompt
from mcore_sft.data.tokenizer import Tokenizer
from mcore_sft.evaluation import run
from mcore_sft.evaluation.benchmarks import Benchmark, Problem
from mcore_sft.evaluation.errors import EvaluationError


class Letters:
    """Stands for prompt and tokenizer: a letter is a token, and every text is an answer."""

    fingerprint = "letters"
    stop_ids = (5, 6)

    def prompt_ids(self, problem: str) -> list[int]:
        return [ord(letter) for letter in problem]

    def describe(self) -> dict[str, Any]:
        return {"template": "letters", "instruction": None}

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return rf"\boxed{{{len(ids)}}}"


def evaluation(
    model: Path, output: Path, *, problems: int = 6, samples: int = 0, **settings: Any
) -> run.Evaluation:
    letters: Any = Letters()
    prompt: Prompt = letters
    tokenizer: Tokenizer = letters
    settings = {"precision": "fp32", "max_new_tokens": 5, "batch_size": 2, **settings}
    return run.Evaluation(
        model=model,
        benchmark=Benchmark(
            name="mine",
            dataset_name="Mine",
            source="here",
            problems=tuple(
                Problem(id=str(n), problem="abc" * (n + 1), answer="5", extra={})
                for n in range(problems)
            ),
        ),
        prompt=prompt,
        tokenizer=tokenizer,
        config=EvaluationConfig.model_validate(settings),
        output=output,
        samples=samples,
    )


def test_all_three_stages(llama: Path, tmp_path: Path) -> None:
    report = run.evaluate(evaluation(llama, tmp_path))
    assert report["verdicts"]["equal"] == report["score"]["symbolic_correct"]["hits"]
    assert sum(report["verdicts"].values()) == 6
    assert set(report["model"]["files"]) >= {"config.json", "model.safetensors"}
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["engine"]["engine"] == "transformers"
    assert "<title>mine" in (tmp_path / "report.html").read_text()
    text = (tmp_path / "report.txt").read_text()
    assert text.startswith(report["text"])
    assert "by tokens" in text
    assert report["prompt"]["few_shot"] == ""
    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").open()]
    assert [row["id"] for row in verdicts] == [str(n) for n in range(6)]
    assert all(row["verdict"] == "equal" for row in verdicts if row["finish_reason"] == "length")


def test_a_killed_run_goes_on_and_asks_nothing_twice(llama: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run.evaluate(evaluation(llama, whole))
    lines = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "answers.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    run.evaluate(evaluation(llama, torn, batch_size=3))
    resumed = (torn / "answers.jsonl").read_text().splitlines(keepends=True)
    assert resumed[:3] == lines[:3]
    assert sorted(resumed) == sorted(lines)
    assert (torn / "verdicts.jsonl").read_text() == (whole / "verdicts.jsonl").read_text()


def test_another_setting_is_asked_anew(llama: Path, tmp_path: Path) -> None:
    run.evaluate(evaluation(llama, tmp_path))
    run.evaluate(evaluation(llama, tmp_path, max_new_tokens=4))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12
    run.evaluate(evaluation(llama, tmp_path, timeout=3.0))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12


def test_more_problems_ask_only_the_new_ones(llama: Path, tmp_path: Path) -> None:
    run.evaluate(evaluation(llama, tmp_path, problems=2))
    run.evaluate(evaluation(llama, tmp_path, problems=5))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 5


def test_grading_asks_for_answers_first(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="6 of 6 answers are not there"):
        run.grade(evaluation(llama, tmp_path))


def test_samples_beside_the_greedy_answer(llama: Path, tmp_path: Path) -> None:
    report = run.evaluate(evaluation(llama, tmp_path, problems=3, samples=2))
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").open()]
    assert [(row["id"], row["sample"]) for row in rows] == [
        (str(problem), sample) for problem in range(3) for sample in range(3)
    ]
    assert [row["class"] is None for row in rows] == [True, False, False] * 3
    assert list(report["score"]) == [
        "symbolic_correct",
        "no_answer",
        "majority@2",
        "pass@2",
        "pass@1[2]",
    ]
    assert "pass@1[2]       | 3" in report["text"]
    # more samples ask only for the new ones, and grading again asks nothing
    run.evaluate(evaluation(llama, tmp_path, problems=3, samples=3))
    run.evaluate(evaluation(llama, tmp_path, problems=3, samples=3, policy="final_answer"))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("change", [{"temperature": 0.9}, {"top_p": 0.5}, {"seed": 1}])
def test_sampling_is_no_part_of_a_greedy_answer(
    llama: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    before = evaluation(llama, tmp_path, problems=1, samples=1).asked
    after = evaluation(llama, tmp_path, problems=1, samples=1, **change).asked
    assert [a.key == b.key for a, b in zip(before, after, strict=True)] == [True, False]


def test_samples_alone(llama: Path, tmp_path: Path) -> None:
    report = run.evaluate(evaluation(llama, tmp_path, problems=2, samples=2, greedy=False))
    assert "num_tests_per_prompt=2" in report["text"]
    assert "temperature=0.7 top_p=0.95" in report["text"]
    assert "greedy" not in report["text"]
    with pytest.raises(EvaluationError, match="nothing is asked; give --benchmark mine:N"):
        run.evaluate(evaluation(llama, tmp_path, greedy=False))


def test_examples_stand_before_the_problem(llama: Path, tmp_path: Path) -> None:
    shots = tmp_path / "shots.yaml"
    shots.write_text(
        "prefix: 'See. '\ntemplate: '{problem}={solution}; '\nsuffix: 'Now '\n"
        "examples: [{problem: p1, solution: s1}, {problem: p2, solution: s2}]\n"
    )
    without = evaluation(llama, tmp_path).asked[0]
    assert "".join(map(chr, without.prompt_ids)) == "abc"
    asked = evaluation(llama, tmp_path, few_shot=1, few_shot_examples=str(shots)).asked[0]
    assert "".join(map(chr, asked.prompt_ids)) == "See. p1=s1; Now abc"
    assert asked.key != without.key
