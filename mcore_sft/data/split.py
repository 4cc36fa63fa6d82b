"""Encoded blocks in, the files of the splits out: tokens as they come, order and packs at the end.

Encoded -> Collected (one stretch of bytes, columns in memory) -> order -> split files
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mcore_sft.config import FilterConfig, HoldoutConfig
from mcore_sft.data.contamination import Finding
from mcore_sft.data.duplicates import Hashes, Seen
from mcore_sft.data.encode import (
    BAD,
    CONTAMINATED,
    SAMPLES,
    TOO_LONG,
    UNTRAINED,
    Drops,
    Encoded,
    Sample,
)
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum, write_index
from mcore_sft.data.order import distinct_rows, held_out, row_order, visits
from mcore_sft.data.places import Places, place
from mcore_sft.data.prompt_record import SystemHashes, SystemTexts, Way, record
from mcore_sft.data.rows import num_trained

Lengths = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]

DUPLICATE = "duplicate"
"""Why an example is dropped whose problem and solution came before."""

NOT_SAMPLED = "not sampled"
"""Why an example is dropped that downsampling leaves out."""

WEIGHED_OUT = "left out by its source's weight"
"""Why an example is dropped whose source has a weight below 1."""

_BEFORE_PROMPT = (BAD, *FilterConfig.model_fields, CONTAMINATED)
_BEHIND_PROMPT = (UNTRAINED, TOO_LONG, DUPLICATE, NOT_SAMPLED, WEIGHED_OUT)

_AT_ONCE = 8192  # rows gathered at a time
_GROWTH = 2**16  # rows that a column grows by


def by_rule(reasons: Iterable[str]) -> list[str]:
    """Reasons in the order in which the rules run; what a prompt refuses is in the middle."""
    ranks = {reason: rank for rank, reason in enumerate(_BEFORE_PROMPT, -len(_BEFORE_PROMPT))}
    ranks |= {reason: rank for rank, reason in enumerate(_BEHIND_PROMPT, 1)}
    return sorted(reasons, key=lambda reason: (ranks.get(reason, 0), reason))


class Collector:
    """Takes encoded blocks in order and leaves out what came before.

    The tokens go to `file` as they come; some 50 bytes an example stay in memory.
    """

    def __init__(self, file: Path, dtype: np.dtype[Any], *, deduplicate: bool) -> None:
        self.file = file
        self.dtype = dtype
        self.drops = Drops()
        self.findings: dict[tuple[str, str], Finding] = {}
        self.rows = 0
        self.source_rows: Counter[int] = Counter()
        self.source_files: dict[int, str] = {}
        self.kinds: dict[int, str] = {}
        self.system_texts = SystemTexts()
        self.places = Places()
        self._repeats: list[_Repeat] = []
        self._num_repeats = 0
        self._seen = Seen() if deduplicate else None
        self._out: BinaryIO = file.open("wb")
        self._columns = {name: _Column(nothing) for name, nothing in _COLUMNS.items()}

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def add(self, encoded: Encoded) -> None:
        """Append the examples of one block, but for those that came before."""
        self.drops.update(encoded.drops)
        if self._seen is not None:
            encoded = self._without_repeats(encoded, self._seen)
        made = encoded.examples
        self._out.write(made.tokens.astype(self.dtype, copy=False).tobytes())
        columns: dict[str, npt.NDArray[Any]] = {
            "lengths": made.lengths,
            "spans": made.spans,
            "span_counts": made.span_counts,
            "problems": encoded.problems,
            "positions": made.rows + self.rows,
            "hashes": encoded.hashes if len(encoded.read_hashes) else encoded.read_hashes,
            "sources": np.full(len(made), encoded.source, np.int16),
        }
        if encoded.kind == "conversations":
            behind = self._columns["lengths"].count - self._columns["systems"].count
            self._columns["systems"].append(np.zeros(behind, np.uint64))
            columns["systems"] = encoded.systems
        for name, column in columns.items():
            self._columns[name].append(column)
        self.places.add(encoded.name, columns["positions"], encoded.numbers)
        for found in encoded.findings:  # the first row of a problem, whichever process saw it
            self.findings.setdefault((found.problem, found.benchmark_problem), found)
        self.rows += encoded.rows
        self.system_texts.add(encoded.system_texts)
        self.kinds[encoded.source] = encoded.kind
        self.source_rows[encoded.source] += encoded.rows + encoded.drops.counts.get(BAD, 0)
        self.source_files.setdefault(encoded.source, encoded.name)

    def _without_repeats(self, encoded: Encoded, seen: Seen) -> Encoded:
        """The examples that did not come before; NeMo-Skills compares rows as they were read."""
        if len(encoded.read_hashes):
            new = seen.new(encoded.read_hashes)[encoded.examples.rows]
        else:
            new = seen.new(encoded.hashes)
        left = max(0, SAMPLES - len(self._repeats))
        for index in np.flatnonzero(~new)[:left].tolist():
            one = encoded.keep(np.arange(len(new)) == index)
            where, problem = f"{encoded.name}:{one.numbers[0]}", int(one.problems[0])
            self._repeats.append(_Repeat(where, problem, one.examples.tokens, one.examples.spans))
        self._num_repeats += int((~new).sum())
        return encoded.keep(new)

    def collected(self) -> "tuple[Collected, Origins]":
        """Everything that was added; nothing can be added after it."""
        self._out.close()
        self._seen = None
        columns = {name: column.taken() for name, column in self._columns.items()}
        origins = Origins(**{name: columns.pop(name) for name in _OF_ORIGINS})
        everything = Collected(file=self.file, dtype=self.dtype, **columns)
        repeats = (self._shown(repeat, everything, origins) for repeat in self._repeats)
        self.drops.add(DUPLICATE, self._num_repeats, repeats)
        return everything, origins

    def _shown(self, repeat: "_Repeat", everything: "Collected", origins: "Origins") -> Sample:
        """A row that came before, and where, unless a filter left its original out."""
        same = everything.find(repeat, np.flatnonzero(origins.problems == repeat.problem))
        same_as = "" if same is None else self.places.where(int(origins.positions[same]))
        return Sample(repeat.where, "", same_as=same_as, tokens=repeat.tokens.tolist())


class _Column:
    """Rows that are appended to one array, which grows in place: pieces leave memory in pieces."""

    def __init__(self, nothing: npt.NDArray[Any]) -> None:
        self._array = nothing.copy()
        self.count = 0

    def append(self, rows: npt.NDArray[Any]) -> None:
        end = self.count + len(rows)
        if end > len(self._array):
            self._resize(max(end, len(self._array) + _GROWTH))
        self._array[self.count : end] = rows
        self.count = end

    def taken(self) -> npt.NDArray[Any]:
        """All that was appended; nothing can be appended after it."""
        self._resize(self.count)
        return self._array

    def _resize(self, count: int) -> None:
        self._array.resize((count, *self._array.shape[1:]), refcheck=False)


_COLUMNS: dict[str, npt.NDArray[Any]] = {
    "lengths": np.zeros(0, np.int32),
    "spans": np.zeros((0, 2), np.int32),
    "span_counts": np.zeros(0, np.int32),
    "problems": np.zeros(0, np.uint64),
    "positions": np.zeros(0, np.int64),
    "hashes": np.zeros((0, 2), np.uint64),
    "sources": np.zeros(0, np.int16),
    "systems": np.zeros(0, np.uint64),
}
_OF_ORIGINS = ("problems", "positions", "hashes", "sources", "systems")


@dataclasses.dataclass(frozen=True, eq=False)
class _Repeat:
    """An example that came before: where it stands, a hash of its problem, what it says."""

    where: str
    problem: int
    tokens: npt.NDArray[Any]
    spans: npt.NDArray[np.int32]


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

    def example(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Tokens and spans of one example."""
        first = int(self.lengths[:index].sum(dtype=np.int64)) * self.dtype.itemsize
        tokens = np.fromfile(self.file, self.dtype, int(self.lengths[index]), offset=first)
        start = int(self.span_counts[:index].sum(dtype=np.int64))
        return tokens, self.spans[start : start + int(self.span_counts[index])]

    def find(self, repeat: "_Repeat", candidates: Ids) -> int | None:
        """Which of `candidates` has the tokens and spans of `repeat`."""
        for index in map(int, candidates[self.lengths[candidates] == len(repeat.tokens)]):
            tokens, spans = self.example(index)
            if np.array_equal(tokens, repeat.tokens) and np.array_equal(spans, repeat.spans):
                return index
        return None

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
    hashes [N, 2]: of problem and solution, where they are compared once more in the order in which
    they are written (`order.distinct_rows`), else [0, 2]; sources: which source it is from;
    systems: which system text a conversation has (`prompt_record`), up to the last conversation.
    """

    problems: npt.NDArray[np.uint64]
    positions: Ids
    hashes: Hashes
    sources: npt.NDArray[np.int16]
    systems: SystemHashes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitRules:
    """What decides which examples a split holds, in what order, and how they are packed.

    weights: of each source; pack: lengths, capacity, seed -> order, offsets (ops.packing); root:
    the folder that files are named from in what is written; wording: how problems are asked.
    """

    filters: FilterConfig
    holdout: HoldoutConfig
    weights: Sequence[float]
    sequence_length: int
    seed: int
    pack: Callable[[Lengths, int, int], tuple[Ids, Ids]]
    wording: Way
    root: Path = Path()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """What was written of one split: its counts, and the hashes of its distinct problems."""

    counts: dict[str, Any]
    problems: npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Which examples [M] a split holds, in their order, and how often an epoch shows each.

    counts: of its rows, but for what is written of them.
    """

    rows: Ids
    times: npt.NDArray[np.int16]
    problems: npt.NDArray[np.uint64]
    counts: dict[str, Any]


