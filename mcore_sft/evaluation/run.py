"""A model folder and benchmarks in, scores out, in three stages that meet only on disk.

    answers.jsonl (generate)  ->  verdicts.jsonl (grade)  ->  report.json, .txt, .html (report)

Each stage can be run again by itself: what is answered is never asked twice, and grading needs no
model.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mcore_sft.base import files
from mcore_sft.base.terminal import Console, printable, say
from mcore_sft.config import EvaluationConfig
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import Tokenizer
from mcore_sft.evaluation import answers, few_shot, identity
from mcore_sft.evaluation.answers import Answer, AnswerFile
from mcore_sft.evaluation.benchmarks import Benchmark, Problem
from mcore_sft.evaluation.engines import server_engine
from mcore_sft.evaluation.engines.engine import Completion, Engine, Request, seed_of
from mcore_sft.evaluation.engines.open import open_engine
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.graders import ProblemGrader, open_grader
from mcore_sft.evaluation.grading.compare.equivalence import GRADER
from mcore_sft.evaluation.grading.grade import Graded
from mcore_sft.evaluation.scores import report, summary
from mcore_sft.evaluation.scores.report_page import page
from mcore_sft.evaluation.scores.summary import Verdicts

ANSWERS, VERDICTS = "answers.jsonl", "verdicts.jsonl"
REPORT, TEXT, PAGE, ENGINE_LOG = "report.json", "report.txt", "report.html", "engine.log"
ENGINE = "engine.json"
FORMAT = 2
"""Of report.json."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on one benchmark, and the folder that holds what comes of it."""

    model: Path
    benchmark: Benchmark
    prompt: Prompt
    tokenizer: Tokenizer
    config: EvaluationConfig
    output: Path
    samples: int = 0
    """Sampled answers of each problem."""

    @cached_property
    def model_files(self) -> dict[str, str]:
        """Hashes of the model's files."""
        return identity.model_files(self.model)

    @cached_property
    def served(self) -> Mapping[str, Any] | None:
        """What a server says of the model that it serves; None where no server answers."""
        return server_engine.served(self.config.server) if self.config.engine == "server" else None

    @cached_property
    def configuration(self) -> str:
        """Hash of what all answers have in common."""
        return identity.configuration_hash(
            model=self.model_files,
            prompt=self.prompt.fingerprint,
            tokenizer=self.tokenizer.fingerprint,
            stop_ids=self.prompt.stop_ids,
            config=self.config,
            served=self.served,
        )

    @cached_property
    def examples(self) -> str:
        """Solved examples that stand before each problem; empty where none are asked for."""
        return few_shot.examples(self.config.few_shot_examples, self.config.few_shot)

    @cached_property
    def asked(self) -> "tuple[Asked, ...]":
        """Every answer that is wanted, with the ids that the engine gets for it."""
        first = 0 if self.config.greedy else 1
        if first > self.samples:
            raise EvaluationError(
                "evaluation.greedy is false and no samples are asked for, so nothing is asked; "
                f"give --benchmark {self.benchmark.name}:N"
            )
        made = []
        for problem in self.benchmark.problems:
            ids = tuple(self.prompt.prompt_ids(self.examples + problem.problem))
            made += [self._ask(problem, ids, n) for n in range(first, self.samples + 1)]
        return tuple(made)

    def _ask(self, problem: Problem, ids: tuple[int, ...], sample: int) -> "Asked":
        sampling: tuple[float, float, int] = (0.0, 1.0, 0)
        if sample:
            chance = seed_of(self.config.seed, problem.id, sample)
            sampling = (self.config.temperature, self.config.top_p, chance)
        return Asked(
            problem=problem,
            sample=sample,
            prompt_ids=ids,
            sampling=sampling,
            configuration=identity.answer_hash(self.configuration, ids, sampling),
        )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One answer that is wanted, as the engine is asked for it."""

    problem: Problem
    sample: int
    """0 is the greedy answer."""
    prompt_ids: tuple[int, ...]
    sampling: tuple[float, float, int]
    """Temperature, top_p, seed."""
    configuration: str

    @property
    def key(self) -> answers.Key:
        """What its answer is kept under."""
        return self.problem.id, self.sample, self.configuration

    def request(self, index: int) -> Request:
        """The same for the engine."""
        temperature, top_p, seed = self.sampling
        return Request(
            index=index,
            prompt_ids=self.prompt_ids,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )

    def answer(self, completion: Completion) -> Answer:
        """What is kept of the engine's answer."""
        temperature, top_p, seed = self.sampling
        return Answer(
            id=self.problem.id,
            sample=self.sample,
            configuration=self.configuration,
            expected_answer=self.problem.answer,
            response=completion.text,
            finish_reason=completion.finish_reason,
            tokens=completion.tokens,
            prompt_length=len(self.prompt_ids),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )


