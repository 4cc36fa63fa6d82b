"""Blocks that were encoded in, in order, and what is kept of them out: repeats and answers known.

    BlockFile, findings -> Collector -> Collected

Tokens stay where they are. In memory are 16 bytes an example, and 16 to know it again.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.data.encode.block import BAD, SAMPLES, Drops, Sample
from mcore_sft.data.encode.block_files import BlockFile
from mcore_sft.data.encode.prompt_record import SystemHashes, SystemTexts
from mcore_sft.data.selection.contamination import Finding
from mcore_sft.data.selection.duplicates import Hashes, Seen, text_hashes

Lengths = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

CONTAMINATED = "in a benchmark"
"""Why an example is dropped whose problem a benchmark asks too."""

DUPLICATE = "duplicate"
"""Why an example is dropped whose problem and solution came before."""

SHOWN = 1024
"""Tokens of an example that is shown."""

_GROWTH = 2**16  # rows that a column grows by


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What is kept of one block: examples `start` to `stop` of all that are kept.

    mend: what to do if the file is damaged; name, source, kind: as `Encoded`, which see; first: how
    many rows were read before.
    """

    file: Path
    mend: str
    name: str
    source: int
    kind: str
    first: int
    start: int
    stop: int
    wanted: npt.NDArray[np.uint8]
    """A bit for each example of the block."""

    @property
    def which(self) -> Ids:
        """Which examples of the block are kept [stop - start]."""
        return np.flatnonzero(np.unpackbits(self.wanted))

    @property
    def block(self) -> BlockFile:
        """The block, read anew."""
        return BlockFile(self.file, mend=self.mend)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of the block, of the examples that are kept."""
        values: npt.NDArray[Any] = self.block.column(name)[self.which]
        return values


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """All examples [N] that are kept, in the order of the sources, and what became of the others.

    compared_as_read: whether repeats were found among rows as they were before the filters;
    lengths, span_counts: tokens and trained runs of each; problems: a hash of each one's problem;
    systems: which system text a conversation has (`prompt_record`), up to the last conversation.
    """

    parts: Sequence[Part]
    compared_as_read: bool
    lengths: Lengths
    span_counts: Lengths
    problems: npt.NDArray[np.uint64]
    systems: SystemHashes
    drops: Drops
    findings: Sequence[Finding]
    rows: int
    source_rows: Counter[int]
    source_files: dict[int, str]
    kinds: dict[int, str]
    system_texts: dict[int, str]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sources(self) -> npt.NDArray[np.int16]:
        """Which source each example is from [N]."""
        counts = [part.stop - part.start for part in self.parts]
        return np.repeat(np.array([part.source for part in self.parts], np.int16), counts)

    @property
    def positions(self) -> Ids:
        """The place of each example's row among all rows that were read [N]."""
        return np.concatenate(
            [np.zeros(0, np.int64), *(part.column("rows") + part.first for part in self.parts)]
        )

    @property
    def hashes(self) -> Hashes:
        """Of problem and solution [N, 2]."""
        hashes = np.empty((len(self), 2), np.uint64)
        for part in self.parts:
            hashes[part.start : part.stop] = part.column("hashes")
        return hashes

    def where(self, index: int) -> str:
        """FILE:NUMBER of an example's row."""
        part = self._part(index)
        return f"{part.name}:{part.column('numbers')[index - part.start]}"

    def example(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Tokens and spans of one example."""
        part = self._part(index)
        return part.block.example(int(part.which[index - part.start]))

    def sample(self, index: int, *, same_as: str = "") -> Sample:
        """An example as it is shown."""
        tokens = self.example(index)[0][:SHOWN].tolist()
        return Sample(self.where(index), "", same_as=same_as, tokens=tokens)

    def _part(self, index: int) -> Part:
        starts = [part.start for part in self.parts]
        return self.parts[int(np.searchsorted(starts, index, side="right")) - 1]


class Collector:
    """Takes encoded blocks in order and leaves out what benchmarks ask, and what came before."""

    def __init__(self, *, deduplicate: bool, remove: bool) -> None:
        """`remove`: whether examples are dropped whose problems a benchmark asks."""
        self.drops = Drops()
        self._remove = remove
        self._findings: dict[tuple[str, str], Finding] = {}
        self._contaminated = np.zeros(0, np.uint64)
        self._rows = 0
        self._source_rows: Counter[int] = Counter()
        self._source_files: dict[int, str] = {}
        self._kinds: dict[int, str] = {}
        self._system_texts = SystemTexts()
        self._repeats: list[_Repeat] = []
        self._num_repeats = 0
        self._seen = Seen() if deduplicate else None
        self._compared_as_read = False
        self._parts: list[Part] = []
        self._columns = {name: _Column(dtype) for name, dtype in _COLUMNS.items()}

    def add(self, block: BlockFile, findings: Sequence[Finding] = ()) -> None:
        """Keep the examples of one block; findings: of the texts that it is the first to have."""
        self.drops.update(block.drops)
        for found in findings:
            self._findings.setdefault((found.problem, found.benchmark_problem), found)
        wanted = np.ones(len(block), np.bool_)
        if self._remove:
            self._drop_contaminated(block, findings, wanted)
        if self._seen is not None:
            self._drop_repeats(block, self._seen, wanted)
        lengths = self._columns["lengths"]
        part = Part(
            file=block.file,
            mend=block.mend,
            name=block.name,
            source=block.source,
            kind=block.kind,
            first=self._rows,
            start=lengths.count,
            stop=lengths.count + int(wanted.sum()),
            wanted=np.packbits(wanted),
        )
        if block.kind == "conversations":
            behind = lengths.count - self._columns["systems"].count
            self._columns["systems"].append(np.zeros(behind, np.uint64))
            self._columns["systems"].append(block.column("systems")[wanted])
        for name in ("lengths", "span_counts", "problems"):
            self._columns[name].append(block.column(name)[wanted])
        self._parts.append(part)
        self._rows += block.rows
        self._system_texts.add(block.system_texts)
        self._kinds[block.source] = block.kind
        self._source_rows[block.source] += block.rows + block.drops.counts.get(BAD, 0)
        self._source_files.setdefault(block.source, block.name)

    def _drop_contaminated(
        self, block: BlockFile, findings: Sequence[Finding], wanted: Mask
    ) -> None:
        self._contaminated = np.union1d(self._contaminated, contaminated(findings))
        if len(self._contaminated):
            counts, hashes = block.column("asked_counts"), block.column("asked_hashes")
            bad = that_ask(counts, hashes, self._contaminated)
            wanted &= ~bad
            self.drops.add(CONTAMINATED, int(bad.sum()), _samples(block, bad))

    def _drop_repeats(self, block: BlockFile, seen: Seen, wanted: Mask) -> None:
        """Keep the examples that did not come before; NeMo-Skills compares rows as they were read.

        What is not wanted anyway is no repeat.
        """
        read = block.column("read_hashes")
        new = np.ones(len(wanted), np.bool_)
        if len(read):
            self._compared_as_read = True
            new = seen.new(read)[block.column("rows")]
        else:
            new[wanted] = seen.new(block.column("hashes")[wanted])
        repeats = np.flatnonzero(wanted & ~new)
        self._num_repeats += len(repeats)
        for index in repeats[: max(0, SAMPLES - len(self._repeats))].tolist():
            tokens, spans = block.example(index)
            where = f"{block.name}:{block.column('numbers')[index]}"
            self._repeats.append(_Repeat(where, block.column("problems")[index], tokens, spans))
        wanted &= new

    def collected(self) -> Collected:
        """Everything that was kept; nothing can be added after it."""
        self._seen = None
        everything = Collected(
            parts=self._parts,
            compared_as_read=self._compared_as_read,
            **{name: column.taken() for name, column in self._columns.items()},
            drops=self.drops,
            findings=list(self._findings.values()),
            rows=self._rows,
            source_rows=self._source_rows,
            source_files=self._source_files,
            kinds=self._kinds,
            system_texts=self._system_texts.by_hash(),
        )
        shown = (_shown(repeat, everything) for repeat in self._repeats)
        self.drops.add(DUPLICATE, self._num_repeats, shown)
        return everything


def contaminated(findings: Iterable[Finding]) -> npt.NDArray[np.uint64]:
    """Hashes of the texts that training must not ask."""
    # A 13-gram alone is often a phrase that everybody uses: it is told of, and stays.
    texts = {found.problem for found in findings if found.kind != "13-gram"}
    return text_hashes(pa.array(sorted(texts), pa.large_string()))[:, 0]


def that_ask(
    counts: npt.NDArray[np.int32], hashes: npt.NDArray[np.uint64], what: npt.NDArray[np.uint64]
) -> Mask:
    """Which examples [M] ask one of `what`; counts and hashes: as `Asked`, which see."""
    owners = np.repeat(np.arange(len(counts)), counts)
    asks = np.zeros(len(counts), np.bool_)
    asks[owners[np.isin(hashes, what)]] = True
    return asks


@dataclasses.dataclass(frozen=True, eq=False)
class _Repeat:
    """An example that came before: where it stands, a hash of its problem, what it says."""

    where: str
    problem: int
    tokens: npt.NDArray[Any]
    spans: npt.NDArray[np.int32]


def _shown(repeat: _Repeat, everything: Collected) -> Sample:
    """A row that came before, and where, unless a filter left its original out."""
    alike = (everything.problems == repeat.problem) & (everything.lengths == len(repeat.tokens))
    same_as = ""
    for index in np.flatnonzero(alike).tolist():
        tokens, spans = everything.example(index)
        if np.array_equal(tokens, repeat.tokens) and np.array_equal(spans, repeat.spans):
            same_as = everything.where(index)
            break
    return Sample(repeat.where, "", same_as=same_as, tokens=repeat.tokens[:SHOWN].tolist())


def _samples(block: BlockFile, which: Mask) -> Iterator[Sample]:
    """Some examples of a block as they are shown, one by one."""
    for index in np.flatnonzero(which).tolist():
        where = f"{block.name}:{block.column('numbers')[index]}"
        yield Sample(where, "", tokens=block.example(index)[0][:SHOWN].tolist())


_COLUMNS: dict[str, type[np.generic]] = {
    "lengths": np.int32,
    "span_counts": np.int32,
    "problems": np.uint64,
    "systems": np.uint64,
}


class _Column:
    """Rows that are appended to one array, which grows in place: pieces leave memory in pieces."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._array: npt.NDArray[Any] = np.zeros(0, dtype)
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
