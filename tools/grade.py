"""Answers in, verdicts out: regrades any JSON lines without a model, an engine or a GPU.

python tools/grade.py --input ANSWERS.jsonl --output VERDICTS.jsonl

A row has the right answer in `gold` or `expected_answer`, and either the whole `response` (or
`generation`), from which the policy takes the answer, or a `prediction` (or `predicted_answer`)
that somebody else has taken out of it. `finish_reason: length` marks a truncated response.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mcore_sft import command
from mcore_sft.base.files import check_writable
from mcore_sft.base.foreign import what_instead
from mcore_sft.base.terminal import Parser, say
from mcore_sft.config import Policy
from mcore_sft.evaluation.answers import write_lines
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.grading.compare.equivalence import NOT_GRADED, Verdict
from mcore_sft.evaluation.grading.extract.extract import Extraction
from mcore_sft.evaluation.grading.grade import Graded, Grader, Pair
from mcore_sft.evaluation.scores.report import interval_line, not_graded_line
from mcore_sft.evaluation.scores.statistics import Share

_GOLD = ("gold", "expected_answer")
_RESPONSE = ("response", "generation")
_PREDICTION = ("prediction", "predicted_answer")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one line asks to be graded; one of `response` and `prediction` is there, or neither
    where a prediction is null."""

    id: Any
    gold: str
    response: str | None
    prediction: str | None
    truncated: bool


def main() -> None:
    """Grade the file of the command line."""
    arguments = _arguments()
    if arguments.output:
        check_writable(arguments.output)
    rows = list(_read(arguments.input))
    with Grader(
        timeout=arguments.timeout, policy=arguments.policy, processes=arguments.processes
    ) as grader:
        graded = _grade(grader, rows)
    if arguments.output:
        write_lines(arguments.output, map(_verdict_row, rows, graded))
    say(_summary(graded), end="")


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", required=True, type=command.path, metavar="FILE", help="JSON lines"
    )
    parser.add_argument(
        "--output",
        type=command.path,
        metavar="FILE",
        help="one verdict a row, in the order of the input",
    )
    parser.add_argument(
        "--policy",
        choices=get_args(Policy),
        default="last_box",
        help="which part of a response counts as its answer (default: last_box)",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="of processor time, for one answer",
    )
    parser.add_argument("--processes", type=_count, default=0, metavar="N", help="0: one per core")
    return parser.parse_args()


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(
            f"expected seconds, above 0 and below 86400, such as 10 or 0.5; given {text!r}"
        )
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more; given {text!r}")
    return value


def _read(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from None
    if instead := what_instead(path):
        raise EvaluationError(f"{path}: it is {instead}, and not the answers that were meant")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _row(line, f"{path}, line {number}")


def _row(line: bytes, where: str) -> Row:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: broken JSON ({error}); mend the line") from None
    if not isinstance(content, dict):
        raise EvaluationError(f"{where}: expected a JSON object, given {type(content).__name__}")
    gold = _text(content, _GOLD, where)
    if gold is None:
        raise EvaluationError(
            f"{where}: no gold answer; expected a text in {' or '.join(_GOLD)}, "
            f"given {', '.join(content) or 'nothing'}"
        )
    if not any(name in content for name in (*_RESPONSE, *_PREDICTION)):
        raise EvaluationError(
            f"{where}: nothing to grade; expected {', '.join((*_RESPONSE, *_PREDICTION))}, "
            f"given {', '.join(content)}"
        )
    response = _text(content, _RESPONSE, where)
    return Row(
        id=content.get("id"),
        gold=gold,
        response=response,
        prediction=None if response is not None else _text(content, _PREDICTION, where),
        truncated=content.get("finish_reason") == "length",
    )


def _text(content: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """The first of the fields that is not null."""
    for name in names:
        value = content.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            raise EvaluationError(
                f"{where}: {name} is {type(value).__name__}, expected a text or a number"
            )
    return None


def _grade(grader: Grader, rows: Sequence[Row]) -> list[Graded]:
    nothing = Graded(
        extraction=Extraction(answer=None),
        verdict=Verdict(outcome="no_answer", rule="null"),
    )
    graded = [nothing] * len(rows)
    responses = [place for place, row in enumerate(rows) if row.response is not None]
    for position, decided in grader.grade_all(
        (row.gold, row.response, row.truncated) for row in rows if row.response is not None
    ):
        graded[responses[position]] = decided
    predictions = [place for place, row in enumerate(rows) if row.prediction is not None]
    for position, verdict in grader.judge_all(
        Pair(gold=row.gold, prediction=row.prediction) for row in rows if row.prediction is not None
    ):
        place = predictions[position]
        graded[place] = Graded(
            extraction=Extraction(answer=rows[place].prediction), verdict=verdict
        )
    return graded


def _verdict_row(row: Row, graded: Graded) -> dict[str, Any]:
    made = {} if row.id is None else {"id": row.id}
    missing = graded.extraction.missing
    return made | {
        "verdict": graded.verdict.outcome,
        "rule": graded.verdict.rule,
        # an empty box is an answer of no characters, no box is none
        "extracted": "" if missing == "empty" else graded.extraction.answer,
    }


def _summary(graded: Sequence[Graded]) -> str:
    outcomes = Counter(row.verdict.outcome for row in graded)
    rules = Counter((row.verdict.outcome, row.verdict.rule) for row in graded)
    known = len(graded) - outcomes[NOT_GRADED]
    lines = [f"{len(graded)} rows\n"]
    for outcome, count in outcomes.most_common():
        by_rule = ", ".join(
            f"{rule} {number}" for (kind, rule), number in rules.most_common() if kind == outcome
        )
        lines.append(f"  {outcome:<10} {count:>6}   {by_rule}\n")
    for name, outcome in (("correct", "equal"), ("no_answer", "no_answer")):
        lines.append(interval_line(name, Share(hits=outcomes[outcome], total=known)))
    if known < len(graded):
        lines.append(not_graded_line(len(graded) - known, len(graded)))
    return "".join(lines)


if __name__ == "__main__":
    command.run(main)