def evaluate(
    evaluations: Sequence[Evaluation], tell: Callable[[Evaluation, dict[str, Any]], None]
) -> None:
    """All three stages of each evaluation in turn; `tell` gets each with what its report.json says.

    They differ in benchmark, samples and output alone: one engine answers for all, and is opened
    for the first question that has no answer yet. Answers are on disk as they come.
    """
    for each in evaluations:
        _check_served(each.served, evaluations[0])
    assert len({each.configuration for each in evaluations}) == 1
    with ExitStack() as stack:
        files = [stack.enter_context(AnswerFile(each.output / ANSWERS)) for each in evaluations]
        left = [_unanswered(*each) for each in zip(evaluations, files, strict=True)]
        engine: Engine | None = None
        for evaluation, file, questions in zip(evaluations, files, left, strict=True):
            if questions:
                if engine is None:
                    engine = stack.enter_context(_engine_for(evaluation))
                    _check_served(engine.served, evaluation)
                    engine.check([asked.request(0) for some in left for asked in some])
                _ask(engine, evaluation, questions, file)
            grade(evaluation)
            tell(evaluation, summarize(evaluation))


def _unanswered(evaluation: Evaluation, file: AnswerFile) -> list[Asked]:
    questions = [asked for asked in evaluation.asked if asked.key not in file.done]
    done = len(evaluation.asked) - len(questions)
    if done:
        say(f"{file.path}: {done} of {len(evaluation.asked)} are answered", error=True)
    return questions


def _engine_for(evaluation: Evaluation) -> Engine:
    return open_engine(
        evaluation.config,
        evaluation.model,
        stop_ids=evaluation.prompt.stop_ids,
        decode=lambda ids: evaluation.tokenizer.decode(ids, skip_special=True),
        log=evaluation.output / ENGINE_LOG,
    )


def _check_served(served: Mapping[str, Any] | None, evaluation: Evaluation) -> None:
    """Raise `EvaluationError` where a server serves another model than the answers are kept for."""
    if served != evaluation.served:
        raise EvaluationError(
            f"{evaluation.config.server.url}: it serves another model than a moment ago; "
            "run the command again"
        )


def _ask(
    engine: Engine, evaluation: Evaluation, questions: Sequence[Asked], file: AnswerFile
) -> None:
    requests = [asked.request(index) for index, asked in enumerate(questions)]
    with _progress(f"answering {evaluation.benchmark.name}", len(requests)) as advance:
        for batch in engine.generate(requests):
            file.add(questions[each.index].answer(each) for each in batch)
            advance(len(batch), sum(len(each.tokens) for each in batch))
    # only the run that asked knows what answered
    described = json.dumps(engine.describe(), indent=2) + "\n"
    files.write_named(evaluation.output / ENGINE, described)


def grade(evaluation: Evaluation) -> None:
    """Grade the answers of this configuration into verdicts.jsonl, in the benchmark's order."""
    found = {answer.key: answer for answer in answers.read(evaluation.output / ANSWERS)}
    missing = sum(asked.key not in found for asked in evaluation.asked)
    if missing:
        raise EvaluationError(
            f"{evaluation.output / ANSWERS}: {missing} of {len(evaluation.asked)} answers are not "
            "there under this configuration; generate them first"
        )
    given = [found[asked.key] for asked in evaluation.asked]
    with open_grader(
        evaluation.benchmark.grader,
        timeout=evaluation.config.timeout,
        policy=evaluation.config.policy,
        second_opinion=evaluation.config.second_opinion,
    ) as grader:
        graded = _grade(evaluation, given, grader)
        classes = _classes(evaluation, graded, grader)
    rows = map(_verdict_row, evaluation.asked, given, graded, classes)
    answers.write_lines(evaluation.output / VERDICTS, rows)


def _grade(evaluation: Evaluation, given: Sequence[Answer], grader: ProblemGrader) -> list[Graded]:
    rows = [
        (asked.problem, answer.response, answer.finish_reason == "length")
        for asked, answer in zip(evaluation.asked, given, strict=True)
    ]
    decided: dict[int, Graded] = {}
    with _progress(f"grading {evaluation.benchmark.name}", len(rows)) as advance:
        for position, graded in grader.grade_all(rows):
            decided[position] = graded
            advance(1, 0)
    return [decided[position] for position in range(len(rows))]


def _classes(
    evaluation: Evaluation, graded: Sequence[Graded], grader: ProblemGrader
) -> list[int | None]:
    """The class of each sampled answer among those of its problem, for majority votes."""
    if not evaluation.samples:
        return [None] * len(graded)
    made: list[int | None] = []
    pairs = zip(evaluation.asked, graded, strict=True)
    with _progress(f"grouping {evaluation.benchmark.name}", len(graded)) as advance:
        for _, group in groupby(pairs, key=lambda pair: pair[0].problem.id):
            extracted = [(asked.sample, one.extraction.answer) for asked, one in group]
            sampled = [answer for sample, answer in extracted if sample]
            (classes,) = grader.classes([sampled])
            made += [None] * (len(extracted) - len(sampled)) + list(classes)
            advance(len(extracted), 0)
    return made


