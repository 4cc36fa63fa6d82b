"""Examples as they were encoded in, the files of the splits out, in two passes.

    blocks -> scattered over one file for each stretch of the output -> each stretch put in order

A stretch is ordered in memory, so that everything is read and written end to end, twice, whatever
the order and however little of it memory holds. Examples that come in the order of the sources are
written to their place at once.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data.encode.collect import Collected, Ids, Lengths, Part
from mcore_sft.data.indexed import ranges, running_sum
from mcore_sft.data.workers import Workers

STRETCH = 32 << 20
"""Bytes of the tokens of a stretch, which are ordered in memory; of very many, more."""

SPAN_BYTES = 8
"""Bytes of a trained run: two int32."""

_MOST = 1024  # stretches
_TOGETHER = 48 << 20  # bytes of tokens that are scattered together
_NOWHERE = 2**32 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """Files for the examples `rows` [M], in this order.

    tokens: a new file; spans: a file whose values begin at byte `begin`, or None.
    """

    rows: Ids
    tokens: Path
    spans: Path | None = None
    begin: int = 0

    @cached_property
    def is_in_order(self) -> bool:
        """Whether the examples come as in the sources."""
        return bool((self.rows[:-1] < self.rows[1:]).all())

    @property
    def passes(self) -> int:
        """How often its tokens are written."""
        return 1 if self.is_in_order else 2


@dataclass(frozen=True, kw_only=True, eq=False)
class _Place:
    """Where tokens and spans are written: files, and bytes in them."""

    tokens: Path
    tokens_at: int
    spans: Path | None
    spans_at: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stretch:
    """Examples that follow each other in an output, the place of the first, and bytes of all.

    scratch: a file where they wait to be ordered; None where they come in order.
    """

    rows: Ids
    place: _Place
    tokens: int
    spans: int
    scratch: Path | None

    @property
    def first_place(self) -> _Place:
        """Where they go in the first pass."""
        file = self.scratch
        if file is None:
            return self.place
        return _Place(tokens=file, tokens_at=0, spans=file, spans_at=self.tokens)


def gather(
    everything: Collected,
    outputs: Sequence[Output],
    *,
    token_bytes: int,
    scratch: Path,
    workers: Workers,
    advance: Callable[[int], None],
) -> dict[Path, str]:
    """Write `outputs`; returns the SHA-256 of the tokens of each, which are hashed on the way.

    scratch: a folder for what waits to be ordered, as much as all tokens; advance: counts the bytes
    of tokens, in each of the passes that there are.
    """
    total = token_bytes * int(everything.lengths.sum(dtype=np.int64))
    most = max(STRETCH, total // _MOST)
    stretches = [
        stretch
        for number, output in enumerate(outputs)
        for stretch in _cut(everything, output, token_bytes, most, scratch / f"{number}")
    ]
    sums = {output.tokens: _Sum(output.tokens) for output in outputs}
    scattering = _Scattering(everything, stretches, token_bytes)
    for done, size in enumerate(workers.each(_scatter, scattering.tasks())):
        for file, end in scattering.ends[done].items():
            sums[file].go_on(end)
        advance(size)
    unordered = [stretch for stretch in stretches if stretch.scratch is not None]
    tasks = (_to_order(stretch, everything, token_bytes) for stretch in unordered)
    for stretch, _ in zip(unordered, workers.each(_order, tasks), strict=True):
        sums[stretch.place.tokens].go_on(stretch.place.tokens_at + stretch.tokens)
        advance(stretch.tokens)
    return {file: each.hexdigest() for file, each in sums.items()}


def _cut(
    everything: Collected, output: Output, token_bytes: int, size: int, scratch: Path
) -> Iterator[_Stretch]:
    """The stretches of an output, of `size` bytes; one, where its examples come in order."""
    rows = output.rows
    tokens = running_sum(everything.lengths[rows])
    tokens *= token_bytes
    cuts = np.array([0, len(rows)])
    if not output.is_in_order:
        starts = np.arange(0, int(tokens[-1]), size)
        cuts = np.unique([*np.searchsorted(tokens, starts).tolist(), len(rows)])
    spans_at = output.begin
    for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        some = rows[first:last]
        spans = SPAN_BYTES * int(everything.span_counts[some].sum(dtype=np.int64))
        yield _Stretch(
            rows=some,
            place=_Place(
                tokens=output.tokens,
                tokens_at=int(tokens[first]),
                spans=output.spans,
                spans_at=spans_at,
            ),
            tokens=int(tokens[last] - tokens[first]),
            spans=spans,
            scratch=None
            if output.is_in_order
            else scratch.with_name(f"{scratch.name}-{first}.stretch"),
        )
        spans_at += spans


class _Scattering:
    """The tasks of the first pass, a few blocks each, and how far each of them writes."""

    def __init__(
        self, everything: Collected, stretches: Sequence[_Stretch], token_bytes: int
    ) -> None:
        self.ends: list[dict[Path, int]] = []
        """For each task: up to which byte it writes the outputs that it writes in order."""
        self._everything = everything
        self._token_bytes = token_bytes
        self._places = [stretch.first_place for stretch in stretches]
        self._in_order = [n for n, stretch in enumerate(stretches) if stretch.scratch is None]
        self._firsts = running_sum(np.array([len(stretch.rows) for stretch in stretches]))[:-1]
        self._ranks = np.full(len(everything), _NOWHERE, np.uint32)
        for first, stretch in zip(self._firsts.tolist(), stretches, strict=True):
            self._ranks[stretch.rows] = np.arange(first, first + len(stretch.rows))

    def tasks(self) -> Iterator[tuple[Any, ...]]:
        """Arguments of `_scatter`."""
        lengths, span_counts = self._everything.lengths, self._everything.span_counts
        at = np.array([(place.tokens_at, place.spans_at) for place in self._places])
        for parts in self._together():
            some = slice(parts[0].start, parts[-1].stop)
            ranks = self._ranks[some]
            begin = at.copy()
            there = ranks != _NOWHERE
            stretch = np.searchsorted(self._firsts, ranks[there], side="right") - 1
            for column, counts in enumerate((lengths, span_counts)):
                unit = (self._token_bytes, SPAN_BYTES)[column]
                sums = np.bincount(stretch, counts[some][there], minlength=len(at))
                at[:, column] += unit * sums.astype(np.int64)
            self.ends.append({self._places[n].tokens: int(at[n, 0]) for n in self._in_order})
            yield parts, ranks, self._firsts, self._places, begin, self._token_bytes

    def _together(self) -> Iterator[list[Part]]:
        parts: list[Part] = []
        size = 0
        for part in self._everything.parts:
            lengths = self._everything.lengths[part.start : part.stop]
            own = self._token_bytes * int(lengths.sum(dtype=np.int64))
            if parts and size + own > _TOGETHER:
                yield parts
                parts, size = [], 0
            parts.append(part)
            size += own
        if parts:
            yield parts


def _scatter(
    _: None,
    parts: Sequence[Part],
    ranks: npt.NDArray[np.uint32],
    firsts: Ids,
    places: Sequence[_Place],
    at: Ids,
    token_bytes: int,
) -> int:
    """Write the kept examples of some blocks, whose `ranks` [N] among all these are.

    firsts [S]: the rank with which each stretch begins; places [S] and at [S, 2]: the files of each
    stretch, and the byte of each that its tokens and spans are written from. Returns the bytes of
    tokens. A file is written by one process at a time in no order, but each to its own bytes.
    """
    there = np.flatnonzero(ranks != _NOWHERE)
    stretch = np.searchsorted(firsts, ranks[there], side="right") - 1
    order = there[np.argsort(stretch, kind="stable")]
    cuts = running_sum(np.bincount(stretch, minlength=len(places))).tolist()
    pieces: list[memoryview] = []
    span_counts, spans = [], []
    for part in parts:
        block, which = part.block, part.which
        pieces += _pieces(block.column("tokens"), block.column("lengths"), which)
        counts = block.column("span_counts")
        spans.append(block.column("spans")[ranges(running_sum(counts), which)])
        span_counts.append(counts[which])
    together, offsets = np.concatenate(spans), running_sum(np.concatenate(span_counts))
    written = 0
    for number, place in enumerate(places):
        some = order[cuts[number] : cuts[number + 1]]
        if not len(some):
            continue
        tokens = b"".join([pieces[index] for index in some.tolist()])
        _write(place.tokens, tokens, int(at[number, 0]))
        if place.spans is not None:
            _write(place.spans, together[ranges(offsets, some)].tobytes(), int(at[number, 1]))
        written += len(tokens)
    return written


def _to_order(stretch: _Stretch, everything: Collected, token_bytes: int) -> tuple[Any, ...]:
    """Arguments of `_order`."""
    rows = stretch.rows
    of_each = everything.lengths[rows], everything.span_counts[rows]
    return stretch.scratch, stretch.place, rows, *of_each, token_bytes


def _order(
    _: None,
    scratch: Path,
    place: _Place,
    rows: Ids,
    lengths: Lengths,
    span_counts: Lengths,
    token_bytes: int,
) -> None:
    """Write a stretch whose examples are in `scratch` in ascending order of `rows` [M]."""
    at = np.argsort(rows)  # of the examples as they lie in the file
    back = np.empty_like(at)
    back[at] = np.arange(len(at))
    size = token_bytes * int(lengths.sum(dtype=np.int64))
    tokens = np.fromfile(scratch, np.uint8, size).view(f"u{token_bytes}")
    _write(place.tokens, b"".join(_pieces(tokens, lengths[at], back)), place.tokens_at)
    if place.spans is not None:
        spans = np.fromfile(scratch, np.int32, offset=size).reshape(-1, 2)
        offsets = running_sum(span_counts[at])
        _write(place.spans, spans[ranges(offsets, back)].tobytes(), place.spans_at)
    scratch.unlink()


def _pieces(tokens: npt.NDArray[Any], lengths: Lengths, which: Ids) -> list[memoryview]:
    """The bytes of some of the examples that lie end to end in `tokens`."""
    offsets = running_sum(lengths) * tokens.itemsize
    data = tokens.view(np.uint8).data
    ends = zip(offsets[which].tolist(), offsets[which + 1].tolist(), strict=True)
    return [data[start:end] for start, end in ends]


def _write(file: Path, data: bytes, at: int) -> None:
    """Write to a file that others write other bytes of."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        left = memoryview(data)
        while left:
            count = os.pwrite(handle, left, at)
            left, at = left[count:], at + count
    finally:
        os.close(handle)


class _Sum:
    """The SHA-256 of a file that grows."""

    def __init__(self, file: Path) -> None:
        file.touch()
        self._file = file
        self._digest = hashlib.sha256()
        self._done = 0

    def go_on(self, end: int) -> None:
        """Take in what lies before byte `end`."""
        with self._file.open("rb") as opened:
            opened.seek(self._done)
            while self._done < end:
                piece = opened.read(min(1 << 20, end - self._done))
                if not piece:
                    raise OSError(f"{self._done} bytes, expected {end}")
                self._digest.update(piece)
                self._done += len(piece)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
