"""Python's own shuffle of an array, swap by swap, at a fraction of the time.

    seed -> words of the Mersenne Twister -> draws -> swaps, some at a time

NeMo-Skills shuffles with random.seed and random.shuffle. For n = N to 2 that swaps row n - 1 with a
row drawn below n; to draw it takes as many bits as n has, and others while they are not below n.
"""

import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

_WORDS = 1 << 16  # made at a time
_FEW = 1 << 12  # rows that are swapped one by one


def shuffle(order: Rows, seed: int) -> None:
    """What random.seed(seed) and random.shuffle make of `order` [N], in place. N < 2^32."""
    end = len(order)
    for drawn in _draws(end, seed):
        while len(drawn):
            # So few at a time that they hardly ever meet, as when sqrt(end) rows are drawn.
            count = min(len(drawn), int(end**0.5) // 4) if end > _FEW else len(drawn)
            _swap(order, end, drawn[:count])
            end, drawn = end - count, drawn[count:]


def _swap(order: Rows, end: int, drawn: Rows) -> None:
    """Swap row end - 1 - k with row drawn[k], for one k after another."""
    begin = end - len(drawn)
    ranked = np.sort(drawn)
    if end <= _FEW or ranked[-1] >= begin or (ranked[1:] == ranked[:-1]).any():
        for own, other in zip(range(end - 1, begin - 1, -1), drawn.tolist(), strict=True):
            order[own], order[other] = order[other], order[own]
    else:
        own_rows = order[begin:end][::-1]
        own_rows[:], order[drawn] = order[drawn], own_rows.copy()


def _draws(count: int, seed: int) -> Iterator[Rows]:
    """A number below count, one below count - 1, ... one below 2, in pieces."""
    *key, place = random.Random(seed).getstate()[1]
    twister = np.random.MT19937()
    twister.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.array(key, np.uint32), "pos": place},
    }
    words, below = np.zeros(0, np.int64), count
    while below > 1:
        if not len(words):
            words = np.asarray(twister.random_raw(_WORDS)).astype(np.int64)
        bits = below.bit_length()
        some = words[: max(64, below // 8)] >> (32 - bits)
        taken = np.flatnonzero(_taken(some, below))
        taken = taken[: below - 2 ** (bits - 1) + 1]  # as long as these are the bits to take
        fewer = below - len(taken) < 2 ** (bits - 1)
        yield some[taken]
        words = words[taken[-1] + 1 if fewer else len(some) :]
        below -= len(taken)


def _taken(draws: Rows, below: int) -> npt.NDArray[np.bool_]:
    """Which draws are below `below`, less one for each that was taken before.

    What is right up to some draw is right up to the next one in the next round; all is right once a
    round changes nothing.
    """
    taken: npt.NDArray[np.bool_] = draws < below
    while True:
        again = draws < below - (np.cumsum(taken) - taken)
        if np.array_equal(again, taken):
            return taken
        taken = again
