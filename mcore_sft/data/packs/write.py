"""The examples of a split in, its files out: those that fit a sequence, and their packs.

    Output -> gather -> SPLIT.bin, SPLIT.spans.npy (`dataset`)    SPLIT.long.*: those that fit not
    lengths, origins -> pack_split -> SPLIT.packs.npy, .pack_offsets.npy, .supervised.npy, counts

All that `pack_split` decides follows from files of the dataset, which can be packed again by it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data.encode.block import SAMPLES, excerpt
from mcore_sft.data.encode.collect import SHOWN, Collected, Ids, Lengths, Mask
from mcore_sft.data.encode.prompt_record import Way, record
from mcore_sft.data.indexed import IndexedTokens, begin_array, running_sum, write_index
from mcore_sft.data.packs import origins
from mcore_sft.data.packs.gather import Output
from mcore_sft.data.packs.origins import Origins
from mcore_sft.data.packs.row_names import Shown
from mcore_sft.data.packs.split import TOO_LONG, by_rule
from mcore_sft.data.rows import num_trained

Pack = Callable[[Lengths, int, int], tuple[Ids, Ids]]
"""Lengths, capacity, seed -> order, offsets (`ops.packing`)."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How splits are packed. wording: how problems are asked; decode: token ids -> text."""

    sequence_length: int
    seed: int
    pack: Pack
    wording: Way
    decode: Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """What became of a split: its counts, some of the rows that were dropped for each reason, and
    the hashes of its distinct problems.
    """

    counts: dict[str, Any]
    dropped: Mapping[str, Sequence[Shown]]
    problems: npt.NDArray[np.uint64]


def long_prefix(prefix: Path) -> Path:
    """What the names of files begin with that hold the examples too long for a sequence."""
    return Path(f"{prefix}.long")


def outputs(
    prefix: Path, everything: Collected, rows: Ids, sequence_length: int, dtype: np.dtype[Any]
) -> list[Output]:
    """What `gather` is to write for the examples `rows`; all but that is written here."""
    fits = everything.lengths[rows] <= sequence_length
    made = [_output(prefix, everything, rows[fits], dtype)]
    if not fits.all():
        made.append(_output(long_prefix(prefix), everything, rows[~fits], dtype))
    return made


def _output(prefix: Path, everything: Collected, rows: Ids, dtype: np.dtype[Any]) -> Output:
    spans = Path(f"{prefix}.spans.npy")
    counts = everything.span_counts[rows]
    begin = begin_examples(prefix, everything.lengths[rows], counts, dtype)
    return Output(rows=rows, tokens=Path(f"{prefix}.bin"), spans=spans, begin=begin)


def begin_examples(
    prefix: Path, lengths: Lengths, span_counts: npt.NDArray[Any], dtype: np.dtype[Any]
) -> int:
    """Write all that examples have but tokens and spans.

    Returns the byte of `PREFIX.spans.npy` from which on its values are to be written.
    """
    write_index(Path(f"{prefix}.idx"), lengths, dtype)
    offsets = running_sum(span_counts)
    np.save(f"{prefix}.span_offsets.npy", offsets, allow_pickle=False)
    shape = (int(offsets[-1]), 2)
    return begin_array(Path(f"{prefix}.spans.npy"), np.dtype(np.int32), shape)


