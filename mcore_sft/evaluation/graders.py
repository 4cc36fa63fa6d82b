r"""A problem and a response in, a verdict out: what a benchmark asks of whoever grades it.

    mathematics   the answer that a policy finds, and whether it means the same as the right one
    choice        the letter of an option, or the option itself
    exact         the answer that a policy finds, to the letter but for case and blanks

A benchmark's row names its grader (benchmarks.yaml).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Self

from mcore_sft.config import Policy
from mcore_sft.evaluation.benchmarks import LETTERS, Kind, Problem
from mcore_sft.evaluation.grading.compare.equivalence import Verdict, verdict_of
from mcore_sft.evaluation.grading.extract.extract import Extraction, extract
from mcore_sft.evaluation.grading.grade import Graded, Grader
from mcore_sft.evaluation.grading.read.normalize import normalize

Row = tuple[Problem, str, bool]
"""A problem, a response to it, and whether that was cut at its length limit."""


class ProblemGrader(ABC):
    """Grades responses to the problems of one benchmark."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End what grading has started."""

    def grade(self, problem: Problem, response: str, *, truncated: bool = False) -> Graded:
        """Grade one response."""
        return dict(self.grade_all([(problem, response, truncated)]))[0]

    @abstractmethod
    def grade_all(self, rows: Iterable[Row]) -> Iterator[tuple[int, Graded]]:
        """Grade many; yields (position, graded) as they are decided."""

    @abstractmethod
    def classes(self, answers: Sequence[Sequence[str | None]]) -> list[tuple[int, ...]]:
        """For the extracted answers of each problem, the number of its meaning; -1 is none."""


def open_grader(
    kind: Kind, *, timeout: float, policy: Policy, second_opinion: bool = False, processes: int = 0
) -> ProblemGrader:
    """The grader that a benchmark's row names; the settings are those of `Grader`."""
    if kind == "mathematics":
        return _Mathematics(
            Grader(
                timeout=timeout, policy=policy, second_opinion=second_opinion, processes=processes
            )
        )
    return _Choice(policy) if kind == "choice" else _Exact(policy)


class _Mathematics(ProblemGrader):
    def __init__(self, grader: Grader) -> None:
        self._grader = grader

    def close(self) -> None:
        self._grader.close()

    def grade_all(self, rows: Iterable[Row]) -> Iterator[tuple[int, Graded]]:
        return self._grader.grade_all(
            (problem.answer, response, truncated) for problem, response, truncated in rows
        )

    def classes(self, answers: Sequence[Sequence[str | None]]) -> list[tuple[int, ...]]:
        return self._grader.classes(answers)


class _ByText(ProblemGrader):
    """What needs no mathematics: answers are the same where their texts are."""

    def __init__(self, policy: Policy) -> None:
        self._policy: Policy = policy

    def close(self) -> None:
        """Nothing was started."""

    def grade_all(self, rows: Iterable[Row]) -> Iterator[tuple[int, Graded]]:
        for position, (problem, response, truncated) in enumerate(rows):
            extraction = self._extract(problem, response, truncated)
            if extraction.answer is None:
                verdict = Verdict(outcome="no_answer", rule=str(extraction.missing))
            else:
                verdict = self._compare(problem, extraction.answer)
            yield position, Graded(extraction=extraction, verdict=verdict)

    def classes(self, answers: Sequence[Sequence[str | None]]) -> list[tuple[int, ...]]:
        return [_numbered([one and _plain(one) for one in each]) for each in answers]

    @abstractmethod
    def _extract(self, problem: Problem, response: str, truncated: bool) -> Extraction: ...

    @abstractmethod
    def _compare(self, problem: Problem, answer: str) -> Verdict: ...


class _Exact(_ByText):
    def _extract(self, problem: Problem, response: str, truncated: bool) -> Extraction:
        return extract(response, policy=self._policy, truncated=truncated)

    def _compare(self, problem: Problem, answer: str) -> Verdict:
        return verdict_of(_plain(problem.answer) == _plain(answer), "exact")


class _Choice(_ByText):
    """The policy's answer counts where it is an option; else what says of itself that it is one."""

    def _extract(self, problem: Problem, response: str, truncated: bool) -> Extraction:
        found = extract(response, policy=self._policy, truncated=truncated)
        if found.missing == "truncated":
            return found
        said = extract(response, policy="final_answer").answer
        last = response.strip().rpartition("\n")[2]
        letters = (_letter(text, problem.choices) for text in (found.answer, said, last) if text)
        letter = next(filter(None, letters), None)
        return replace(found, answer=letter, missing=None if letter else "no_choice")

    def _compare(self, problem: Problem, answer: str) -> Verdict:
        return verdict_of(problem.answer == answer, "choice")


_NAMED = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)(?:\s+is)?\s*:?\s+)?", re.I
)
_LETTER = re.compile(
    r"\(?([A-Ja-j])\)?[.:]?"  # alone
    r"|\(([A-Ja-j])\)\s*(.+)|([A-J])\s?(?:[.:)]|\s-|,(?=\s*because\b))\s*(.+)",  # before its text
    re.DOTALL,
)
_SECOND = re.compile(r"(?:^|\b(?:and|or)\s+|,\s*)\(?[A-J]\)?$")


def _letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `text` names or quotes; none of what is none of them."""
    written = normalize(text)
    plain = _plain(written)
    quoted = [place for place, each in enumerate(choices) if _plain(normalize(each)) == plain]
    if len(quoted) == 1:
        return LETTERS[quoted[0]]
    found = _LETTER.fullmatch(_NAMED.sub("", written, count=1))
    if not found or _SECOND.search(found[3] or found[5] or ""):  # A and B
        return None
    letter = (found[1] or found[2] or found[4]).upper()
    return letter if letter in LETTERS[: len(choices)] else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _numbered(texts: Sequence[str | None]) -> tuple[int, ...]:
    """The number of each text among those that differ."""
    numbers = {text: place for place, text in enumerate(dict.fromkeys(filter(None, texts)))}
    return tuple(-1 if text is None else numbers[text] for text in texts)
