"""All examples of a run in, the splits out: which examples each has, in what order, and from where.

    Collected -> divide -> Division: rows of a split, how often each is shown, what became of others

Which examples fit a sequence is the last rule of all (`packs`): another sequence length changes
neither the order nor what is a repeat.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.config import FilterConfig, HoldoutConfig
from mcore_sft.data.encode.block import BAD, UNTRAINED, Sample
from mcore_sft.data.encode.collect import CONTAMINATED, DUPLICATE, Collected, Ids
from mcore_sft.data.errors import DataError
from mcore_sft.data.packs.row_names import place
from mcore_sft.data.selection.order import distinct_rows, held_out, row_order, visits

Times = npt.NDArray[np.int16]

NOT_SAMPLED = "not sampled"
"""Why an example is dropped that downsampling leaves out."""

WEIGHED_OUT = "left out by its source's weight"
"""Why an example is dropped whose source has a weight below 1."""

TOO_LONG = "longer than the sequence"
"""Why an example is dropped that no pack can hold."""

_BEFORE_PROMPT = (BAD, *FilterConfig.model_fields)
_BEHIND_PROMPT = (UNTRAINED, CONTAMINATED, DUPLICATE, NOT_SAMPLED, WEIGHED_OUT, TOO_LONG)


def by_rule(reasons: Iterable[str]) -> list[str]:
    """Reasons in the order in which the rules run; what a prompt refuses is in the middle."""
    ranks = {reason: rank for rank, reason in enumerate(_BEFORE_PROMPT, -len(_BEFORE_PROMPT))}
    ranks |= {reason: rank for rank, reason in enumerate(_BEHIND_PROMPT, 1)}
    return sorted(reasons, key=lambda reason: (ranks.get(reason, 0), reason))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides which examples a split holds, and in what order.

    weights: of each source; root: the folder that files are named from in what is written.
    """

    filters: FilterConfig
    holdout: HoldoutConfig
    weights: Sequence[float]
    seed: int
    sequence_length: int
    root: Path = Path()


@dataclass(frozen=True, kw_only=True, eq=False)
class Division:
    """Which examples [M] a split has, in their order, and how often an epoch shows each.

    counts: of the rows that were read for it, and of what became of the others; samples: of these.
    """

    rows: Ids
    times: Times
    counts: dict[str, Any]
    samples: Mapping[str, Sequence[Sample]] = field(default_factory=dict)


def divide(split: str, everything: Collected, rules: Rules) -> dict[str, Division]:
    """The examples of `split`, and those of "validation" where a part of it is held out.

    What is in none is counted among the drops of `everything`. `DataError` where a split or a
    source is left without any.
    """
    drops = everything.drops
    rows = _chosen(everything, rules)
    _require_examples_of_each(split, everything, rules)
    held = rows[:0]
    if rules.holdout.fraction:
        out = _held_out(everything, rules)[rows]
        held, rows = rows[out], rows[~out]
        _require_some(everything, held, "holdout", rules)
    sources = everything.sources
    times = visits(rules.weights, sources, rules.seed)[rows]
    _require_some_of_each(everything, sources[rows], times, rules)
    if not times.all():
        drops.add(WEIGHED_OUT, int((times == 0).sum()))
        rows, times = rows[times > 0], times[times > 0]
    _require_some(everything, rows, split, rules, held=len(held))
    counts = _counts_of_rows(everything, rules, len(held))
    made = {split: Division(rows=rows, times=times, counts=counts, samples=drops.samples)}
    if len(held):
        once = np.ones(len(held), np.int16)
        counts = _counts_of_held(sources[held], everything, rules)
        made["validation"] = Division(rows=held, times=once, counts=counts)
    return made


def exported(everything: Collected, rules: Rules) -> tuple[Ids, int]:
    """The rows of training that are written as text, in their order, and how many are held out."""
    rows = _chosen(everything, rules)
    if not rules.holdout.fraction:
        return rows, 0
    held = _held_out(everything, rules)[rows]
    return rows[~held], int(held.sum())


