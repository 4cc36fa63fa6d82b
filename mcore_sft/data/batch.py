"""Packs in, a batch out: examples laid in one row, with what the loss and the attention need.

    packs -> Batch (tokens, labels, positions, starts, rows)

T = tokens of the row, N = documents in it (padding is one too), R = rows that have a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcore_sft.data.pack import Pack

IGNORE = -100
"""Label of a row that predicts nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What the model eats: one row of T tokens, its documents side by side.

    tokens int64 [1, T]; labels int64 [1, T], the next token of the same document or IGNORE;
    positions int64 [1, T], from 0 in each document; starts int32 [N + 1], where documents begin
    (cu_seqlens), padding included; rows int64 [R], in order, of the rows that have a label, always
    on the CPU;
    longest = tokens of the longest document; useful = tokens that are not padding;
    examples = documents that are not padding.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    starts: Tensor
    rows: Tensor
    longest: int
    useful: int
    examples: int

    @property
    def length(self) -> int:
        """T, the tokens of the row."""
        return self.tokens.shape[1]

    @property
    def supervised(self) -> int:
        """R, the rows that have a label: what the loss is divided by."""
        return self.rows.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`, but for `rows`: the host lays out the loss by them."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            starts=self.starts.to(device, non_blocking=True),
            rows=self.rows,
            longest=self.longest,
            useful=self.useful,
            examples=self.examples,
        )


def collate(packs: Sequence[Pack], length: int, *, pad_id: int) -> Batch:
    """Join packs in one row, each filled up to `length` tokens by a document without labels."""
    tokens = np.full((len(packs), length), pad_id, dtype=np.int64)
    labels = np.full((len(packs), length), IGNORE, dtype=np.int64)
    positions = np.zeros((len(packs), length), dtype=np.int64)
    starts: list[int] = []
    for number, pack in enumerate(packs):
        assert pack.tokens <= length, f"a pack of {pack.tokens} tokens in a row of {length}"
        lengths = [len(example) for example in pack.examples]
        if pack.tokens < length:
            lengths.append(length - pack.tokens)
        begins = np.cumsum([0, *lengths[:-1]])
        starts.extend((begins + number * length).tolist())
        positions[number] = np.arange(length) - np.repeat(begins, lengths)
        for begin, example in zip(begins.tolist(), pack.examples, strict=False):
            tokens[number, begin : begin + len(example)] = example.tokens
            _label(labels[number, begin : begin + len(example)], example.tokens, example.spans)
    ends = np.array([*starts, len(packs) * length], dtype=np.int32)
    return Batch(
        tokens=torch.from_numpy(tokens.reshape(1, -1)),
        labels=torch.from_numpy(labels.reshape(1, -1)),
        positions=torch.from_numpy(positions.reshape(1, -1)),
        starts=torch.from_numpy(ends),
        rows=torch.from_numpy(np.flatnonzero(labels != IGNORE).astype(np.int64)),
        longest=int(np.diff(ends).max()),
        useful=sum(pack.tokens for pack in packs),
        examples=sum(len(pack.examples) for pack in packs),
    )


def _label(
    labels: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32], spans: npt.NDArray[np.int32]
) -> None:
    """Write into the rows of one example: the token at p is predicted by the row before it."""
    for start, end in spans.tolist():
        first = max(start, 1)
        labels[first - 1 : end - 1] = tokens[first:end]
