"""Rows of verdicts in, what a report says of them out: shares, by what they are split, and doubts.

Sample 0 of a problem is its greedy answer, samples 1 to N are sampled. An answer that could not be
graded is in no share: of the samples its whole problem is left out.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import quantiles
from typing import Any

from mcore_sft.evaluation.benchmarks import Benchmark
from mcore_sft.evaluation.grading.compare.equivalence import NOT_GRADED
from mcore_sft.evaluation.grading.extract.extract import differing_boxes
from mcore_sft.evaluation.grading.grade import UNKNOWN_CLASS
from mcore_sft.evaluation.scores.statistics import Mean, Share, majority, pass_at_k

Row = Mapping[str, Any]
Modes = dict[str, tuple[Share | Mean, Share | Mean]]
"""By evaluation mode, what is right and what has no answer."""


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The rows of verdicts.jsonl, those of a problem together."""

    rows: Sequence[Row]

    @cached_property
    def greedy(self) -> list[Row]:
        """The greedy answers."""
        return [row for row in self.rows if row["sample"] == 0]

    @cached_property
    def sampled(self) -> list[list[Row]]:
        """The sampled answers of each problem."""
        problems: dict[str, list[Row]] = {}
        for row in self.rows:
            if row["sample"] > 0:
                problems.setdefault(row["id"], []).append(row)
        return list(problems.values())

    @property
    def samples(self) -> int:
        """N, sampled answers of one problem."""
        return len(self.sampled[0]) if self.sampled else 0

    @cached_property
    def graded(self) -> list[list[Row]]:
        """Those of `sampled` of which all is known."""
        return [rows for rows in self.sampled if all(map(_is_known, rows))]

    @property
    def ungraded(self) -> int:
        """How many answers are not graded."""
        return sum(not _is_known(row) for row in self.rows)

    @property
    def headline(self) -> list[Row]:
        """The answers that breakdowns count: the greedy ones, or all where there are none."""
        return self.greedy or list(self.rows)

    def modes(self) -> Modes:
        """NeMo-Skills' evaluation modes: greedy, and majority, pass and pass@1 of the N sampled."""
        made: Modes = {}
        if self.greedy:
            made["greedy"] = share(self.greedy), _silent(self.greedy)
        if self.samples:
            made |= self.modes_at(self.samples)
        return made

    def modes_at(self, k: int) -> Modes:
        """The modes of k samples.

        majority@k and pass@1[k] look at the first k; pass@k is the unbiased estimate from all N.
        No answer means that none of the first k has one; for pass@1[k] it is their mean.
        """
        # NeMo-Skills of May 2025 votes by spelling, lets the first of a tie win, takes pass@k from
        # the first k, and forgets problems without any answer in both rows' no_answer.
        first = [rows[:k] for rows in self.graded]
        nothing = Mean(values=tuple(float(all(map(_is_silent, rows))) for rows in first))
        return {
            f"majority@{k}": (
                Mean(
                    values=tuple(
                        majority([row["class"] for row in rows], [*map(is_right, rows)])
                        for rows in first
                    )
                ),
                nothing,
            ),
            f"pass@{k}": (
                Mean(values=tuple(pass_at_k([*map(is_right, rows)], k) for rows in self.graded)),
                nothing,
            ),
            f"pass@1[{k}]": (_mean(first, is_right), _mean(first, _is_silent)),
        }


def share(rows: Sequence[Row]) -> Share:
    """How many are right of those that are graded."""
    return Share(hits=sum(map(is_right, rows)), total=sum(map(is_graded, rows)))


def told(figure: Share | Mean) -> dict[str, Any]:
    """A figure as report.json has it."""
    if isinstance(figure, Share):
        return {
            "percent": figure.percent,
            "hits": figure.hits,
            "total": figure.total,
            "wilson95": list(figure.interval),
        }
    return {
        "percent": figure.percent,
        "total": len(figure.values),
        "standard_error": figure.standard_error,
        "interval95": list(figure.interval),
    }


