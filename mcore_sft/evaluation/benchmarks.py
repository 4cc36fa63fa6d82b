"""The name of a benchmark in, its problems and right answers out.

JSON lines or a Hugging Face dataset  ->  rows  ->  Problem(id, problem, answer, choices)
"""

import difflib
import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from mcore_sft.base.foreign import what_instead
from mcore_sft.base.terminal import say
from mcore_sft.config import BenchmarkConfig, Section
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.grading.extract.extract import last_box

_ROWS = Path(__file__).with_name("benchmarks.yaml")
_ID_COLUMNS = ("unique_id", "id", "idx")


Kind = Literal["mathematics", "choice", "exact"]
Form = Literal["plain", "last_box", "letter", "index", "option"]
_PLAIN: Mapping[str, Form] = {"answer": "plain", "expected_answer": "plain"}
LETTERS = "ABCDEFGHIJ"
"""Of the options of a problem."""


class Row(Section):
    """One benchmark of benchmarks.yaml."""

    dataset: str | None = None
    subset: str | None = None
    split: str = "test"
    grader: Kind = "mathematics"
    problem: tuple[str, ...] = ("problem", "question")
    answer: Mapping[str, Form] = Field(default_factory=lambda: _PLAIN)
    choices: tuple[str, ...] = ()
    shuffled: bool = False
    tried: bool = True


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is asked, the right answer, and the row's other columns, the solution among them."""

    id: str
    problem: str
    """With its options, each after its letter, where it has some."""
    answer: str
    """Of a problem with options the letter of the right one."""
    extra: Mapping[str, Any]
    choices: tuple[str, ...] = ()
    solution: str | None = None
    """How the right answer is reached, where the benchmark says it."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The problems in the order of the file."""

    name: str
    dataset_name: str
    """What the printed block calls it: the last part of the dataset's name."""
    source: str
    problems: tuple[Problem, ...]
    grader: Kind = "mathematics"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of ids, problems and answers."""
        whole = [(problem.id, problem.problem, problem.answer) for problem in self.problems]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def shipped() -> dict[str, Row]:
    """The benchmarks that are known by name."""
    rows = yaml.safe_load(_ROWS.read_text(encoding="utf-8"))
    return {
        name: Row.model_validate_json(json.dumps(row), strict=True) for name, row in rows.items()
    }


def load(config: BenchmarkConfig, root: Path) -> Benchmark:
    """Read the benchmark that `config` names; its `path` is relative to `root`.

    Raises `EvaluationError` with one sentence: an unknown name, a missing column, broken JSON, a
    row without an answer, a hub out of reach.
    """
    known = shipped()
    row = known.get(config.name)
    if config.path is not None:
        row = row or Row()
        source = str(root / config.path)
        rows = _read_lines(root / config.path)
    else:
        row = row or _unknown(config.name, known)
        if not row.tried:
            say(
                f"{config.name}: nobody has run this benchmark with mcore_sft yet; look at the "
                "first problems and answers before you trust its score",
                error=True,
            )
        source = f"{row.dataset} ({row.split})"
        rows = _read_hub(row, source)
    columns = _Columns.choose(config, row, rows[0][1], source)
    ids = _ids([content for _, content in rows])
    problems = [
        columns.problem_of(content, identifier, where)
        for (where, content), identifier in zip(rows, ids, strict=True)
    ]
    return Benchmark(
        name=config.name,
        dataset_name=(row.dataset or config.name).rpartition("/")[2],
        source=source,
        problems=tuple(problems[: config.limit]),
        grader=row.grader,
    )


def _unknown(name: str, known: Iterable[str]) -> Row:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; shipped are {', '.join(known)}"
    raise EvaluationError(
        f"benchmark {name!r} is not known{hint} Any other name needs a `path` to JSON lines"
    )


@dataclass(frozen=True, kw_only=True)
class _Columns:
    problem: str
    answer: str
    form: Form
    choices: tuple[str, ...]
    shuffled: bool

    @classmethod
    def choose(
        cls, config: BenchmarkConfig, row: Row, first: Mapping[str, Any], source: str
    ) -> "_Columns":
        """The columns that the configuration names, else the first of the benchmark's own."""
        wanted = (config.problem,) if config.problem else row.problem
        problem = _first_of(wanted, "problem", first, source)
        wanted = (config.answer,) if config.answer else tuple(row.answer)
        answer = _first_of(wanted, "answer", first, source)
        for column in row.choices:
            _first_of((column,), "choices", first, source)
        return cls(
            problem=problem,
            answer=answer,
            form=row.answer.get(answer, "letter" if row.choices else "plain"),
            choices=row.choices,
            shuffled=row.shuffled,
        )

    def problem_of(self, content: Mapping[str, Any], identifier: str, where: str) -> Problem:
        """The problem of one row; `where` begins what is said when the row lacks something."""
        problem = _text(content, self.problem, where)
        written = _text(content, self.answer, where)
        choices: tuple[str, ...] = ()
        if self.choices:
            choices, answer = self._chosen(content, written, identifier, where)
            options = (f"{letter}. {each}" for letter, each in zip(LETTERS, choices, strict=False))
            problem = "\n".join((problem.rstrip() + "\n", *options))
        else:
            answer = _final(written, self.form)
        if not answer:
            raise EvaluationError(
                f"{where}: no answer in column {self.answer!r}, given {written[:60]!r}, expected "
                + (r"a \boxed{...}" if self.form == "last_box" else "a text that is not empty")
                + "; mend the row or take it out"
            )
        taken = {self.problem} if self.form == "last_box" else {self.problem, self.answer}
        extra = {
            name: value
            for name, value in content.items()
            if name not in taken and isinstance(value, str | int | float | bool)
        }
        solution = written if not choices and written.strip() != answer else extra.get("solution")
        return Problem(
            id=identifier,
            problem=problem,
            answer=answer,
            extra=extra,
            choices=choices,
            solution=solution if isinstance(solution, str) else None,
        )

    def _chosen(
        self, content: Mapping[str, Any], written: str, identifier: str, where: str
    ) -> tuple[tuple[str, ...], str]:
        """The options in the order in which they are shown, and the letter of the right one."""
        given: list[Any] = [content.get(column) for column in self.choices]
        options = given[0] if len(given) == 1 and isinstance(given[0], list) else given
        if not (2 <= len(options) <= len(LETTERS) and all(isinstance(o, str) for o in options)):
            raise EvaluationError(
                f"{where}: {' and '.join(self.choices)} are {json.dumps(given)[:60]}, expected "
                f"2 to {len(LETTERS)} texts; mend the row or take it out"
            )
        options = [option.strip() for option in options]
        right = _place(written.strip(), options, self.form)
        if right is None:
            raise EvaluationError(
                f"{where}: column {self.answer!r} is {written[:60]!r}, which is none of the "
                f"{len(options)} options as {self.form}; mend the row or take it out"
            )
        order = list(range(len(options)))
        if self.shuffled:  # in the same way each time, and not all right ones first
            random.Random(f"{identifier} {options[0]}").shuffle(order)
        return tuple(options[place] for place in order), LETTERS[order.index(right)]


