"""A chunk of rows in, its tokens as flat arrays out: the work of one process.

Chunk -> conversations -> filters -> examples -> Encoded
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.config import FilterConfig
from mcore_sft.data.contamination import Contamination, Finding, distinct
from mcore_sft.data.conversation import Chunk, Conversation
from mcore_sft.data.errors import DataError
from mcore_sft.data.filters import Filters, Hashes, Row, row_hashes
from mcore_sft.data.prompt import Dropped, Example, Prompt
from mcore_sft.data.tokenizer import load_tokenizer

TOO_LONG = "longer than the sequence"
"""Why an example is dropped that no pack can hold."""

CONTAMINATED = "in a benchmark"
"""Why an example is dropped whose problem a benchmark asks too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Examples of a chunk, end to end, and what became of its rows.

    tokens int32 [sum of lengths]; lengths int32 [N]; spans int32 [S, 2]; span_counts int32 [N];
    hashes uint64 [N, 2] of problem and solution; problems uint64 [N], a hash of the problem.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    span_counts: npt.NDArray[np.int32]
    hashes: Hashes
    problems: npt.NDArray[np.uint64]
    findings: Sequence[Finding]
    dropped: Mapping[str, int]
    rows: int
    size: int
    gigatoken: bool

    def keep(self, wanted: npt.NDArray[np.bool_], reason: str) -> "Encoded":
        """Only the `wanted` [N] examples; the others are counted under `reason`."""
        lost = int((~wanted).sum())
        return replace(
            self,
            tokens=self.tokens[np.repeat(wanted, self.lengths)],
            lengths=self.lengths[wanted],
            spans=self.spans[np.repeat(wanted, self.span_counts)],
            span_counts=self.span_counts[wanted],
            hashes=self.hashes[wanted],
            problems=self.problems[wanted],
            dropped=Counter(self.dropped) + Counter({reason: lost}),
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a process needs to know to encode a chunk."""

    tokenizer: Path
    gigatoken: bool
    prompt: Mapping[str, Any]
    sequence_length: int
    filters: FilterConfig
    benchmark: Sequence[str]
    """Problems that training must not hold."""
    threshold: float
    """Share of a benchmark problem's 8-grams that makes a training problem the same."""
    remove: bool
    """Whether rows with such problems are dropped, and not only told of."""


class Encoder:
    """Encodes chunks by one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._tokenizer = load_tokenizer(recipe.tokenizer, gigatoken=recipe.gigatoken)
        self._prompt = Prompt.restore(recipe.prompt, self._tokenizer)
        self._longest = recipe.sequence_length
        self._filters = Filters(recipe.filters, self._count_tokens)
        self._benchmark = (
            Contamination(recipe.benchmark, threshold=recipe.threshold)
            if recipe.benchmark
            else None
        )
        self._remove = recipe.remove
        self._checked: set[bytes] = set()
        self._contaminated: set[str] = set()

    def encode(self, chunk: Chunk) -> Encoded:
        """Tokens of all examples that are wanted and that a pack can hold; the rest is counted."""
        dropped: Counter[str] = Counter()
        rows = self._filter(list(chunk.conversations()), dropped)
        findings = self._check(rows)
        if self._remove:
            clean = [row for row in rows if row.problem not in self._contaminated]
            dropped[CONTAMINATED] += len(rows) - len(clean)
            rows = clean
        kept: list[tuple[Row, Example]] = []
        talks = [Conversation.of(row.problem, row.solution) for row in rows]
        for row, made in zip(rows, self._prompt.examples(talks), strict=True):
            if isinstance(made, Dropped):
                dropped[made.reason] += 1
            elif len(made) > self._longest:
                dropped[TOO_LONG] += 1
            else:
                kept.append((row, made))
        problems = [row.problem for row, _ in kept]
        solutions = [row.solution for row, _ in kept]
        examples = [example for _, example in kept]
        nothing = np.zeros(0, dtype=np.int32)
        return Encoded(
            tokens=np.concatenate([nothing, *(example.tokens for example in examples)]),
            lengths=np.array([len(example) for example in examples], dtype=np.int32),
            spans=np.concatenate([nothing.reshape(0, 2), *(example.spans for example in examples)]),
            span_counts=np.array([len(example.spans) for example in examples], dtype=np.int32),
            hashes=row_hashes(problems, solutions),
            problems=row_hashes(problems)[:, 0],
            findings=findings,
            dropped=+dropped,
            rows=len(chunk.rows),
            size=chunk.size,
            gigatoken=self._tokenizer.gigatoken,
        )

    def _filter(self, talks: Sequence[Conversation], dropped: Counter[str]) -> list[Row]:
        rows = []
        for talk in talks:
            problem, solution = (message.content for message in talk.messages)
            rows.append(Row(problem, solution, *(talk.votes or ())))
        filtered = self._filters.apply(rows)
        dropped.update(reason for reason in filtered if isinstance(reason, str))
        return [row for row in filtered if isinstance(row, Row)]

    def _check(self, rows: Sequence[Row]) -> list[Finding]:
        """What the benchmark shares with problems that this process has not seen before."""
        if self._benchmark is None:
            return []
        new = distinct((row.problem for row in rows), self._checked)
        findings = self._benchmark.check(new)
        # A 13-gram alone is often a phrase that everybody uses: it is told of, and stays.
        self._contaminated.update(f.problem for f in findings if f.kind != "13-gram")
        return findings

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer.encode_batch(texts)]


def encode_all(chunks: Iterable[Chunk], recipe: Recipe, *, workers: int) -> Iterator[Encoded]:
    """Encode `chunks` in `workers` processes (1 = this one), in order, few of them in memory."""
    if workers == 1:
        yield from map(Encoder(recipe).encode, chunks)
        return
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start, initargs=(recipe,)
    )
    try:
        waiting: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode, chunk))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenizes was ended from outside, perhaps for want of memory; "
            f"try fewer (data.workers={max(1, workers // 2)})"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # one for each worker process, made when the process starts


def _start(recipe: Recipe) -> None:
    global _encoder
    _encoder = Encoder(recipe)


def _encode(chunk: Chunk) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(chunk)
