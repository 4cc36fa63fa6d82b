"""Gold answers and responses in, verdicts out, each under a deadline that holds.

    response  ->  extract  ->  exact rules here  ->  (where those are silent) a worker process

Model output is hostile: what may take long is done by a process that is killed when its time is
over, and no answer can cost more than that or end the run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self, get_args

from mcore_sft.config import Policy
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.grading.compare.equivalence import (
    NOT_GRADED,
    Outcome,
    Verdict,
    judge_exactly,
)
from mcore_sft.evaluation.grading.extract.extract import Extraction, extract, stated
from mcore_sft.evaluation.grading.pool import TIMEOUT, Pool
from mcore_sft.evaluation.grading.worker_process import Job

UNKNOWN_CLASS = -2
"""Of an answer that could not be compared with others of its problem."""
# Longer texts go to a worker even for the exact rules, so that nothing here can take long.
_SHORT = 400
# An overlong answer does not travel to be refused.
_LONGEST = 100_000


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What one grading compares: the right answer and the answer given, as somebody extracted it.

    Both may still have words, delimiters or boxes around them.
    """

    gold: str
    prediction: str

    def __post_init__(self) -> None:
        _require_texts(gold=self.gold, prediction=self.prediction)


@dataclass(frozen=True, kw_only=True)
class Graded:
    """One response with what was found in it and what was decided."""

    extraction: Extraction
    verdict: Verdict
    second: Outcome | None = None
    """What math-verify by itself says of the same two answers; none where it was not asked."""

    @property
    def disputed(self) -> bool:
        """Whether math-verify by itself would count the answer otherwise."""
        decided = self.second in {"equal", "different"}
        return decided and (self.second == "equal") != self.verdict.correct


def same_answer(gold: str, prediction: str, *, timeout: float = TIMEOUT) -> Verdict:
    """Whether `prediction`, which somebody has extracted, means the same as `gold`.

    Starts a worker where only symbolic mathematics can tell, and ends it: for many pairs, a
    `Grader` keeps its workers. `timeout`: seconds of processor time. Errors as in `Grader`.
    """
    with Grader(timeout=timeout) as grader:
        return grader.same(gold, prediction)