def _place(written: str, options: Sequence[str], form: Form) -> int | None:
    """Which of `options` the answer says is right, from 0."""
    if form == "option":
        return options.index(written) if written in options else None
    if form == "index":
        place = int(written) if re.fullmatch(r"\d{1,2}", written) else -1
    else:
        place = LETTERS.find(written.strip("().").upper()) if written else -1
    return place if 0 <= place < len(options) else None


def _first_of(wanted: tuple[str, ...], role: str, first: Mapping[str, Any], source: str) -> str:
    found = next((name for name in wanted if name in first), None)
    if found is not None:
        return found
    near = difflib.get_close_matches(wanted[0], list(first), n=1)
    hint = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(first)}."
    raise EvaluationError(
        f"{source}: no column {' or '.join(wanted)} for the {role}; {hint} "
        f"Name it with the benchmark's `{role}`"
    )


def _text(content: Mapping[str, Any], column: str, where: str) -> str:
    value = content.get(column)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(
            f"{where}: column {column!r} is {json.dumps(value)[:60]}, expected a text; "
            "mend the row or take it out"
        )
    return value


def _final(written: str, form: Form) -> str:
    """The answer alone: after `####`, or in the last box, or the text as it is."""
    before, marks, after = written.rpartition("####")
    if marks and (not before or before.endswith("\n")):
        return after.strip()
    return (last_box(written) or "") if form == "last_box" else written.strip()


def _ids(rows: list[Mapping[str, Any]]) -> list[str]:
    """Ids from the first column that has unique ones, else the row's number from 0."""
    for column in _ID_COLUMNS:
        ids = [str(row[column]) for row in rows if row.get(column) is not None]
        if len(ids) == len(set(ids)) == len(rows):
            return ids
    return [str(number) for number in range(len(rows))]


def _read_lines(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise EvaluationError(
            f"{path}: cannot be read ({reason}); the benchmark's path starts from data.root"
        ) from None
    if instead := what_instead(path):
        raise EvaluationError(f"{path}: it is {instead}, and not the benchmark that was meant")
    rows = list(_parse_lines(path, text))
    if not rows:
        raise EvaluationError(f"{path}: no rows, expected one JSON object a line")
    return rows


def _parse_lines(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            content = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{where}: broken JSON ({error}); mend the line") from None
        if not isinstance(content, dict):
            raise EvaluationError(
                f"{where}: expected a JSON object, given {type(content).__name__}"
            )
        yield where, content


def _read_hub(row: Row, source: str) -> list[tuple[str, Mapping[str, Any]]]:
    import datasets

    say(f"reading {source} from the Hugging Face hub", error=True)
    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded = datasets.load_dataset(row.dataset, row.subset, split=row.split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise EvaluationError(
            f"{source}: cannot be loaded from the Hugging Face hub "
            f"({reason[0] if reason else type(error).__name__}); "
            "give the benchmark's `path` to a local file of JSON lines (--data FILE)"
        ) from None
    return [(f"{source}, row {number}", content) for number, content in enumerate(loaded)]
