"""Which rows of which Hugging Face tensors each weight of Megatron-core is made of.

Along its first dimension, a weight is a row of segments of Hugging Face tensors: the query, key and
value heads of each group in turn, or the gate above the up projection. A family lists these
segments, and how tensor-parallel ranks split the weight. Loading, exporting, planning and the maker
of random models all read this table.
"""

import math
from dataclasses import dataclass
from typing import Literal

Split = Literal["rows", "columns"]


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of the Hugging Face tensor `name`, each of the shape `row`."""

    name: str
    start: int
    stop: int
    row: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many rows it has."""
        return self.stop - self.start


@dataclass(frozen=True)
class Weight:
    """One weight of Megatron-core: its segments, and what of it tensor-parallel ranks split."""

    segments: tuple[Segment, ...]
    split: Split | None = None

    @property
    def rows(self) -> int:
        """Its first dimension, without the rows that fill a vocabulary up."""
        return sum(segment.size for segment in self.segments)

    @property
    def is_matrix(self) -> bool:
        """Whether it has a second dimension."""
        return bool(self.segments[0].row)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each Hugging Face tensor that its segments, in order, are of."""
        return {segment.name: (segment.stop, *segment.row) for segment in self.segments}

    def share(self, ranks: int) -> int:
        """How many numbers of it one of so many tensor-parallel ranks holds."""
        return self.rows * math.prod(self.segments[0].row) // (ranks if self.split else 1)


Table = dict[str, Weight]
"""Megatron-core's name of each weight -> what it is made of."""


def plain(name: str, rows: int, *row: int, split: Split | None = None) -> Weight:
    """A weight that is the Hugging Face tensor `name`."""
    return Weight((Segment(name, 0, rows, row),), split)
