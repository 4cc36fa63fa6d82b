import random

import numpy as np
import pytest

from mcore_sft.data.selection import shuffle as shuffles
from mcore_sft.data.selection.shuffle import shuffle

SIZES = [0, 1, 2, 3, 4, 5, 63, 64, 65, 1000, 4095, 4096, 4097, 8191, 8192, 20_000]


@pytest.mark.parametrize("size", SIZES)
def test_every_swap_is_that_of_python(size):
    for seed in (0, 42):
        rows, expected = np.arange(size), list(range(size))
        shuffle(rows, seed)
        random.Random(seed).shuffle(expected)
        assert rows.tolist() == expected


def test_rows_that_meet_are_swapped_one_by_one(monkeypatch):
    monkeypatch.setattr(shuffles, "_FEW", 64)  # rows before these are swapped one by one anyway
    monkeypatch.setattr(shuffles, "_WORDS", 7)
    for seed in range(50):
        rows, expected = np.arange(300), list(range(300))
        shuffle(rows, seed)
        random.Random(seed).shuffle(expected)
        assert rows.tolist() == expected