def describe(verdicts: Verdicts, benchmark: Benchmark) -> dict[str, Any]:
    """Everything that report.json says of the verdicts."""
    rows = verdicts.headline
    return {
        "score": _scores(verdicts),
        "by_k": {
            str(k): {mode: told(right) for mode, (right, _) in verdicts.modes_at(k).items()}
            for k in range(1, verdicts.samples + 1)
        },
        "not_graded": verdicts.ungraded,
        "verdicts": dict(Counter(row["verdict"] for row in rows).most_common()),
        "rules": _rules(rows),
        "missing": dict(Counter(row["missing"] for row in rows if row["missing"]).most_common()),
        "boxes_differ": sum(row["boxes_differ"] for row in rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows),
        "mean_tokens": _mean_tokens(rows),
        "by": {name: _told_by(rows, name) for name in ("subject", "level")},
        "by_subject_level": _by_both(rows),
        "lengths": lengths(rows),
        "disputed": [row["id"] for row in rows if row["disputed"]],
        "gold_defects": gold_defects(benchmark, rows),
    }


def _scores(verdicts: Verdicts) -> dict[str, Any]:
    """One answer a problem first, greedy or the mean of samples; then every mode."""
    modes = verdicts.modes()
    right, silent = modes.get("greedy") or modes[f"pass@1[{verdicts.samples}]"]
    return {
        "symbolic_correct": told(right),
        "no_answer": told(silent),
        **{mode: told(found) for mode, (found, _) in modes.items() if mode != "greedy"},
    }


def _rules(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """How often each rule decided, by verdict."""
    counted: dict[str, Counter[str]] = {}
    for row in rows:
        counted.setdefault(row["verdict"], Counter())[row["rule"]] += 1
    return {outcome: dict(rules.most_common()) for outcome, rules in counted.items()}


def _told_by(rows: Sequence[Row], name: str) -> dict[str, Any]:
    return {value: told(share(part)) for value, part in _split(rows, name).items()}


def _by_both(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        subject: levels
        for subject, part in _split(rows, "subject").items()
        if (levels := _told_by(part, "level"))
    }


def _split(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """The rows by what they say in `name`, in its order; rows that say nothing are left out."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        if row[name] is not None:
            parts.setdefault(str(row[name]), []).append(row)
    return dict(sorted(parts.items()))


def _mean_tokens(rows: Sequence[Row]) -> float | None:
    """Of the responses whose tokens are known; none where none are."""
    known = [row["num_tokens"] for row in rows if row["num_tokens"] is not None]
    return sum(known) / len(known) if known else None


def lengths(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Shares by deciles of the response's tokens; fewer where many are of one length."""
    rows = [row for row in rows if row["num_tokens"] is not None]
    if not rows:
        return []
    tokens = sorted(row["num_tokens"] for row in rows)
    cuts = quantiles(tokens, n=10, method="inclusive") if len(tokens) > 1 else []
    edges = sorted({tokens[0], *(round(cut) for cut in cuts)})
    parts: list[list[Row]] = [[] for _ in edges]
    for row in rows:
        parts[bisect_right(edges, row["num_tokens"]) - 1].append(row)
    ends: list[int | None] = [*edges[1:], None]
    return [
        {"from": start, "to": end, **told(share(part))}
        for start, end, part in zip(edges, ends, parts, strict=True)
    ]


def gold_defects(benchmark: Benchmark, rows: Sequence[Row]) -> list[dict[str, str]]:
    """Right answers to doubt: solutions with boxes that disagree, and golds nobody could read."""
    doubts = [
        {"id": problem.id, "reason": "the boxes of its solution do not say the same"}
        for problem in benchmark.problems
        if differing_boxes(str(problem.extra.get("solution", "")))
    ]
    unread = dict.fromkeys(row["id"] for row in rows if _gold_unread(row))
    return doubts + [
        {"id": name, "reason": "the right answer cannot be read as mathematics"} for name in unread
    ]


def _gold_unread(row: Row) -> bool:
    return (row["verdict"], row["rule"]) == ("unparsable", "gold")


def is_right(row: Row) -> bool:
    """Whether the answer of a row of verdicts.jsonl counts."""
    return bool(row["verdict"] == "equal")


def is_graded(row: Row) -> bool:
    """Whether anything is known of the answer of a row of verdicts.jsonl."""
    return bool(row["verdict"] != NOT_GRADED)


def _is_known(row: Row) -> bool:
    """Whether it is graded, and a sampled one compared with the others of its problem."""
    return is_graded(row) and row.get("class") != UNKNOWN_CLASS


def _is_silent(row: Row) -> bool:
    return bool(row["verdict"] == "no_answer")


def _silent(rows: Sequence[Row]) -> Share:
    return Share(hits=sum(map(_is_silent, rows)), total=sum(map(is_graded, rows)))


def _mean(problems: Sequence[Sequence[Row]], what: Callable[[Row], bool]) -> Mean:
    return Mean(values=tuple(sum(map(what, rows)) / len(rows) for rows in problems))
