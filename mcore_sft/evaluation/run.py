"""A model folder and a benchmark in, a score out, in three stages that meet only on disk.

    answers.jsonl (generate)  ->  verdicts.jsonl (grade)  ->  report.json, report.txt (report)

Each stage can be run again by itself: what is answered is never asked twice, and grading needs no
model.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mcore_sft.config import EvaluationConfig
from mcore_sft.data.prompt import Prompt
from mcore_sft.data.tokenizer import Tokenizer
from mcore_sft.evaluation import answers, identity, report
from mcore_sft.evaluation.answers import Answer, AnswerFile
from mcore_sft.evaluation.benchmarks import Benchmark, Problem
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.grade import Graded, Grader
from mcore_sft.evaluation.report import Share

ANSWERS, VERDICTS, REPORT, TEXT = "answers.jsonl", "verdicts.jsonl", "report.json", "report.txt"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on one benchmark, and the folder that holds what comes of it."""

    model: Path
    benchmark: Benchmark
    prompt: Prompt
    tokenizer: Tokenizer
    config: EvaluationConfig
    output: Path

    @cached_property
    def model_files(self) -> dict[str, str]:
        """Hashes of the model's files."""
        return identity.model_files(self.model)

    @cached_property
    def configuration(self) -> str:
        """Hash of all that decides the answers, the problems apart."""
        return identity.configuration_hash(
            model=self.model_files,
            prompt=self.prompt.fingerprint,
            tokenizer=self.tokenizer.fingerprint,
            stop_ids=self.prompt.stop_ids,
            config=self.config,
        )

    @cached_property
    def asked(self) -> "tuple[Asked, ...]":
        """Every problem with the ids that the engine gets for it."""
        made = []
        for problem in self.benchmark.problems:
            ids = tuple(self.prompt.prompt_ids(problem.problem))
            made.append(
                Asked(
                    problem=problem,
                    prompt_ids=ids,
                    configuration=identity.answer_hash(self.configuration, ids),
                )
            )
        return tuple(made)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One problem as the engine gets it."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    configuration: str

    @property
    def key(self) -> answers.Key:
        """What its answer is kept under."""
        return self.problem.id, 0, self.configuration


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """All three stages; the report that is also in report.json."""
    generate(evaluation)
    grade(evaluation)
    return summarize(evaluation)


def generate(evaluation: Evaluation) -> None:
    """Ask the model what has not been answered yet; answers are on disk after every batch."""
    with AnswerFile(evaluation.output / ANSWERS) as file:
        open_questions = [asked for asked in evaluation.asked if asked.key not in file.done]
        done = len(evaluation.asked) - len(open_questions)
        if done:
            print(f"{file.path}: {done} of {len(evaluation.asked)} are answered", file=sys.stderr)
        if open_questions:
            _ask(evaluation, open_questions, file)


def _ask(evaluation: Evaluation, questions: Sequence[Asked], file: AnswerFile) -> None:
    # Imported late: torch and transformers take seconds, and regrading needs neither.
    from mcore_sft.evaluation.generate import Request, TransformersEngine, seed_of

    requests = [
        Request(
            index=index,
            prompt_ids=asked.prompt_ids,
            seed=seed_of(evaluation.config.seed, asked.problem.id, 0),
        )
        for index, asked in enumerate(questions)
    ]
    engine = TransformersEngine(
        evaluation.model,
        evaluation.config,
        stop_ids=evaluation.prompt.stop_ids,
        decode=lambda ids: evaluation.tokenizer.decode(ids, skip_special=True),
    )
    engine.check(requests)
    with _progress(f"answering {evaluation.benchmark.name}", len(requests)) as advance:
        for batch in engine.generate(requests):
            file.add(
                Answer(
                    id=questions[completion.index].problem.id,
                    sample=0,
                    configuration=questions[completion.index].configuration,
                    expected_answer=questions[completion.index].problem.answer,
                    response=completion.text,
                    finish_reason=completion.finish_reason,
                    tokens=completion.tokens,
                    prompt_length=len(questions[completion.index].prompt_ids),
                )
                for completion in batch
            )
            advance(len(batch), sum(len(completion.tokens) for completion in batch))


