"""Rows in, what their users ask out: the texts that are compared with benchmarks, each once.

    rows of a block -> Asked -> its file -> one process, which sees all blocks -> texts to compare

Of a text that a process has met before, the file holds a hash alone. The first block of a run that
asks it has its text all the same, whoever encodes which blocks: each process takes them in order.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.data.indexed import ranges, running_sum
from mcore_sft.data.rows import Chats, Pairs
from mcore_sft.data.selection.duplicates import Hashes, text_hashes

_MET = 1 << 20  # texts that a process remembers: 8 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """What users ask in a block. M = its examples, K = texts.

    counts int32 [M] and hashes uint64 [all]: of each text that the user of an example says, example
    by example; texts large_string [K]: all of them, each once; text_hashes uint64 [K, 2];
    text_numbers int64 [K]: the line or row that each stands in first. All empty where nothing is
    compared.
    """

    counts: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    texts: pa.LargeStringArray = field(default_factory=lambda: pa.array([], pa.large_string()))
    text_hashes: Hashes = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    text_numbers: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def new_to(self, met: "Met") -> "Asked":
        """The same, with those of the texts alone that were not met before."""
        new = np.flatnonzero(met.new(self.text_hashes[:, 0]))
        return replace(
            self,
            texts=self.texts.take(pa.array(new)),
            text_hashes=self.text_hashes[new],
            text_numbers=self.text_numbers[new],
        )


class Met:
    """Hashes of texts that came before; of very many, some are forgotten."""

    def __init__(self) -> None:
        self._table = np.zeros(_MET, np.uint64)

    def new(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which of `hashes`, all different, are not known to have come before."""
        odd = hashes | np.uint64(1)  # none is 0, with which the table begins
        at = (hashes >> np.uint64(1)) % np.uint64(_MET)
        new: npt.NDArray[np.bool_] = self._table[at] != odd
        self._table[at] = odd
        return new


def asked(rows: Pairs | Chats, problems: Hashes, made_of: npt.NDArray[np.int64]) -> Asked:
    """What is asked in `rows` [N], and by the examples that are `made_of` [M] these.

    problems [N, 2]: hashes of the problems, where rows have such.
    """
    if isinstance(rows, Pairs):
        texts, hashes = rows.problems, problems
        counts = np.ones(len(rows), np.int32)
    else:
        said = said_by_users(rows)
        texts = pa.array([text for some in said for text in some], pa.large_string())
        hashes = text_hashes(texts)
        counts = np.array([len(some) for some in said], np.int32)
    _, first = np.unique(hashes[:, 0], return_index=True)
    first.sort()
    owners = np.repeat(np.arange(len(rows)), counts)
    return Asked(
        counts=counts[made_of],
        hashes=hashes[ranges(running_sum(counts), made_of), 0],
        texts=texts.take(pa.array(first)),
        text_hashes=hashes[first],
        text_numbers=rows.numbers[owners[first]],
    )


def said_by_users(rows: Chats) -> list[list[str]]:
    """For each conversation every message of its user."""
    return [
        [message["content"] for message in messages if message["role"] == "user"]
        for messages in rows.messages
    ]