def write_splits(
    folder: Path, split: str, collector: Collector, rules: SplitRules
) -> dict[str, Split]:
    """Write `split`, and "validation" where a part of it is held out, from what was collected."""
    everything, origins = collector.collected()
    parts = _divide(split, everything, origins, collector, rules)
    del origins  # of many rows, this is the memory that packing needs
    _write_findings(
        folder / f"{split}.contamination.jsonl", collector.findings.values(), rules.root
    )
    told = {"tokenized_elsewhere": "tokens" in collector.kinds.values()}
    made = {}
    for name in list(parts):
        part = parts.pop(name)
        written = _write(folder / name, everything, part, rules)
        made[name] = Split(counts={**told, **part.counts, **written}, problems=part.problems)
    everything.file.unlink(missing_ok=True)
    return made


def _divide(
    split: str, everything: Collected, origins: Origins, collector: Collector, rules: SplitRules
) -> dict[str, _Part]:
    """The examples of each split; counts those that are in none."""
    drops = collector.drops
    rows = _chosen(everything, origins, collector, rules)
    _require_examples_of_each(split, origins.sources, collector, rules)
    held = rows[:0]
    if rules.holdout.fraction:
        positions, problems = origins.positions, origins.problems
        out = held_out(
            rules.holdout, positions=positions, problems=problems, num_rows=collector.rows
        )[rows]
        held, rows = rows[out], rows[~out]
        _require_some(len(held), "holdout", collector)
    times = visits(rules.weights, origins.sources, rules.seed)[rows]
    _require_some_of_each(_by_source(origins.sources[rows], times, rules), collector, rules)
    if not times.all():
        drops.add(WEIGHED_OUT, int((times == 0).sum()))
        rows, times = rows[times > 0], times[times > 0]
    _require_some(len(rows), split, collector, held=len(held))
    every = {split: (rows, times)}
    if len(held):
        every["validation"] = (held, np.ones(len(held), np.int16))
    read = _counts_of_rows(collector, rules, len(held))
    return {
        name: _Part(
            rows=rows,
            times=times,
            problems=np.unique(origins.problems[rows]),
            counts=_by_source(origins.sources[rows], times, rules)
            | {"prompts": _prompts(origins, rows, times, collector, rules)}
            | (read if name == split else {}),
        )
        for name, (rows, times) in every.items()
    }


