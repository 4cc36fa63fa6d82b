"""Rows of a source in columns, the form in which they travel through preprocessing.

    Block.read -> Pairs | Chats | Tokens -> encode -> Encoded

N = rows that can be used. The arrays belong together: entry i of each is row i.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def num_trained(spans: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Trained tokens of each run in `spans` [S, 2]; an example's first is predicted by nothing."""
    counts: npt.NDArray[Any] = spans[:, 1] - np.maximum(spans[:, 0], 1)
    return counts


def text_offsets(texts: pa.LargeStringArray) -> npt.NDArray[np.int64]:
    """Where each of N texts begins in the buffer of characters, and the last ends, [N + 1]."""
    if not len(texts):
        return np.zeros(1, dtype=np.int64)
    offsets = np.frombuffer(texts.buffers()[1], dtype=np.int64)
    return offsets[texts.offset : texts.offset + len(texts) + 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What every kind of rows has.

    name: the file or dataset they are from; numbers int64 [N]: line or row of each there, from 1;
    bad: a sentence for each row that cannot be used, by its number, where the run may skip such.
    """

    name: str
    numbers: npt.NDArray[np.int64]
    bad: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def read(self) -> int:
        """Rows that were read, bad ones included."""
        return len(self.numbers) + len(self.bad)

    def where(self, index: int) -> str:
        """The row as a message names it: FILE:NUMBER."""
        return f"{self.name}:{self.numbers[index]}"

    def text(self, index: int) -> str:
        """What the row says, for messages and reports."""
        return ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs(Rows):
    """Problems and solutions: large_string [N] each, valid UTF-8, without nulls, none blank.

    votes float64 [N, 2]: majority_votes and total_votes, NaN where the row has none; None if no row
    does. answers large_string [N], null where the row has none: the expected answers.
    """

    problems: pa.LargeStringArray
    solutions: pa.LargeStringArray
    votes: npt.NDArray[np.float64] | None = None
    answers: pa.LargeStringArray | None = None

    def text(self, index: int) -> str:
        """Problem and solution."""
        return f"{self.problems[index]}\n\n{self.solutions[index]}"

    def take(self, wanted: npt.NDArray[np.bool_]) -> "Pairs":
        """Only the `wanted` [N] rows."""
        mask = pa.array(wanted)
        return replace(
            self,
            numbers=self.numbers[wanted],
            problems=self.problems.filter(mask),
            solutions=self.solutions.filter(mask),
            votes=None if self.votes is None else self.votes[wanted],
            answers=None if self.answers is None else self.answers.filter(mask),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Chats(Rows):
    """Whole conversations: for each row its messages (role, content, ...) and perhaps its tools."""

    messages: Sequence[Sequence[Mapping[str, Any]]]
    tools: Sequence[Sequence[Mapping[str, Any]] | None] | None = None

    def text(self, index: int) -> str:
        """Its messages, a line each."""
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in self.messages[index])

    def take(self, wanted: npt.NDArray[np.bool_]) -> "Chats":
        """Only the `wanted` [N] rows."""
        which = np.flatnonzero(wanted).tolist()
        return replace(
            self,
            numbers=self.numbers[wanted],
            messages=[self.messages[i] for i in which],
            tools=None if self.tools is None else [self.tools[i] for i in which],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens(Rows):
    """Examples that others have tokenized: as `Examples`, which see."""

    examples: "Examples"


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Examples end to end. M = examples, T = their tokens, S = their trained runs.

    tokens int32 [T]; lengths int32 [M]; spans int32 [S, 2] of start and end within the example, in
    order, not empty; span_counts int32 [M]; rows int64 [M], ascending: which row each was made of.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    span_counts: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    def keep(self, wanted: npt.NDArray[np.bool_]) -> "Examples":
        """Only the `wanted` [M] examples."""
        if wanted.all():
            return self
        return Examples(
            tokens=self.tokens[np.repeat(wanted, self.lengths)],
            lengths=self.lengths[wanted],
            spans=self.spans[np.repeat(wanted, self.span_counts)],
            span_counts=self.span_counts[wanted],
            rows=self.rows[wanted],
        )
