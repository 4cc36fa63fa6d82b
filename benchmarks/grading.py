"""Verdicts against labelled pairs, and responses graded a second against math-verify's own metric.

    python benchmarks/grading.py --data DIR [--quick] [--json FILE]
    python benchmarks/grading.py --cases FILE

DIR has grading/*.jsonl (gold, prediction, expected_equal; response, expected) and outputs/*.jsonl
(gold, response). Pairs tagged as debatable are left out, as their authors say they should be. The
peer of the pairs is math-verify with both sides in a math environment; the peer of the speed is
math_metric as NeMo RL calls it, on as many processes, both after their start and without caches.
Speed is told in wall time and in processor time of all processes, which a busy machine does not
change.

FILE has JSON lines with gold, expected_equal, and prediction or response and policy; each verdict
that is not the expected one is printed, and the exit status is 1 if there is any.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import psutil
from machine import machine
from rich.box import SIMPLE
from rich.table import Table

from mcore_sft.base.files import write_named
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.config import Policy
from mcore_sft.evaluation.grading import reference
from mcore_sft.evaluation.grading.extract.extract import extract
from mcore_sft.evaluation.grading.grade import Grader, Pair
from mcore_sft.evaluation.grading.pool import Pool
from mcore_sft.evaluation.grading.read.normalize import spell
from mcore_sft.evaluation.grading.read.signature import signature
from mcore_sft.evaluation.grading.worker_process import Job

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
    processor_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)

    @property
    def processor_median(self) -> float:
        """Processor time of the median round."""
        return statistics.median(self.processor_seconds)


def read(file: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def agreements(data: Path) -> Iterable[Agreement]:
    """Ours and the peer on each labelled corpus."""
    for name, (file, fair) in CORPORA.items():
        rows = [
            row
            for row in read(data / "grading" / f"{file}.jsonl")
            if row["expected_equal"] is not None and fair(row)  # type: ignore[no-untyped-call]
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
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "math_metric": []}
    for _ in range(rounds):
        times["ours"].append(_ours_seconds(rows))
        times["math_metric"].append(_peer_seconds(rows))
    return [
        Speed(
            grader=name,
            responses=len(rows),
            seconds=tuple(wall for wall, _ in taken),
            processor_seconds=tuple(processor for _, processor in taken),
        )
        for name, taken in times.items()
    ]


def _ours_seconds(rows: Sequence[tuple[str, str, bool]]) -> tuple[float, float]:
    spell.cache_clear()
    signature.cache_clear()
    with Grader(timeout=TIMEOUT, processes=PROCESSES) as grader:
        grader.start()
        return _timed(lambda: len(list(grader.grade_all(rows))))


def _peer_seconds(rows: Sequence[tuple[str, str, bool]]) -> tuple[float, float]:
    pairs = [(gold, response) for gold, response, _ in rows]
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        pool.map(_metric, [("1", "1")] * (4 * PROCESSES), chunksize=1)  # imports and caches
        return _timed(lambda: len(list(pool.imap_unordered(_metric, pairs, chunksize=8))))


def _metric(pair: tuple[str, str]) -> bool:
    return reference.nemo_rl(*pair)[0].correct


def _timed(work: Callable[[], int]) -> tuple[float, float]:
    """Seconds on the wall, and of the processors, for `work` by this process and its children."""
    start, before = time.perf_counter(), _processor_seconds()
    work()
    return time.perf_counter() - start, _processor_seconds() - before


def _processor_seconds() -> float:
    """Of this process and all below it, those that it has waited for among them."""
    this = psutil.Process()
    spent = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(
        each.user + each.system + each.children_user + each.children_system for each in spent
    )


def disagreements(cases: Path) -> Iterable[str]:
    """What is said of each case whose verdict is not the expected one."""
    for policy, rows in groupby(sorted(read(cases), key=_policy_of), key=_policy_of):
        asked = list(rows)
        with Grader(timeout=TIMEOUT, processes=PROCESSES, policy=policy or "last_box") as grader:
            if policy:
                graded = dict(grader.grade_all((r["gold"], r["response"], False) for r in asked))
                verdicts = {place: each.verdict for place, each in graded.items()}
            else:
                pairs = [Pair(gold=row["gold"], prediction=row["prediction"]) for row in asked]
                verdicts = dict(grader.judge_all(pairs))
        for place, row in enumerate(asked):
            verdict = verdicts[place]
            if verdict.correct != row["expected_equal"]:
                expected = "equal" if row["expected_equal"] else "not equal"
                given = row["response"] if policy else row["prediction"]
                yield (
                    f"{row.get('id', place)}: {verdict.outcome} by {verdict.rule}, expected "
                    f"{expected}: gold {row['gold']!r}, given {given!r} ({row.get('kind', '')})"
                )


def _policy_of(row: Row) -> Policy | Literal[""]:
    policy: Policy | Literal[""] = (
        "" if row.get("prediction") is not None else row.get("policy") or "last_box"
    )
    return policy


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
            f"processes, {speed.processor_median:.2f} s of processor time "
            f"(median of {len(speed.seconds)})"
        )
    ours, peer = fast
    console.print(
        f"ratio {peer.processor_median / ours.processor_median:.1f} in processor time, "
        f"{peer.median / ours.median:.1f} on the wall (at least 5, the goal is 8)"
    )


def main() -> None:
    """Measure and print."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="DIR", help="corpora and outputs")
    what.add_argument("--cases", type=Path, metavar="FILE", help="exits with 1 on a disagreement")
    parser.add_argument("--quick", action="store_true", help="one round of the speed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if options.cases:
        lines = list(disagreements(options.cases))
        for line in lines:
            console.print(line, soft_wrap=True)
        console.print(f"{len(read(options.cases))} cases, {len(lines)} disagreements")
        raise SystemExit(1 if lines else 0)
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
            "speed": [
                {**asdict(row), "median": row.median, "processor_median": row.processor_median}
                for row in fast
            ],
        }
        write_named(options.json, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
