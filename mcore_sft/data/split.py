"""Encoded blocks in, the files of the splits out: tokens as they come, order and packs at the end.

Encoded -> Collected (one stretch of bytes, columns in memory) -> order -> split files
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mcore_sft.config import FilterConfig, HoldoutConfig
from mcore_sft.data.contamination import Finding
from mcore_sft.data.duplicates import Seen
from mcore_sft.data.encode import BAD, SAMPLES, TOO_LONG, Drops, Encoded, Sample
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum, write_index
from mcore_sft.data.order import held_out, row_order, visits
from mcore_sft.data.rows import num_trained

Lengths = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]

DUPLICATE = "duplicate"
"""Why an example is dropped whose problem and solution came before."""

NOT_SAMPLED = "not sampled"
"""Why an example is dropped that downsampling leaves out."""

WEIGHED_OUT = "left out by its source's weight"
"""Why an example is dropped whose source has a weight below 1."""

HELD_OUT = "held out for validation"
"""Why an example is not in training that `data.holdout` takes for the validation loss."""

_AT_ONCE = 8192  # rows gathered at a time


class Collector:
    """Takes encoded blocks in order and leaves out what came before.

    The tokens go to `file` as they come; some 50 bytes an example stay in memory.
    """

    def __init__(self, file: Path, dtype: np.dtype[Any], *, deduplicate: bool) -> None:
        self.file = file
        self.dtype = dtype
        self.drops = Drops()
        self.findings: set[Finding] = set()
        self.rows = 0
        self.source_rows: Counter[int] = Counter()
        self.tokenized_elsewhere = False
        self._seen = Seen() if deduplicate else None
        self._out: BinaryIO = file.open("wb")
        self._parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _COLUMNS}

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def add(self, encoded: Encoded) -> None:
        """Append the examples of one block, but for those that came before."""
        self.drops.update(encoded.drops)
        if self._seen is not None:
            new = self._seen.new(encoded.hashes)
            self.drops.add(DUPLICATE, int((~new).sum()), _places(encoded, ~new))
            encoded = encoded.keep(new)
        made = encoded.examples
        self._out.write(made.tokens.astype(self.dtype, copy=False).tobytes())
        columns: dict[str, npt.NDArray[Any]] = {
            "lengths": made.lengths,
            "spans": made.spans,
            "span_counts": made.span_counts,
            "problems": encoded.problems,
            "positions": made.rows + self.rows,
            "sources": np.full(len(made), encoded.source, np.int16),
        }
        for name, column in columns.items():
            self._parts[name].append(column)
        self.findings.update(encoded.findings)
        self.rows += encoded.rows
        self.tokenized_elsewhere |= encoded.tokenized_elsewhere
        self.source_rows[encoded.source] += encoded.rows

    def collected(self) -> "tuple[Collected, Origins]":
        """Everything that was added; nothing can be added after it."""
        self._out.close()
        self._seen = None
        columns = {}
        for name, nothing in _COLUMNS.items():  # one by one, so that no two are there twice
            columns[name] = np.concatenate([nothing, *self._parts.pop(name)])
        origins = Origins(**{name: columns.pop(name) for name in _OF_ORIGINS})
        return Collected(file=self.file, dtype=self.dtype, **columns), origins


_COLUMNS: dict[str, npt.NDArray[Any]] = {
    "lengths": np.zeros(0, np.int32),
    "spans": np.zeros((0, 2), np.int32),
    "span_counts": np.zeros(0, np.int32),
    "problems": np.zeros(0, np.uint64),
    "positions": np.zeros(0, np.int64),
    "sources": np.zeros(0, np.int16),
}
_OF_ORIGINS = ("problems", "positions", "sources")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """All examples [N] of a run: their tokens end to end in `file`, the rest as columns."""

    file: Path
    dtype: np.dtype[Any]
    lengths: Lengths
    spans: npt.NDArray[np.int32]
    span_counts: Lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, rows: Ids, file: Path) -> None:
        """Write the tokens of `rows`, in this order, to `file`."""
        offsets = running_sum(self.lengths) * self.dtype.itemsize
        data = np.memmap(self.file, np.uint8, mode="r").data if len(rows) else b""
        with file.open("wb") as out:
            for first in range(0, len(rows), _AT_ONCE):
                some = rows[first : first + _AT_ONCE]
                ends = zip(offsets[some].tolist(), offsets[some + 1].tolist(), strict=True)
                out.write(b"".join([data[start:end] for start, end in ends]))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Origins:
    """Where all examples [N] of a run come from.

    problems: a hash of each one's problem; positions: the place of its row among all rows read;
    sources: which source it is from.
    """

    problems: npt.NDArray[np.uint64]
    positions: Ids
    sources: npt.NDArray[np.int16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitRules:
    """What decides which examples a split holds, in what order, and how they are packed.

    weights: of each source; pack: lengths, capacity, seed -> order, offsets (ops.packing).
    """

    filters: FilterConfig
    holdout: HoldoutConfig
    weights: Sequence[float]
    sequence_length: int
    seed: int
    pack: Callable[[Lengths, int, int], tuple[Ids, Ids]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """What was written of one split: its counts, and the hashes of its distinct problems."""

    counts: dict[str, Any]
    problems: npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Which examples [M] a split holds, in their order, and how often an epoch shows each."""

    rows: Ids
    times: npt.NDArray[np.int16]
    problems: npt.NDArray[np.uint64]


