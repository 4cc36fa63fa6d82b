"""All rows of a split in, which of them are written, where and in what order out.

hash of each row's problem -> order, held out or not;    weights of sources -> visits

One process sees all rows; what it decides depends on nothing but them and the seeds. N = rows, M =
rows kept.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mcore_sft.config import FilterConfig, HoldoutConfig
from mcore_sft.data.selection.duplicates import Hashes, Seen
from mcore_sft.data.selection.shuffle import shuffle

Ids = npt.NDArray[np.int64] | npt.NDArray[np.uint64]
Order = npt.NDArray[np.int64]

_AT_ONCE = 1 << 16  # rows compared at a time


def row_order(problems: Ids, config: FilterConfig) -> Order:
    """Rows that are written [M], in their order, of rows whose `problems` are these [N].

    NeMo-Skills groups the rows by problem, in the order of first appearance, and shuffles them with
    Python's own generator. Its `fair` keeps no row at all where num_output_samples is exactly N;
    ours keeps all.
    """
    c, num_samples = config, config.num_output_samples or len(problems)
    if not len(problems) or (c.order == "source" and num_samples >= len(problems)):
        return np.arange(len(problems))
    order = _grouped(problems)
    if c.downsampling_method == "fair" and num_samples < len(problems):
        order = order[_by_turns(problems[order])[:num_samples]]
    shuffle(order, c.random_seed)
    order = order[:num_samples]
    return np.sort(order) if c.order == "source" else order


def distinct_rows(order: Order, hashes: Hashes) -> Order:
    """Of `order` [M] the first of the rows alike in `hashes` [N, 2].

    NeMo-Skills compares once more when it writes what it has shuffled and sampled.
    """
    seen, new = Seen(), np.empty(len(order), np.bool_)
    for first in range(0, len(order), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        new[some] = seen.new(hashes[order[some]])
    return order[new]


def _grouped(problems: Ids) -> Order:
    """Rows of the first problem, of the second to appear, and so on; in source order in each."""
    count = len(problems)
    by_id = np.argsort(problems)  # not stable: the row itself is part of the key below
    starts = _starts(problems[by_id])
    first_row = np.empty(count, np.uint32)
    firsts = np.minimum.reduceat(by_id, starts).astype(np.uint32)
    first_row[by_id] = np.repeat(firsts, np.diff(starts, append=count))
    del by_id, starts, firsts  # of many rows, one such array is enough at a time
    keys = first_row.astype(np.int64)
    del first_row
    keys <<= 32
    keys |= np.arange(count, dtype=np.uint32)
    keys.sort()
    keys &= 2**32 - 1
    return keys


def _by_turns(grouped: Ids) -> Order:
    """Places in `grouped` by turns: the first row of each group, then the second, and so on."""
    starts = _starts(grouped)
    turn = np.arange(len(grouped)) - np.repeat(starts, np.diff(starts, append=len(grouped)))
    return np.argsort(turn, kind="stable")


def _starts(ids: Ids) -> Order:
    """Where each run of equal ids begins."""
    return np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])


def held_out(
    config: HoldoutConfig, *, positions: Ids, problems: Ids, num_rows: int
) -> npt.NDArray[np.bool_]:
    """Which rows [N] are kept for validation.

    positions [N]: where each stood among the `num_rows` rows that were read. By row, this is what
    `datasets.Dataset.train_test_split(test_size=fraction, seed=seed)` puts into `test`; by problem,
    those of which a hash lies in the first `fraction` of all hashes.
    """
    if config.by == "problem":
        draws = _scrambled(problems.astype(np.uint64), config.seed)
        return draws < np.uint64(config.fraction * 2**64)
    shuffled = np.random.default_rng(config.seed).permutation(num_rows)
    chosen = np.zeros(num_rows, dtype=np.bool_)
    chosen[shuffled[: math.ceil(config.fraction * num_rows)]] = True
    return chosen[positions]


def visits(
    weights: Sequence[float], sources: npt.NDArray[np.int16], seed: int
) -> npt.NDArray[np.int16]:
    """How often an epoch shows each row [N], by the weight of the source it is from.

    A weight of 2.25 is twice for each row and once more for a random quarter of them.
    """
    counts = np.array([int(weight) for weight in weights], dtype=np.int16)[sources]
    for source, weight in enumerate(weights):
        part = weight - int(weight)
        rows = np.flatnonzero(sources == source) if part else np.zeros(0, np.int64)
        draws = np.random.PCG64([seed, source]).random_raw(len(rows))
        counts[rows[np.argsort(draws, kind="stable")[: round(part * len(rows))]]] += 1
    return counts


def _scrambled(ids: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """A hash of each id and the seed (the finalizer of SplitMix64)."""
    mixed = ids ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