def pack_split(prefix: Path, packing: Packing) -> Packed:
    """Pack the examples of a split, all of whose other files are there."""
    its = origins.read(prefix)
    assert its is not None, f"{prefix}: it has just been written"
    fits = its.rows["tokens"] <= packing.sequence_length
    lengths = np.array(IndexedTokens(prefix).lengths, np.int32)
    times = its.rows["times"][fits]
    shown = None if (times == 1).all() else np.repeat(np.arange(len(lengths)), times)
    in_packs = lengths if shown is None else lengths[shown]
    order, pack_offsets = packing.pack(in_packs, packing.sequence_length, packing.seed)
    order = order if shown is None else shown[order]
    supervised = np.add.reduceat(_trained(prefix)[order], pack_offsets[:-1], dtype=np.int32)
    arrays = {"packs": order, "pack_offsets": pack_offsets, "supervised": supervised}
    for name, array in arrays.items():
        np.save(f"{prefix}.{name}.npy", array, allow_pickle=False)
    tokens, packs = int(in_packs.sum(dtype=np.int64)), len(supervised)
    dropped = dict(its.dropped)
    if not fits.all():
        dropped[TOO_LONG] = _long_ones(prefix, its, fits, packing)
    counts = _counts(its, fits, times, packing.wording) | {
        "examples": len(lengths),
        "visits": len(order),
        "tokens": tokens,
        "supervised_tokens": int(supervised.sum(dtype=np.int64)),
        "longest": int(lengths.max()),
        "packs": packs,
        "packing_efficiency": round(tokens / (packs * packing.sequence_length), 6),
        "examples_per_pack": round(len(order) / packs, 6),
    }
    return Packed(counts=counts, dropped=dropped, problems=np.unique(its.rows["problem"][fits]))


def _trained(prefix: Path) -> Lengths:
    """How many tokens of each example are trained; every example has a span."""
    spans = np.load(f"{prefix}.spans.npy", mmap_mode="r", allow_pickle=False)
    offsets = np.load(f"{prefix}.span_offsets.npy", mmap_mode="r", allow_pickle=False)
    made: Lengths = np.add.reduceat(num_trained(spans), offsets[:-1], dtype=np.int32)
    return made


def _counts(its: Origins, fits: Mask, times: npt.NDArray[np.int16], wording: Way) -> dict[str, Any]:
    """What became of the rows that were read, and what the prompts had of those that fit [M]."""
    counts = dict(its.counts)
    sources = its.rows["source"][fits]
    of_each = {"minlength": len(counts["source_rows"])}
    dropped = {**counts["dropped"], TOO_LONG: int((~fits).sum())}
    counts["dropped"] = {reason: dropped[reason] for reason in by_rule(dropped) if dropped[reason]}
    counts["source_examples"] = np.bincount(sources, **of_each).tolist()
    counts["source_visits"] = np.bincount(sources, times, **of_each).astype(np.int64).tolist()

    def of(kind: str) -> Mask:
        return np.isin(
            sources, [source for source, its_own in its.kinds.items() if its_own == kind]
        )

    talks = of("conversations")
    counts["prompts"] = record(
        problems=int(times[of("problems")].sum()),
        wording=wording,
        systems=its.systems[fits][talks] if talks.any() else its.systems[:0],
        times=times[talks],
        texts=its.texts,
        elsewhere=int(times[of("tokens")].sum()),
    )
    return counts


def _long_ones(prefix: Path, its: Origins, fits: Mask, packing: Packing) -> list[Shown]:
    """The first few examples that do not fit, in the order of the sources."""
    long = np.flatnonzero(~fits)
    rows = its.rows[long]
    first = np.lexsort((rows["number"], rows["file"], rows["source"]))[:SAMPLES]
    tokens = IndexedTokens(long_prefix(prefix)).take(first)
    return [
        {"where": its.where(int(index)), "text": excerpt(packing.decode(some[:SHOWN].tolist()))}
        for index, some in zip(long[first], tokens, strict=True)
    ]


def packing_operator() -> Pack:
    """`best_fit_pack` on arrays; an error says how to build it where it is not."""
    # Imported here, because the processes that tokenize need no torch.
    import torch

    from mcore_sft.ops.packing import best_fit_pack

    def pack(lengths: Lengths, capacity: int, seed: int) -> tuple[Ids, Ids]:
        order, offsets = best_fit_pack(torch.from_numpy(lengths), capacity, seed)
        return order.numpy(), offsets.numpy()

    return pack