def write_splits(
    folder: Path, split: str, collector: Collector, rules: SplitRules
) -> dict[str, Split]:
    """Write `split`, and "validation" where a part of it is held out, from what was collected."""
    everything, origins = collector.collected()
    parts = _divide(split, origins, collector, rules)
    del origins  # of many rows, this is the memory that packing needs
    _write_findings(folder / f"{split}.contamination.jsonl", collector.findings)
    told = {
        "tokenized_elsewhere": collector.tokenized_elsewhere,
        "rows": collector.rows + collector.drops.counts.get(BAD, 0),
        "dropped": dict(sorted(collector.drops.counts.items())),
        "contaminated_problems": len({finding.problem for finding in collector.findings}),
        "source_rows": [collector.source_rows[i] for i in range(len(rules.weights))],
    }
    made = {}
    for name in list(parts):
        part = parts.pop(name)
        counts = {**told, **_write(folder / name, everything, part, rules)}
        made[name] = Split(counts=counts, problems=part.problems)
        told.update(rows=collector.drops.counts.get(HELD_OUT), dropped={}, source_rows=[])
        told.update(contaminated_problems=0)
    everything.file.unlink(missing_ok=True)
    return made


def _divide(
    split: str, origins: Origins, collector: Collector, rules: SplitRules
) -> dict[str, _Part]:
    """The examples of each split; counts those that are in none, or held out."""
    drops = collector.drops
    rows = row_order(origins.problems, rules.filters)
    drops.add(NOT_SAMPLED, len(origins.problems) - len(rows))
    held = rows[:0]
    if rules.holdout.fraction:
        positions, problems = origins.positions, origins.problems
        out = held_out(
            rules.holdout, positions=positions, problems=problems, num_rows=collector.rows
        )[rows]
        held, rows = rows[out], rows[~out]
        drops.add(HELD_OUT, len(held))
        _require_some(len(held), "holdout", collector)
    times = visits(rules.weights, origins.sources, rules.seed)[rows]
    if not times.all():
        drops.add(WEIGHED_OUT, int((times == 0).sum()))
        rows, times = rows[times > 0], times[times > 0]
    _require_some(len(rows), split, collector)
    parts = {split: (rows, times)}
    if len(held):
        parts["validation"] = (held, np.ones(len(held), np.int16))
    return {
        name: _Part(rows=rows, times=times, problems=np.unique(origins.problems[rows]))
        for name, (rows, times) in parts.items()
    }


def _require_some(count: int, split: str, collector: Collector) -> None:
    if count == 0:
        dropped = collector.drops.counts
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "empty"
        longer = ", or a longer data.sequence_length" if TOO_LONG in dropped else ""
        raise DataError(
            f"data.{split}: no example is left of {collector.rows} rows ({reasons}); "
            f"give other sources{longer}"
        )


