"""Verdicts against labelled pairs, and responses graded a second against math-verify's own metric.

    python benchmarks/grading.py --data DIR [--quick] [--json FILE]

DIR has grading/*.jsonl (gold, prediction, expected_equal; response, expected) and outputs/*.jsonl
(gold, response). Pairs tagged as debatable are left out, as their authors say they should be. The
peer of the pairs is math-verify with both sides in a math environment; the peer of the speed is
math_metric as NeMo RL calls it, on as many processes, both after their start and without caches.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import machine
from rich.box import SIMPLE
from rich.table import Table

from mcore_sft.base.files import write_named
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.config import Policy
from mcore_sft.evaluation import reference
from mcore_sft.evaluation.extract import extract
from mcore_sft.evaluation.grade import Grader, Pair
from mcore_sft.evaluation.pool import Job, Pool

HERE = Path(__file__).parent
PROCESSES = 2
TIMEOUT = 10.0
CORPORA = {
    "real answers": ("real_pairs_adjudicated", lambda row: row["tag"] == "core"),
    "rewrites and mutations": ("metamorphic_cases", lambda row: True),
    "suites of 11 graders": ("equivalence_cases", lambda row: row["tag"] == "core"),
    "GSM8K": ("gsm8k_pairs_labelled", lambda row: True),
}
POLICIES: Mapping[str, Policy] = {
    "boxed": "last_box",
    "any": "final_answer",
    "gsm8k": "gsm8k",
}
Row = Mapping[str, Any]

console = Console(width=120)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often a grader says what a label says."""

    corpus: str
    grader: str
    rows: int
    false_positives: int
    false_negatives: int

    @property
    def percent(self) -> float:
        """Share of rows that agree."""
        return 100 * (1 - (self.false_positives + self.false_negatives) / self.rows)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds for all responses, by round."""

    grader: str
    responses: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)


def read(file: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def agreements(data: Path) -> Iterable[Agreement]:
    """Ours and the peer on each labelled corpus."""
    for name, (file, fair) in CORPORA.items():
        rows = [
            row
            for row in read(data / "grading" / f"{file}.jsonl")
            if row["expected_equal"] is not None and fair(row)
        ]
        pairs = [Pair(gold=row["gold"], prediction=row["prediction"] or "") for row in rows]
        for grader, judge in (("ours", ours), ("math-verify", peer)):
            verdicts = judge(pairs)
            wrong = [
                verdict
                for row, verdict in zip(rows, verdicts, strict=True)
                if verdict != row["expected_equal"]
            ]
            yield Agreement(
                corpus=name,
                grader=grader,
                rows=len(rows),
                false_positives=sum(wrong),
                false_negatives=len(wrong) - sum(wrong),
            )


def ours(pairs: Sequence[Pair]) -> list[bool]:
    """Whether each prediction is right, by us."""
    with Grader(timeout=TIMEOUT, processes=PROCESSES) as grader:
        verdicts = dict(grader.judge_all(pairs))
    return [verdicts[place].correct for place in range(len(pairs))]


def peer(pairs: Sequence[Pair]) -> list[bool]:
    """Whether each prediction is right, by math-verify alone, kept from hanging by our pool."""
    jobs = [
        (place, Job(task="math_verify", gold=pair.gold, prediction=pair.prediction))
        for place, pair in enumerate(pairs)
    ]
    with Pool(timeout=TIMEOUT, processes=PROCESSES) as pool:
        done = dict(pool.run(jobs))
    return [done[place].verdict.correct for place in range(len(pairs))]


def extraction(data: Path) -> tuple[int, int]:
    """Responses whose answer is known to the letter, and how many of them are extracted so."""
    rows = [row for row in read(data / "grading/extraction_cases.jsonl") if row["form"] == "raw"]
    found = [extract(row["response"], policy=POLICIES[row["mode"]]) for row in rows]
    right = sum(
        ("" if one.missing == "empty" else one.answer) == row["expected"]
        for one, row in zip(found, rows, strict=True)
    )
    return len(rows), right


def speeds(data: Path, rounds: int) -> list[Speed]:
    """Ours and math_metric on the same responses, turn by turn."""
    rows = [
        (row["gold"], row["response"], False)
        for file in sorted((data / "outputs").glob("*.jsonl"))
        for row in read(file)
    ]
    times: dict[str, list[float]] = {"ours": [], "math_metric": []}
    for _ in range(rounds):
        times["ours"].append(_ours_seconds(rows))
        times["math_metric"].append(_peer_seconds(rows))
    return [
        Speed(grader=name, responses=len(rows), seconds=tuple(seconds))
        for name, seconds in times.items()
    ]


def _ours_seconds(rows: Sequence[tuple[str, str, bool]]) -> float:
    with Grader(timeout=TIMEOUT, processes=PROCESSES) as grader:
        grader.start()
        return _timed(lambda: len(list(grader.grade_all(rows))))


def _peer_seconds(rows: Sequence[tuple[str, str, bool]]) -> float:
    pairs = [(gold, response) for gold, response, _ in rows]
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        pool.map(_metric, [("1", "1")] * (4 * PROCESSES), chunksize=1)  # imports and caches
        return _timed(lambda: len(list(pool.imap_unordered(_metric, pairs, chunksize=8))))


def _metric(pair: tuple[str, str]) -> bool:
    return reference.nemo_rl(*pair)[0].correct


def _timed(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show(found: Sequence[Agreement], extracted: tuple[int, int], fast: Sequence[Speed]) -> None:
    """The tables."""
    table = Table(box=SIMPLE)
    for column in ("corpus", "grader", "pairs", "agree", "false positive", "false negative"):
        table.add_column(column, justify="left" if column in {"corpus", "grader"} else "right")
    for row in found:
        counts = (row.false_positives, row.false_negatives)
        table.add_row(
            row.corpus, row.grader, str(row.rows), f"{row.percent:.2f} %", *map(str, counts)
        )
    console.print(table)
    rows, right = extracted
    console.print(f"extracted to the letter: {right} of {rows} ({100 * right / rows:.2f} %)")
    for speed in fast:
        console.print(
            f"{speed.grader}: {speed.responses} responses in {speed.median:.2f} s on {PROCESSES} "
            f"processes (median of {len(speed.seconds)})"
        )
    console.print(f"ratio {fast[1].median / fast[0].median:.1f} (goals: 5, and ours below 6 s)")


def main() -> None:
    """Measure and print."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="one round of the speed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    where = machine("math-verify", "sympy", "gmpy2")
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    found = list(agreements(options.data))
    extracted = extraction(options.data)
    fast = speeds(options.data, rounds=1 if options.quick else 3)
    show(found, extracted, fast)
    if options.json:
        told = {
            **where,
            "agreement": [{**asdict(row), "percent": row.percent} for row in found],
            "extraction": {"rows": extracted[0], "right": extracted[1]},
            "speed": [{**asdict(row), "median": row.median} for row in fast],
        }
        write_named(options.json, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