def _verdict_row(
    asked: Asked, answer: Answer, graded: Graded, number: int | None
) -> dict[str, Any]:
    temperature, top_p, seed = asked.sampling
    return {
        "id": answer.id,
        "sample": answer.sample,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "configuration": answer.configuration,
        "problem": asked.problem.problem,
        "expected_answer": asked.problem.answer,
        "solution": asked.problem.solution,
        "response": answer.response,
        "extracted": graded.extraction.answer,
        "verdict": graded.verdict.outcome,
        "rule": graded.verdict.rule,
        "missing": graded.extraction.missing,
        "boxes_differ": graded.extraction.differing,
        "second": graded.second,
        "disputed": graded.disputed,
        "class": number,
        "finish_reason": answer.finish_reason,
        # a server may tell the text alone
        "num_tokens": len(answer.tokens) if answer.tokens or not answer.response else None,
        "subject": asked.problem.extra.get("subject", asked.problem.extra.get("type")),
        "level": asked.problem.extra.get("level"),
    }


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """Count the verdicts into report.json, report.txt and report.html."""
    rows = answers.read_rows(evaluation.output / VERDICTS)
    verdicts = Verdicts(rows=rows)
    made = {
        "format": FORMAT,
        "benchmark": {
            "name": evaluation.benchmark.name,
            "source": evaluation.benchmark.source,
            "problems": len(evaluation.benchmark.problems),
            "samples": evaluation.samples,
            "fingerprint": evaluation.benchmark.fingerprint,
        },
        "grader": {"kind": evaluation.benchmark.grader, "version": GRADER},
        **summary.describe(verdicts, evaluation.benchmark),
        "model": {"folder": str(evaluation.model), "files": evaluation.model_files},
        "prompt": {
            **evaluation.prompt.describe(),
            "few_shot": evaluation.examples,
            "fingerprint": evaluation.prompt.fingerprint,
        },
        "tokenizer": {"fingerprint": evaluation.tokenizer.fingerprint},
        "configuration": evaluation.configuration,
        "evaluation": evaluation.config.model_dump(mode="json", exclude={"benchmarks"}),
        "engine": _engine(evaluation.output / ENGINE),
        "versions": identity.versions(),
        "text": _text(evaluation, verdicts),
    }
    files.write_named(evaluation.output / REPORT, json.dumps(made, indent=2) + "\n")
    files.write_named(evaluation.output / TEXT, made["text"] + report.details(made))
    files.write_named(evaluation.output / PAGE, page(made, rows))
    return made


def _engine(file: Path) -> dict[str, str]:
    """What answered last; nothing where that run was killed at its very end."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(map(_is_text, content.values())):
            raise ValueError("expected a JSON object of texts")
    except (OSError, ValueError, RecursionError) as error:
        say(f"{file} is skipped: {error}", error=True)
        return {}
    return content


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _text(evaluation: Evaluation, verdicts: Verdicts) -> str:
    """NeMo-Skills' table and NeMo RL's block, each with the interval after it."""
    modes = verdicts.modes()
    greedy = bool(verdicts.greedy)
    counted = summary.share(verdicts.headline)
    lines = [
        report.nemo_skills_table(
            evaluation.benchmark.name, modes, len(evaluation.benchmark.problems)
        )
    ]
    if verdicts.ungraded:
        lines.append(report.not_graded_line(verdicts.ungraded, len(verdicts.rows)))
    for mode, (right, silent) in modes.items():
        name = "" if mode == "greedy" else f"{mode} "
        lines.append(report.interval_line(f"{name}symbolic_correct", right))
        lines.append(report.interval_line(f"{name}no_answer", silent))
    lines.append(
        report.nemo_rl_block(
            model_name=os.path.basename(os.path.abspath(evaluation.model)),
            dataset_name=evaluation.benchmark.dataset_name,
            max_new_tokens=evaluation.config.max_new_tokens,
            temperature=0.0 if greedy else float(evaluation.config.temperature),
            top_p=1.0 if greedy else float(evaluation.config.top_p),
            right=counted,
            num_tests_per_prompt=1 if greedy else evaluation.samples,
        )
    )
    if greedy:
        lines.append(report.interval_line("score", counted))
    return "".join(lines)


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of answers with answers/s, tokens/s and time left; yields what counts both."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(printable(description), total=total, rate="")
        tokens = 0

        def advance(rows: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bars.advance(task, rows)
            seconds = bars.tasks[task].elapsed or 1e-9
            rate = f"{bars.tasks[task].completed / seconds:.1f}/s"
            bars.update(task, rate=f"{rate}, {tokens / seconds:.0f} tokens/s" if tokens else rate)

        yield advance
