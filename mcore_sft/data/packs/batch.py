"""Packs in, a batch out: examples laid in one row, with what the loss and the attention need.

    packs -> Batch (tokens, labels, positions, starts, rows)

T = tokens of the row on this rank, N = documents in it (padding is one too), R = rows of this rank
that have a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcore_sft.data.packs.pack import Pack

IGNORE = -100
"""Label of a row that predicts nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What the model eats: one row of T tokens, its documents side by side.

    tokens int64 [1, T]; labels int64 [1, T], the next token of the same document or IGNORE;
    positions int64 [1, T], from 0 in each document; starts int32 [N + 1], where documents begin
    (cu_seqlens) in the row of all context-parallel ranks, padding included; rows int64 [R], in
    order, of the rows that have a label, always on the CPU;
    longest = tokens of the longest document, whole; useful = tokens that are not padding;
    squares = sum of length^2 over the documents that are not padding, whole;
    examples = documents that are not padding and begin on this rank.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    starts: Tensor
    rows: Tensor
    longest: int
    useful: int
    squares: int
    examples: int

    @property
    def length(self) -> int:
        """T, the tokens of the row on this rank."""
        return self.tokens.shape[1]

    @property
    def supervised(self) -> int:
        """R, the rows that have a label: what the loss is divided by."""
        return self.rows.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`, but for `rows`: the host lays out the loss by them.

        What a GPU is sent is pinned: only then does the host go on meanwhile.
        """
        to_gpu = torch.device(device).type == "cuda"

        def pinned(x: Tensor) -> Tensor:
            return x.pin_memory() if to_gpu else x

        return Batch(
            tokens=pinned(self.tokens).to(device, non_blocking=True),
            labels=pinned(self.labels).to(device, non_blocking=True),
            positions=pinned(self.positions).to(device, non_blocking=True),
            starts=pinned(self.starts).to(device, non_blocking=True),
            rows=pinned(self.rows),
            longest=self.longest,
            useful=self.useful,
            squares=self.squares,
            examples=self.examples,
        )


def document_unit(context: int) -> int:
    """What the length of each document is a multiple of, so that `context` ranks can share it."""
    return 2 * context if context > 1 else 1


def collate(
    packs: Sequence[Pack], length: int, *, pad_id: int, context: int = 1, rank: int = 0
) -> Batch:
    """Join packs in one row, each filled up to `length` tokens by a document without labels.

    With several `context` ranks, each document is filled up to 2 * context parts of one length, of
    which each rank has one from the front and its mirror from the back: under a causal mask all
    ranks then have the same work (Llama 3, arXiv 2407.21783, section 3.3.2).
    """
    unit = document_unit(context)
    tokens = np.full((len(packs), length), pad_id, dtype=np.int64)
    labels = np.full((len(packs), length), IGNORE, dtype=np.int64)
    positions = np.zeros((len(packs), length), dtype=np.int64)
    starts: list[int] = []
    real = np.zeros((len(packs), length), dtype=bool)
    for number, pack in enumerate(packs):
        lengths = [-(-len(example) // unit) * unit for example in pack.examples]
        rest = length - sum(lengths)
        assert rest >= 0, f"a pack of {sum(lengths)} tokens in a row of {length}"
        if rest:
            lengths.append(rest)
        begins = np.cumsum([0, *lengths[:-1]])
        starts.extend((begins + number * length).tolist())
        positions[number] = np.arange(length) - np.repeat(begins, lengths)
        for begin, example in zip(begins.tolist(), pack.examples, strict=False):
            tokens[number, begin : begin + len(example)] = example.tokens
            real[number, begin : begin + len(example)] = True
            _label(labels[number, begin : begin + len(example)], example.tokens, example.spans)
    ends = np.array([*starts, len(packs) * length], dtype=np.int32)
    own = slice(None) if context == 1 else _share(ends, context, rank)
    tokens, labels, positions = (x.reshape(-1)[own] for x in (tokens, labels, positions))
    return Batch(
        tokens=torch.from_numpy(tokens[None]),
        labels=torch.from_numpy(labels[None]),
        positions=torch.from_numpy(positions[None]),
        starts=torch.from_numpy(ends),
        rows=torch.from_numpy(np.flatnonzero(labels != IGNORE).astype(np.int64)),
        longest=int(np.diff(ends).max()),
        useful=int(real.reshape(-1)[own].sum()),
        squares=sum(len(example) ** 2 for pack in packs for example in pack.examples),
        examples=sum(len(pack.examples) for pack in packs) if rank == 0 else 0,
    )


def _share(ends: npt.NDArray[np.int32], context: int, rank: int) -> npt.NDArray[np.int64]:
    """The places in the row that this context-parallel rank has, document by document."""
    part = np.diff(ends) // (2 * context)
    begins = np.stack((ends[:-1] + rank * part, ends[1:] - (rank + 1) * part), axis=1).reshape(-1)
    sizes = np.repeat(part, 2)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places: npt.NDArray[np.int64] = np.repeat(begins, sizes) + within
    return places


def _label(
    labels: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32], spans: npt.NDArray[np.int32]
) -> None:
    """Write into the rows of one example: the token at p is predicted by the row before it."""
    for start, end in spans.tolist():
        first = max(start, 1)
        labels[first - 1 : end - 1] = tokens[first:end]
