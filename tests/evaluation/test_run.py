import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.config import BenchmarkConfig, EvaluationConfig
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import Tokenizer
from mcore_sft.evaluation import benchmarks, run
from mcore_sft.evaluation.benchmarks import Benchmark, Problem
from mcore_sft.evaluation.engines.engine import Engine
from mcore_sft.evaluation.engines.transformers_engine import TransformersEngine
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.grading.compare.equivalence import GRADER
from tests.evaluation.stand_in import FAIL, make_python


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
    model: Path,
    output: Path,
    *,
    problems: int = 6,
    samples: int = 0,
    letters: str = "abc",
    **settings: Any,
) -> run.Evaluation:
    stand_in: Any = Letters()
    prompt: Prompt = stand_in
    tokenizer: Tokenizer = stand_in
    settings = {"precision": "fp32", "max_new_tokens": 5, "batch_size": 2, **settings}
    return run.Evaluation(
        model=model,
        benchmark=Benchmark(
            name="mine",
            dataset_name="Mine",
            source="here",
            problems=tuple(
                Problem(id=str(n), problem=letters * (n + 1), answer="5", extra={})
                for n in range(problems)
            ),
        ),
        prompt=prompt,
        tokenizer=tokenizer,
        config=EvaluationConfig.model_validate(settings),
        output=output,
        samples=samples,
    )


def evaluate(*evaluations: run.Evaluation) -> dict[str, Any]:
    """The last report."""
    reports: list[dict[str, Any]] = []
    run.evaluate(evaluations, lambda _, report: reports.append(report))
    assert len(reports) == len(evaluations)
    return reports[-1]


def test_all_three_stages(llama: Path, tmp_path: Path) -> None:
    report = evaluate(evaluation(llama, tmp_path, policy="nemo_skills"))
    assert report["verdicts"]["equal"] == report["score"]["symbolic_correct"]["hits"]
    assert sum(report["verdicts"].values()) == 6
    assert report["grader"] == {"kind": "mathematics", "version": GRADER}
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


def test_a_response_that_was_cut_has_no_answer(llama: Path, tmp_path: Path) -> None:
    report = evaluate(evaluation(llama, tmp_path))
    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").open()]
    cut = [row for row in verdicts if row["finish_reason"] == "length"]
    assert cut
    assert {(row["verdict"], row["rule"], row["extracted"]) for row in cut} == {
        ("no_answer", "truncated", None)
    }
    assert report["verdicts"]["no_answer"] == report["truncated"] == len(cut)


def test_multiple_choice_is_asked_and_graded(llama: Path, tmp_path: Path) -> None:
    """The options stand in the prompt, and the letter that is chosen is what counts."""
    config = BenchmarkConfig(name="mmlu_pro", path="choices.jsonl", samples=2)
    chosen = benchmarks.load(config, Path(__file__).parents[1] / "fixtures")
    asked = replace(evaluation(llama, tmp_path, policy="nemo_skills", samples=2), benchmark=chosen)
    letters: Any = asked.tokenizer
    letters.decode = lambda ids, skip_special: r"so it is \boxed{\text{C. 8}}"
    report = evaluate(asked)
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").open()]
    assert [row["extracted"] for row in rows] == ["C"] * 12
    assert [row["verdict"] for row in rows[::3]] == ["equal", "different", "equal", "different"]
    assert rows[0]["problem"].endswith("\n\nA. 4\nB. 6\nC. 8\nD. 10")
    assert report["grader"] == {"kind": "choice", "version": GRADER}
    assert report["score"]["symbolic_correct"]["hits"] == 2
    assert report["score"]["majority@2"]["percent"] == 50