def _write(prefix: Path, everything: Collected, part: _Part, rules: SplitRules) -> dict[str, Any]:
    """Write the files of one split, and return its counts."""
    lengths, trained = _write_examples(prefix, everything, part.rows)
    shown = None
    if (part.times != 1).any():
        shown = np.repeat(np.arange(len(lengths)), part.times)
    in_packs = lengths if shown is None else lengths[shown]
    order, pack_offsets = rules.pack(in_packs, rules.sequence_length, rules.seed)
    order = order if shown is None else shown[order]
    supervised = np.add.reduceat(trained[order], pack_offsets[:-1], dtype=np.int32)
    _save(prefix, packs=order, pack_offsets=pack_offsets, supervised=supervised)
    tokens, packs = int(in_packs.sum(dtype=np.int64)), len(supervised)
    return {
        "examples": len(lengths),
        "visits": len(order),
        "tokens": tokens,
        "supervised_tokens": int(supervised.sum(dtype=np.int64)),
        "longest": int(lengths.max()),
        "packs": packs,
        "packing_efficiency": round(tokens / (packs * rules.sequence_length), 6),
        "examples_per_pack": round(len(order) / packs, 6),
    }


def _write_examples(prefix: Path, everything: Collected, rows: Ids) -> tuple[Lengths, Lengths]:
    """Write the tokens and spans of `rows`; returns how many tokens of each there are, and trained.

    Every example has a span.
    """
    tokens = prefix.with_suffix(".bin")
    if len(rows) == len(everything) and (rows[:-1] < rows[1:]).all():
        everything.file.rename(tokens)
        lengths, spans, span_counts = everything.lengths, everything.spans, everything.span_counts
    else:
        everything.gather(rows, tokens)
        lengths, span_counts = everything.lengths[rows], everything.span_counts[rows]
        spans = everything.spans[ranges(running_sum(everything.span_counts), rows)]
    write_index(prefix.with_suffix(".idx"), lengths, everything.dtype)
    span_offsets = running_sum(span_counts)
    _save(prefix, spans=spans, span_offsets=span_offsets)
    return lengths, np.add.reduceat(num_trained(spans), span_offsets[:-1], dtype=np.int32)


def _save(prefix: Path, **arrays: npt.NDArray[Any]) -> None:
    for name, array in arrays.items():
        np.save(prefix.with_suffix(f".{name}.npy"), array, allow_pickle=False)


def _write_findings(file: Path, findings: Iterable[Finding]) -> None:
    """What training and benchmarks share, in an order that no worker decides."""
    lines = sorted(
        json.dumps(dataclasses.asdict(finding), ensure_ascii=False) + "\n" for finding in findings
    )
    if lines:
        file.write_text("".join(lines), encoding="utf-8")


def _places(encoded: Encoded, which: npt.NDArray[np.bool_]) -> Iterator[Sample]:
    for number in encoded.numbers[which][:SAMPLES].tolist():
        yield Sample(f"{encoded.name}:{number}", "")


def packing_operator() -> Callable[[Lengths, int, int], tuple[Ids, Ids]]:
    """`best_fit_pack` on arrays; an error says how to build it where it is not."""
    # Imported here, because the processes that tokenize load this module and need no torch.
    import torch

    from mcore_sft.ops.packing import best_fit_pack

    def pack(lengths: Lengths, capacity: int, seed: int) -> tuple[Ids, Ids]:
        order, offsets = best_fit_pack(torch.from_numpy(lengths), capacity, seed)
        return order.numpy(), offsets.numpy()

    return pack


def ranges(offsets: Ids, which: Ids) -> Ids:
    """The numbers from offsets[i] to offsets[i + 1], for each i of `which`, end to end."""
    counts = offsets[which + 1] - offsets[which]
    before = np.cumsum(counts) - counts
    numbers: Ids = np.arange(counts.sum()) + np.repeat(offsets[which] - before, counts)
    return numbers