class Grader:
    """Grades within `timeout` seconds of processor time each, on up to `processes` workers.

    With `second_opinion`, math-verify by itself is asked too about what is equal or different.
    Workers start when they are needed and end with the grader. Threads may share it; a process that
    is forked, or that a pickled grader is sent to, gets workers of its own. Raises
    `EvaluationError` for what cannot be meant, and where no worker can be started.
    """

    def __init__(
        self,
        *,
        timeout: float = TIMEOUT,
        policy: Policy = "last_box",
        second_opinion: bool = False,
        processes: int = 0,
    ) -> None:
        if policy not in get_args(Policy):
            known = ", ".join(get_args(Policy))
            raise EvaluationError(f"policy: got {policy!r}, expected one of {known}")
        self._policy = policy
        self._second_opinion = second_opinion
        self._pool = Pool(timeout=timeout, processes=processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self._pool.close()

    def start(self) -> None:
        """Start the workers now rather than at the first answer that needs one."""
        self._pool.start()

    def same(self, gold: str, answer: str) -> Verdict:
        """Whether an `answer`, which somebody has extracted, means the same as `gold`."""
        return dict(self.judge_all([Pair(gold=gold, prediction=answer)]))[0]

    def grade(self, gold: str, response: str, *, truncated: bool = False) -> Graded:
        """Extract the answer from one `response` and grade it."""
        return dict(self.grade_all([(gold, response, truncated)]))[0]

    def grade_all(self, rows: Iterable[tuple[str, str, bool]]) -> Iterator[tuple[int, Graded]]:
        """Grade (gold, response, truncated) rows; yields (position, graded) as they are decided."""
        found: dict[int, Extraction] = {}
        pairs: list[tuple[int, Pair]] = []
        for position, (gold, response, truncated) in enumerate(rows):
            _require_texts(gold=gold, response=response)
            extraction = extract(response, policy=self._policy, truncated=truncated)
            if extraction.answer is None:
                verdict = Verdict(outcome="no_answer", rule=str(extraction.missing))
                yield position, Graded(extraction=extraction, verdict=verdict)
            else:
                found[position] = extraction
                pairs.append((position, Pair(gold=gold, prediction=extraction.answer)))
        if self._policy == "nemo_rl":
            yield from self._as_nemo_rl(pairs, found)
            return
        second = dict(self._ask_second(pairs)) if self._second_opinion else {}
        for position, verdict in self._judge(pairs):
            yield (
                position,
                Graded(extraction=found[position], verdict=verdict, second=second.get(position)),
            )

    def judge_all(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, Verdict]]:
        """Judge answers that are already extracted; yields (position, verdict) as decided."""
        yield from self._judge(
            (position, replace(pair, prediction=stated(pair.prediction)))
            for position, pair in enumerate(pairs)
        )

    def classes(self, answers: Sequence[Sequence[str | None]]) -> list[tuple[int, ...]]:
        """For each problem's answers, the class of those that mean the same.

        -1 is no answer, `UNKNOWN_CLASS` one that could not be compared with all others. An answer
        joins the class of the first earlier answer that it equals.
        """
        return [self._classes(of_problem) for of_problem in answers]

    def _classes(self, answers: Sequence[str | None]) -> tuple[int, ...]:
        representatives: list[str] = []
        spelled: dict[str, int] = {}
        for answer in answers:
            if answer is None or answer in spelled:
                continue
            pairs = [Pair(gold=known, prediction=answer) for known in representatives]
            found = dict(self.judge_all(pairs))
            same = [number for number, verdict in found.items() if verdict.correct]
            if not same and any(one.outcome == NOT_GRADED for one in found.values()):
                spelled[answer] = UNKNOWN_CLASS
                continue
            spelled[answer] = min(same, default=len(representatives))
            if not same:
                representatives.append(answer)
        return tuple(-1 if answer is None else spelled[answer] for answer in answers)

    def _judge(self, pairs: Iterable[tuple[int, Pair]]) -> Iterator[tuple[int, Verdict]]:
        hard: list[tuple[int, Job]] = []
        for position, pair in pairs:
            gold = stated(pair.gold)
            verdict = _judge_here(gold, pair.prediction)
            if verdict:
                yield position, verdict
            else:
                hard.append((position, Job(task="judge", gold=gold, prediction=pair.prediction)))
        for position, done in self._pool.run(hard):
            yield position, done.verdict

    def _ask_second(self, pairs: Iterable[tuple[int, Pair]]) -> Iterator[tuple[int, Outcome]]:
        """What math-verify says; a text that is the gold to the letter needs no asking."""
        jobs = []
        for position, pair in pairs:
            if pair.gold == pair.prediction:
                yield position, "equal"
            elif len(pair.prediction) <= _LONGEST:
                job = Job(task="math_verify", gold=pair.gold, prediction=pair.prediction)
                jobs.append((position, job))
        for position, done in self._pool.run(jobs):
            yield position, done.verdict.outcome

    def _as_nemo_rl(
        self, pairs: Iterable[tuple[int, Pair]], found: dict[int, Extraction]
    ) -> Iterator[tuple[int, Graded]]:
        jobs = []
        for position, pair in pairs:
            if len(pair.prediction) > _LONGEST:
                verdict = Verdict(outcome="unsafe", rule="length")
                yield (
                    position,
                    Graded(extraction=replace(found[position], answer=None), verdict=verdict),
                )
            else:
                job = Job(task="nemo_rl", gold=pair.gold, prediction=pair.prediction)
                jobs.append((position, job))
        for position, done in self._pool.run(jobs):
            extraction = replace(found[position], answer=done.extracted)
            yield position, Graded(extraction=extraction, verdict=done.verdict)


def _require_texts(**texts: object) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise EvaluationError(f"{name}: got {text!r}, expected a text")


def _judge_here(gold: str, prediction: str) -> Verdict | None:
    if len(gold) + len(prediction) <= _SHORT:
        return judge_exactly(gold, prediction)
    if len(prediction) > _LONGEST:
        return Verdict(outcome="unsafe", rule="length")
    return None
