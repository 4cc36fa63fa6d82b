"""Answers as append-only JSON lines: what is written once is never generated again.

A line is one answer, keyed by problem, sample and configuration. A killed run loses at most the
batch it was in; a last line that was cut short is taken off before the next is written.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

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
    """The file that answers are added to, locked against a second run while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise EvaluationError(
                f"{path}: another run is writing here; wait for it, or give another --output"
            ) from None
        self._mend()
        self.done = {answer.key for answer in read(path)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, answers: Iterable[Answer]) -> None:
        """Append `answers`, which are on the disk when this returns."""
        lines = [json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers]
        # half a surrogate pair, which a server's JSON can bring, has no UTF-8
        self._file.write("".join(lines).encode("utf-8", "replace"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _mend(self) -> None:
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
    """Write a whole file of JSON lines; it is there complete or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a whole file; it is there complete or not at all.

    A link is followed to its target. What is no regular file (a device, a pipe), or is this
    process's own output, is written straight into.
    """
    content = text.encode("utf-8", "replace")
    try:
        if _is_standard_output(path):
            sys.stdout.flush()
            with open(sys.stdout.fileno(), "wb", closefd=False) as output:
                output.write(content)
        elif path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            target = Path(os.path.realpath(path))
            beside = target.with_name(f".{target.name}.tmp")
            beside.write_bytes(content)
            beside.replace(target)
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be written ({error.strerror}); give another file, or make room there"
        ) from None


def _is_standard_output(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        return False


def check_writable(path: Path) -> None:
    """Raise `EvaluationError`, before any work is done, where `path` could not be written."""
    folder = Path(os.path.realpath(path)).parent
    if path.is_dir():
        raise EvaluationError(f"{path}: it is a folder; name a file in it")
    if not folder.is_dir():
        raise EvaluationError(
            f"{path}: there is no folder {folder}; make it (mkdir -p), or name another file"
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise EvaluationError(f"{path}: writing is not permitted there; name another file")