def _by_source(
    sources: npt.NDArray[np.int16], times: npt.NDArray[np.int16], rules: SplitRules
) -> dict[str, Any]:
    """Counts of a split by the source [M] of its examples; its rows, where it was held out."""
    of_each = {"minlength": len(rules.weights)}
    examples = np.bincount(sources, **of_each).tolist()
    shown = np.bincount(sources, times, **of_each).astype(np.int64).tolist()
    return {
        "rows": len(sources),
        "dropped": {},
        "contaminated_problems": 0,
        "source_rows": examples,
        "source_examples": examples,
        "source_visits": shown,
    }


def _prompts(
    origins: Origins,
    rows: Ids,
    times: npt.NDArray[np.int16],
    collector: Collector,
    rules: SplitRules,
) -> dict[str, Any]:
    """What the prompts of `rows` had, each counted as often as an epoch shows it."""

    def of(kind: str) -> npt.NDArray[np.bool_]:
        named = [source for source, its in collector.kinds.items() if its == kind]
        return np.isin(origins.sources[rows], named)

    talks = of("conversations")
    return record(
        problems=int(times[of("problems")].sum()),
        wording=rules.wording,
        systems=origins.systems[rows[talks]],
        times=times[talks],
        texts=collector.system_texts.by_hash(),
        elsewhere=int(times[of("tokens")].sum()),
    )