def _chosen(everything: Collected, rules: Rules) -> Ids:
    """The examples that are written, in their order."""
    drops = everything.drops
    sampled = row_order(everything.problems, rules.filters)
    drops.add(NOT_SAMPLED, len(everything) - len(sampled))
    if not everything.compared_as_read:
        return sampled
    hashes = everything.hashes
    rows = distinct_rows(sampled, hashes)

    def repeats() -> Iterator[Sample]:
        for index in sampled[~np.isin(sampled, rows)].tolist():
            same = rows[(hashes[rows] == hashes[index]).all(axis=1)][0]
            yield everything.sample(index, same_as=everything.where(int(same)))

    drops.add(DUPLICATE, len(sampled) - len(rows), repeats())
    return rows


def _held_out(everything: Collected, rules: Rules) -> npt.NDArray[np.bool_]:
    by_row = rules.holdout.by == "row"
    return held_out(
        rules.holdout,
        positions=everything.positions if by_row else np.zeros(0, np.int64),
        problems=everything.problems,
        num_rows=everything.rows,
    )


def _counts_of_rows(everything: Collected, rules: Rules, held: int) -> dict[str, Any]:
    """What became of the rows that were read."""
    dropped, findings = everything.drops.counts, everything.findings
    pairs = {
        (each.problem, place(each.benchmark, rules.root).rpartition(":")[0]) for each in findings
    }
    return {
        "tokenized_elsewhere": "tokens" in everything.kinds.values(),
        "rows": everything.rows + dropped.get(BAD, 0),
        "held_out": held,
        "dropped": {reason: dropped[reason] for reason in by_rule(dropped)},
        "contaminated_problems": len({each.problem for each in findings}),
        "contaminated_by": dict(sorted(Counter(file for _, file in pairs).items())),
        "source_rows": [everything.source_rows[i] for i in range(len(rules.weights))],
    }


def _counts_of_held(
    sources: npt.NDArray[np.int16], everything: Collected, rules: Rules
) -> dict[str, Any]:
    """What became of the rows [M] that are held out, given the source of each."""
    return {
        "tokenized_elsewhere": "tokens" in everything.kinds.values(),
        "rows": len(sources),
        "dropped": {},
        "contaminated_problems": 0,
        "source_rows": np.bincount(sources, minlength=len(rules.weights)).tolist(),
    }


def _require_some(
    everything: Collected, rows: Ids, split: str, rules: Rules, *, held: int = 0
) -> None:
    long = int((everything.lengths[rows] > rules.sequence_length).sum())
    if long < len(rows):
        return
    dropped = everything.drops.counts | ({TOO_LONG: long} if long else {})
    dropped |= {"held out": held} if held else {}
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "empty"
    longer = ", or a longer data.sequence_length" if long else ""
    raise DataError(
        f"data.{split}: no example is left of {everything.rows} rows ({reasons}); "
        f"give other sources{longer}"
    )


def _require_examples_of_each(split: str, everything: Collected, rules: Rules) -> None:
    """`DataError` for a source without an example that fits, where others have some."""
    fits = everything.lengths <= rules.sequence_length
    made = np.bincount(everything.sources[fits], minlength=len(rules.weights))
    for index in np.flatnonzero(made == 0).tolist() if made.any() else ():
        long = {} if fits.all() else {TOO_LONG: 0}
        reasons = ", ".join(by_rule({**everything.drops.counts, **long})) or "it holds none"
        raise DataError(
            f"{everything.source_files[index]}: source {index} of data.{split} has no example of "
            f"{everything.source_rows[index]} rows (rows were dropped for: {reasons}). Fix: the "
            "rows or the filters, or take the source out"
        )


def _require_some_of_each(
    everything: Collected, sources: npt.NDArray[np.int16], times: Times, rules: Rules
) -> None:
    """`DataError` for a source that is left out of training by its weight alone."""
    of_each = {"minlength": len(rules.weights)}
    examples = np.bincount(sources, **of_each).tolist()
    shown = np.bincount(sources, times, **of_each).tolist()
    for index, weight in enumerate(rules.weights):
        if examples[index] and not shown[index]:
            raise DataError(
                f"{everything.source_files[index]}: source {index} of data.train has "
                f"{examples[index]} examples of {everything.source_rows[index]} rows, and its "
                f"weight {weight:g} leaves none of them; give a larger weight, or take the source "
                "out"
            )
