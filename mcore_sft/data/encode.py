"""A chunk of rows in, its tokens as flat arrays out: the work of one process.

Chunk -> conversations -> examples -> Encoded
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data.conversation import Chunk
from mcore_sft.data.errors import DataError
from mcore_sft.data.prompt import Dropped, Example, Prompt
from mcore_sft.data.tokenizer import load_tokenizer

TOO_LONG = "longer than the sequence"
"""Why an example is dropped that no pack can hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Examples of a chunk, end to end, and what became of its rows.

    tokens int32 [sum of lengths]; lengths int32 [N]; spans int32 [S, 2]; span_counts int32 [N].
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    span_counts: npt.NDArray[np.int32]
    dropped: Mapping[str, int]
    rows: int
    size: int
    gigatoken: bool


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a process needs to know to encode a chunk."""

    tokenizer: Path
    gigatoken: bool
    prompt: Mapping[str, Any]
    sequence_length: int


class Encoder:
    """Encodes chunks by one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._tokenizer = load_tokenizer(recipe.tokenizer, gigatoken=recipe.gigatoken)
        self._prompt = Prompt.restore(recipe.prompt, self._tokenizer)
        self._longest = recipe.sequence_length

    def encode(self, chunk: Chunk) -> Encoded:
        """Tokens of all examples that a pack can hold; the others are counted."""
        kept: list[Example] = []
        dropped: Counter[str] = Counter()
        for made in self._prompt.examples(list(chunk.conversations())):
            if isinstance(made, Dropped):
                dropped[made.reason] += 1
            elif len(made) > self._longest:
                dropped[TOO_LONG] += 1
            else:
                kept.append(made)
        nothing = np.zeros(0, dtype=np.int32)
        return Encoded(
            tokens=np.concatenate([nothing, *(example.tokens for example in kept)]),
            lengths=np.array([len(example) for example in kept], dtype=np.int32),
            spans=np.concatenate([nothing.reshape(0, 2), *(example.spans for example in kept)]),
            span_counts=np.array([len(example.spans) for example in kept], dtype=np.int32),
            dropped=dropped,
            rows=len(chunk.rows),
            size=chunk.size,
            gigatoken=self._tokenizer.gigatoken,
        )


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
