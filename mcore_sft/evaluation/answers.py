"""Answers as append-only JSON lines: what is written once is never generated again.

A line is one answer, keyed by problem, sample and configuration. A killed run loses at most the
batch it was in; a last line that was cut short is taken off before the next is written.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from mcore_sft.base import files
from mcore_sft.evaluation.errors import EvaluationError

Key = tuple[str, int, str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated answer with all that grading needs."""

    id: str
    sample: int
    configuration: str
    """Hash of everything that decides the answer: model, prompt ids, generation settings."""
    expected_answer: str
    response: str
    finish_reason: str
    tokens: tuple[int, ...]
    prompt_length: int

    @property
    def key(self) -> Key:
        """What tells this answer from every other."""
        return self.id, self.sample, self.configuration


class AnswerFile:
    """The file that answers are added to, which no second run writes to while it is open."""

    def __init__(self, path: Path) -> None:
        """Raises `EvaluationError`."""
        self.path = path
        with ExitStack() as stack:
            try:
                files.make_folder(path.parent)
                stack.enter_context(files.lock(path.with_name(f".{path.name}.lock")))
                self._file = stack.enter_context(path.open("a+b"))
                self._cut_torn_line()
                files.sync(path.parent)
            except files.Locked as held:
                raise EvaluationError(
                    f"{path}: another run is writing here{held.by}; wait for it, or give another "
                    "--output"
                ) from None
            except OSError as error:
                raise EvaluationError(
                    f"{path}: cannot be written ({error.strerror}); give another --output"
                ) from None
            self.done = {answer.key for answer in read(path)}
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, answers: Iterable[Answer]) -> None:
        """Append `answers`, which are on the disk when this returns; raises `EvaluationError`."""
        lines = [json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers]
        try:
            # half a surrogate pair, which a server's JSON can bring, has no UTF-8
            self._file.write("".join(lines).encode("utf-8", "replace"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.close()  # or it would try once more, and fail, at the end
            raise EvaluationError(
                f"{self.path}: cannot be written ({error.strerror}); make room there and run the "
                "command again, which goes on where this one stopped"
            ) from None

    def _cut_torn_line(self) -> None:
        """Cut off what follows the last newline."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)


def read(path: Path) -> Iterator[Answer]:
    """The answers in `path`, in the order they were written."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _parse(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise EvaluationError(
                    f"{path}, line {number}: not an answer ({error}); delete the line, "
                    "and the problem is asked again"
                ) from None


def _parse(content: Mapping[str, Any]) -> Answer:
    return Answer(**{**content, "tokens": tuple(content["tokens"])})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a whole file of JSON lines that `write_lines` wrote."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}); evaluate again") from None


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file of JSON lines; raises `UserError`."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write_named(path, "".join(lines))
