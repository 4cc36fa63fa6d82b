"""Answers as append-only JSON lines: what is written once is never generated again.

A line is one answer, keyed by problem, sample and configuration. A killed run loses at most the
batch it was in; a last line that was cut short is taken off before the next is written. Nothing is
written that cannot be read back, and a line that cannot, whoever wrote it, is set aside.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from mcore_sft.base import files
from mcore_sft.base.terminal import say
from mcore_sft.evaluation.engines.engine import FinishReason
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
    finish_reason: FinishReason
    tokens: tuple[int, ...]
    prompt_length: int
    temperature: float | None = None
    """0 is greedy. This and the next two are absent from answers of older versions."""
    top_p: float | None = None
    seed: int | None = None

    @property
    def key(self) -> Key:
        """What tells this answer from every other."""
        return self.id, self.sample, self.configuration


_ANSWER = TypeAdapter(Answer)


class AnswerFile:
    """The file that answers are added to, which no second run writes to while it is open."""

    def __init__(self, path: Path) -> None:
        """Raises `EvaluationError`."""
        self.path = path
        with ExitStack() as stack:
            try:
                files.make_folder(path.parent)
                stack.enter_context(files.lock(path.with_name(f".{path.name}.lock")))
                self.done = {answer.key for answer in self._mend()}
                self._file = stack.enter_context(path.open("ab"))
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
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, answers: Iterable[Answer]) -> None:
        """Append `answers`, which are on the disk when this returns; raises `EvaluationError`."""
        lines = [_line(answer, str(self.path)) for answer in answers]
        try:
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.close()  # or it would try once more, and fail, at the end
            raise EvaluationError(
                f"{self.path}: cannot be written ({error.strerror}); make room there and run the "
                "command again, which goes on where this one stopped"
            ) from None

    def _mend(self) -> list[Answer]:
        """The answers that are there, after what cannot be read is out of the file."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, _, torn = content.rpartition(b"\n")
        kept, found, damage = [], [], {}
        for number, line in enumerate([*whole.split(b"\n"), torn], start=1):
            if not line.strip():
                continue
            try:
                found.append(_parse(line))
                kept.append(line + b"\n")
            except ValueError as error:
                if line is not torn:
                    damage[number] = (line + b"\n", error)
        if damage:
            self._set_aside(damage)
        if content != (mended := b"".join(kept)):
            files.replace(Path(os.path.realpath(self.path)), mended)
        return found

    def _set_aside(self, damage: Mapping[int, tuple[bytes, ValueError]]) -> None:
        aside = self.path.with_suffix(".damaged.jsonl")
        before = aside.read_bytes() if aside.exists() else b""
        files.replace(aside, before + b"".join(line for line, _ in damage.values()))
        number, (_, reason) = next(iter(damage.items()))
        say(
            f"{self.path}, line {number}: not an answer ({reason}); {len(damage)} such lines are "
            f"set aside in {aside.name}, and what they answered is asked again",
            error=True,
        )


def read(path: Path) -> Iterator[Answer]:
    """The answers in `path`, in the order they were written; raises `EvaluationError`."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield _parse(line)
            except ValueError as error:
                raise EvaluationError(
                    f"{path}, line {number}: not an answer ({error}); run the command again, "
                    "which sets the line aside and asks its problem"
                ) from None


def _parse(line: bytes) -> Answer:
    """Raises ValueError, which says in a few words why `line` is no answer."""
    try:
        return _ANSWER.validate_json(line, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


def _line(answer: Answer, where: str) -> bytes:
    """An answer as a line; raises `EvaluationError` where it could not be read back."""
    # half a surrogate pair, which a server's JSON can bring, has no UTF-8
    line = json.dumps(vars(answer), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    try:
        _parse(line)
    except ValueError as error:
        raise EvaluationError(
            f"{where}: the answer to {answer.id!r} cannot be kept ({error}); see what the engine "
            "answers, or use another"
        ) from None
    return line


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