def test_a_killed_run_goes_on_and_asks_nothing_twice(llama: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    evaluate(evaluation(llama, whole))
    lines = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "answers.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    evaluate(evaluation(llama, torn, batch_size=3))
    resumed = (torn / "answers.jsonl").read_text().splitlines(keepends=True)
    assert resumed[:3] == lines[:3]
    assert sorted(resumed) == sorted(lines)
    assert (torn / "verdicts.jsonl").read_text() == (whole / "verdicts.jsonl").read_text()


def test_another_setting_is_asked_anew(llama: Path, tmp_path: Path) -> None:
    evaluate(evaluation(llama, tmp_path))
    evaluate(evaluation(llama, tmp_path, max_new_tokens=4))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12
    evaluate(evaluation(llama, tmp_path, timeout=3.0))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12


def test_more_problems_ask_only_the_new_ones(llama: Path, tmp_path: Path) -> None:
    evaluate(evaluation(llama, tmp_path, problems=2))
    evaluate(evaluation(llama, tmp_path, problems=5))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 5


def test_grading_asks_for_answers_first(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="6 of 6 answers are not there"):
        run.grade(evaluation(llama, tmp_path))


def test_samples_beside_the_greedy_answer(llama: Path, tmp_path: Path) -> None:
    report = evaluate(evaluation(llama, tmp_path, problems=3, samples=2))
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
    evaluate(evaluation(llama, tmp_path, problems=3, samples=3))
    evaluate(evaluation(llama, tmp_path, problems=3, samples=3, policy="final_answer"))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12


def test_the_sampling_of_each_answer_is_recorded(llama: Path, tmp_path: Path) -> None:
    asked = evaluation(llama, tmp_path, problems=2, samples=2)
    evaluate(asked)
    for name in ("answers.jsonl", "verdicts.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).open()]
        found = {
            (row["id"], row["sample"]): (row["temperature"], row["top_p"], row["seed"])
            for row in rows
        }
        assert found == {(one.problem.id, one.sample): one.sampling for one in asked.asked}
    assert len({row["seed"] for row in rows if row["sample"]}) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 5}', "[" * 100_000, "\udcff"])
def test_a_damaged_engine_json_is_skipped_and_said(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    evaluate(evaluation(llama, tmp_path, problems=1))
    (tmp_path / "engine.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert evaluate(evaluation(llama, tmp_path, problems=1))["engine"] == {}
    assert f"{tmp_path / 'engine.json'} is skipped: " in capsys.readouterr().err.replace("\n", "")


def test_a_poisoned_folder_goes_on(llama: Path, tmp_path: Path, engines: "Engines") -> None:
    evaluate(evaluation(llama, tmp_path, problems=3))
    file = tmp_path / "answers.jsonl"
    whole = file.read_text()
    first, second, third = whole.splitlines(keepends=True)
    poisoned = json.dumps(json.loads(second) | {"response": None}) + "\n"
    file.write_text(first + poisoned + third)
    evaluate(evaluation(llama, tmp_path, problems=3))
    assert engines.asked == [3, 1]
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())
    assert (tmp_path / "answers.damaged.jsonl").read_text() == poisoned


def test_one_sample(llama: Path, tmp_path: Path) -> None:
    report = evaluate(evaluation(llama, tmp_path, problems=2, samples=1, greedy=False))
    percents = {name: report["score"][name]["percent"] for name in ("majority@1", "pass@1[1]")}
    assert percents["majority@1"] == percents["pass@1[1]"]


@pytest.mark.parametrize("change", [{"temperature": 0.9}, {"top_p": 0.5}, {"seed": 1}])
def test_sampling_is_no_part_of_a_greedy_answer(
    llama: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    before = evaluation(llama, tmp_path, problems=1, samples=1).asked
    after = evaluation(llama, tmp_path, problems=1, samples=1, **change).asked
    assert [a.key == b.key for a, b in zip(before, after, strict=True)] == [True, False]


def test_samples_alone(llama: Path, tmp_path: Path) -> None:
    report = evaluate(evaluation(llama, tmp_path, problems=2, samples=2, greedy=False))
    assert "num_tests_per_prompt=2" in report["text"]
    assert "temperature=0.7 top_p=0.95" in report["text"]
    assert "greedy" not in report["text"]
    with pytest.raises(EvaluationError, match="nothing is asked; give --benchmark mine:N"):
        evaluate(evaluation(llama, tmp_path, greedy=False))


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


class Engines:
    """What `run.open_engine` opened, and how often engines were closed and asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened: list[Engine] = []
        self.closed: list[Engine] = []
        self.asked: list[int] = []
        really, close, generate = (
            run.open_engine,
            TransformersEngine.close,
            TransformersEngine.generate,
        )

        def opening(*arguments: Any, **named: Any) -> Engine:
            self.opened.append(really(*arguments, **named))
            return self.opened[-1]

        def closing(engine: TransformersEngine) -> None:
            self.closed.append(engine)
            close(engine)

        def generating(engine: TransformersEngine, requests: Any) -> Iterator[Any]:
            self.asked.append(len(requests))
            return generate(engine, requests)

        patch.setattr(run, "open_engine", opening)
        patch.setattr(TransformersEngine, "close", closing)
        patch.setattr(TransformersEngine, "generate", generating)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    return Engines(monkeypatch)


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_one_engine_answers_every_benchmark(llama: Path, tmp_path: Path, engines: Engines) -> None:
    def both(**settings: Any) -> list[run.Evaluation]:
        return [
            evaluation(llama, tmp_path / "two", problems=2, **settings),
            evaluation(llama, tmp_path / "three", problems=3, **settings),
        ]

    evaluate(*both())
    assert engines.asked == [2, 3]
    assert engines.opened == engines.closed
    assert len(engines.opened) == 1
    for name in ("two", "three"):
        assert json.loads((tmp_path / name / "engine.json").read_text())["engine"] == "transformers"
    # what is answered needs none
    evaluate(*both())
    evaluate(*both(policy="final_answer"))
    assert len(engines.opened) == 1
    # one is opened where the first question is open, and by what is open alone
    answers = tmp_path / "three" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:2]))
    evaluate(*both())
    assert engines.asked == [2, 3, 1]
    assert engines.opened == engines.closed
    assert len(engines.opened) == 2


def test_each_report_is_told_before_the_next_is_asked(llama: Path, tmp_path: Path) -> None:
    both = [evaluation(llama, tmp_path / name, problems=1) for name in "ab"]
    told: list[tuple[Path, bool]] = []

    def tell(done: run.Evaluation, report: dict[str, Any]) -> None:
        assert report == json.loads((done.output / "report.json").read_text())
        told.append((done.output, (tmp_path / "b" / "engine.json").exists()))

    run.evaluate(both, tell)
    assert told == [(tmp_path / "a", False), (tmp_path / "b", True)]


def test_all_is_checked_before_anything_is_asked(
    llama: Path, tmp_path: Path, engines: Engines
) -> None:
    long = evaluation(llama, tmp_path / "long", problems=1, letters="a" * 252)
    with pytest.raises(EvaluationError, match="the longest prompt has 252 tokens"):
        evaluate(evaluation(llama, tmp_path / "short"), long)
    assert engines.asked == []
    assert engines.opened == engines.closed
    assert len(engines.opened) == 1
    assert lines(tmp_path / "short" / "answers.jsonl") == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, EvaluationError])
@pytest.mark.parametrize("asking", [True, False])
def test_the_engine_is_closed_whatever_ends_the_run(
    llama: Path,
    tmp_path: Path,
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    asking: bool,
) -> None:
    def fail(*_: object) -> None:
        raise error

    if asking:
        monkeypatch.setattr(TransformersEngine, "_batch", fail)
    with pytest.raises(error) as caught:
        run.evaluate([evaluation(llama, tmp_path / name) for name in "ab"], fail)
    assert engines.opened == engines.closed
    assert len(engines.opened) == 1
    # nor does a file stay locked, though the traceback still holds all that was there
    assert caught.tb is not None
    monkeypatch.undo()
    evaluate(*(evaluation(llama, tmp_path / name) for name in "ab"))


def test_vllm_is_started_once_with_room_for_the_longest(llama: Path, tmp_path: Path) -> None:
    settings = {"engine": "vllm", "problems": 2, "vllm": {"python": make_python(tmp_path)}}
    short = evaluation(llama, tmp_path / "short", **settings)
    long = evaluation(llama, tmp_path / "long", letters="a" * 30, **settings)
    evaluate(short, long)
    log = (tmp_path / "short" / "engine.log").read_text()
    assert re.findall(r"'max_model_len', (\d+)", log) == ["65"]
    assert not (tmp_path / "long" / "engine.log").exists()
    assert lines(tmp_path / "long" / "answers.jsonl") == 2


def test_what_was_done_stays_where_the_engine_breaks(llama: Path, tmp_path: Path) -> None:
    settings = {"engine": "vllm", "problems": 2, "vllm": {"python": make_python(tmp_path)}}
    broken = evaluation(llama, tmp_path / "broken", letters=chr(FAIL), **settings)
    with pytest.raises(EvaluationError, match="no memory is left"):
        evaluate(evaluation(llama, tmp_path / "whole", **settings), broken)
    assert (tmp_path / "whole" / "report.json").exists()
    assert not (tmp_path / "broken" / "report.json").exists()


def test_a_file_that_cannot_be_hashed_is_said(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "away")
    with pytest.raises(EvaluationError, match=r"model\.safetensors: cannot be read \(No such file"):
        evaluate(evaluation(tmp_path, tmp_path / "out"))