def _counts_of_rows(collector: Collector, rules: SplitRules, held: int) -> dict[str, Any]:
    """What became of the rows that were read."""
    dropped, findings = collector.drops.counts, collector.findings.values()
    pairs = {
        (each.problem, place(each.benchmark, rules.root).rpartition(":")[0]) for each in findings
    }
    return {
        "rows": collector.rows + dropped.get(BAD, 0),
        "held_out": held,
        "dropped": {reason: dropped[reason] for reason in by_rule(dropped)},
        "contaminated_problems": len({each.problem for each in findings}),
        "contaminated_by": dict(sorted(Counter(file for _, file in pairs).items())),
        "source_rows": [collector.source_rows[i] for i in range(len(rules.weights))],
    }


def _chosen(
    everything: Collected, origins: Origins, collector: Collector, rules: SplitRules
) -> Ids:
    """The examples that are written, in their order."""
    drops = collector.drops
    sampled = row_order(origins.problems, rules.filters)
    drops.add(NOT_SAMPLED, len(origins.problems) - len(sampled))
    rows = distinct_rows(sampled, origins.hashes)

    def where(index: int) -> str:
        return collector.places.where(int(origins.positions[index]))

    def repeats() -> Iterator[Sample]:
        for index in sampled[~np.isin(sampled, rows)].tolist():
            same = rows[(origins.hashes[rows] == origins.hashes[index]).all(axis=1)][0]
            tokens = everything.example(index)[0].tolist()
            yield Sample(where(index), "", same_as=where(same), tokens=tokens)

    drops.add(DUPLICATE, len(sampled) - len(rows), repeats())
    return rows


def _require_some(count: int, split: str, collector: Collector, *, held: int = 0) -> None:
    if count == 0:
        dropped = {**collector.drops.counts, **({"held out": held} if held else {})}
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "empty"
        longer = ", or a longer data.sequence_length" if TOO_LONG in dropped else ""
        raise DataError(
            f"data.{split}: no example is left of {collector.rows} rows ({reasons}); "
            f"give other sources{longer}"
        )


def _require_examples_of_each(
    split: str, sources: npt.NDArray[np.int16], collector: Collector, rules: SplitRules
) -> None:
    """`DataError` for a source without an example, where others have some."""
    made = np.bincount(sources, minlength=len(rules.weights))
    for index in np.flatnonzero(made == 0).tolist() if made.any() else ():
        reasons = ", ".join(by_rule(collector.drops.counts)) or "it holds none"
        raise DataError(
            f"{collector.source_files[index]}: source {index} of data.{split} has no example of "
            f"{collector.source_rows[index]} rows (rows were dropped for: {reasons}). Fix: the "
            "rows or the filters, or take the source out"
        )


def _require_some_of_each(
    counts: Mapping[str, Any], collector: Collector, rules: SplitRules
) -> None:
    """`DataError` for a source that is left out of training by its weight alone."""
    for index, weight in enumerate(rules.weights):
        examples, rows = counts["source_examples"][index], collector.source_rows[index]
        if examples and not counts["source_visits"][index]:
            raise DataError(
                f"{collector.source_files[index]}: source {index} of data.train has {examples} "
                f"examples of {rows} rows, and its weight {weight:g} leaves none of them; give a "
                "larger weight, or take the source out"
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


def _write_findings(file: Path, findings: Iterable[Finding], root: Path) -> None:
    """What training and benchmarks share, in an order that no worker decides."""
    lines = sorted(
        json.dumps({**dataclasses.asdict(found), **_places(found, root)}, ensure_ascii=False) + "\n"
        for found in findings
    )
    if lines:
        file.write_text("".join(lines), encoding="utf-8")


def _places(found: Finding, root: Path) -> dict[str, str]:
    """Both rows without the folders of this machine, which would change the bytes."""
    return {"where": place(found.where, root), "benchmark": place(found.benchmark, root)}


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