def grade(evaluation: Evaluation) -> None:
    """Grade the answers of this configuration into verdicts.jsonl, in the benchmark's order."""
    found = {answer.key: answer for answer in answers.read(evaluation.output / ANSWERS)}
    missing = sum(asked.key not in found for asked in evaluation.asked)
    if missing:
        raise EvaluationError(
            f"{evaluation.output / ANSWERS}: {missing} of {len(evaluation.asked)} problems have no "
            "answer under this configuration; generate them first"
        )
    ordered = [found[asked.key] for asked in evaluation.asked]
    rows = [
        (asked.problem.answer, answer.response, answer.finish_reason == "length")
        for asked, answer in zip(evaluation.asked, ordered, strict=True)
    ]
    graded: dict[int, Graded] = {}
    with (
        Grader(timeout=evaluation.config.timeout) as grader,
        _progress(f"grading {evaluation.benchmark.name}", len(rows)) as advance,
    ):
        for position, verdict in grader.grade_all(rows):
            graded[position] = verdict
            advance(1, 0)
    answers.write_lines(
        evaluation.output / VERDICTS,
        (
            _verdict_row(asked, answer, graded[position])
            for position, (asked, answer) in enumerate(zip(evaluation.asked, ordered, strict=True))
        ),
    )


def _verdict_row(asked: Asked, answer: Answer, graded: Graded) -> dict[str, Any]:
    return {
        "id": answer.id,
        "sample": answer.sample,
        "configuration": answer.configuration,
        "expected_answer": asked.problem.answer,
        "extracted": graded.extraction.answer,
        "verdict": graded.verdict.outcome,
        "rule": graded.verdict.rule,
        "boxes_differ": graded.extraction.differing,
        "finish_reason": answer.finish_reason,
        "num_tokens": len(answer.tokens),
    }


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """Count the verdicts into report.json and report.txt."""
    lines = (evaluation.output / VERDICTS).read_text(encoding="utf-8").split("\n")
    verdicts = [json.loads(line) for line in lines if line]
    outcomes = Counter(row["verdict"] for row in verdicts)
    right = Share(hits=outcomes["equal"], total=len(verdicts))
    silent = Share(hits=outcomes["no_answer"], total=len(verdicts))
    text = _text(evaluation, right, silent)
    made = {
        "format": 1,
        "benchmark": {
            "name": evaluation.benchmark.name,
            "source": evaluation.benchmark.source,
            "problems": len(evaluation.benchmark.problems),
            "fingerprint": evaluation.benchmark.fingerprint,
        },
        "score": {"symbolic_correct": _share(right), "no_answer": _share(silent)},
        "verdicts": dict(outcomes.most_common()),
        "rules": _rules(verdicts),
        "boxes_differ": sum(row["boxes_differ"] for row in verdicts),
        "truncated": sum(row["finish_reason"] == "length" for row in verdicts),
        "mean_tokens": sum(row["num_tokens"] for row in verdicts) / max(1, len(verdicts)),
        "model": {"folder": str(evaluation.model), "files": evaluation.model_files},
        "prompt": evaluation.prompt.describe() | {"fingerprint": evaluation.prompt.fingerprint},
        "tokenizer": {"fingerprint": evaluation.tokenizer.fingerprint},
        "configuration": evaluation.configuration,
        "evaluation": evaluation.config.model_dump(mode="json", exclude={"benchmarks"}),
        "versions": identity.versions(),
        "text": text,
    }
    answers.write_text(evaluation.output / REPORT, json.dumps(made, indent=2) + "\n")
    answers.write_text(evaluation.output / TEXT, text)
    return made


def _text(evaluation: Evaluation, right: Share, silent: Share) -> str:
    """The table and the block, each with the interval after it."""
    mode = "greedy" if evaluation.config.temperature == 0 else "sampled"
    return "".join(
        [
            report.nemo_skills_table(evaluation.benchmark.name, {mode: (right, silent)}),
            report.interval_line("symbolic_correct", right),
            report.interval_line("no_answer", silent),
            report.nemo_rl_block(
                model_name=os.path.basename(os.path.abspath(evaluation.model)),
                dataset_name=evaluation.benchmark.dataset_name,
                max_new_tokens=evaluation.config.max_new_tokens,
                temperature=float(evaluation.config.temperature),
                top_p=float(evaluation.config.top_p),
                right=right,
            ),
            report.interval_line("score", right),
        ]
    )


def _share(share: Share) -> dict[str, Any]:
    return {
        "percent": share.percent,
        "hits": share.hits,
        "total": share.total,
        "wilson95": list(share.interval),
    }


def _rules(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How often each rule decided, by verdict."""
    counted: dict[str, Counter[str]] = {}
    for row in verdicts:
        counted.setdefault(row["verdict"], Counter())[row["rule"]] += 1
    return {outcome: dict(rules.most_common()) for outcome, rules in counted.items()}


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of answers with answers/s, tokens/s and time left; yields what counts both."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(description, total=total, rate="")
        tokens = 0

        def advance(rows: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bars.advance(task, rows)
            seconds = bars.tasks[task].elapsed or 1e-9
            rate = f"{bars.tasks[task].completed / seconds:.1f}/s"
            bars.update(task, rate=f"{rate}, {tokens / seconds:.0f} tokens/s" if tokens else rate)

        yield advance
