from pathlib import Path

import numpy as np
import pytest

from mcore_sft.data.places import Places, place


def test_every_row_is_named_as_its_file_numbers_it():
    places, expected = Places(), {}
    # Rows dropped within a block, blank lines or bad rows between, a file behind another.
    blocks = [
        ("a.jsonl", [0, 1, 4, 5], [1, 2, 5, 6]),
        ("a.jsonl", [], []),
        ("a.jsonl", [6, 7, 9], [8, 9, 13]),
        ("b.jsonl", [10, 11], [1, 2]),
    ]
    for name, positions, numbers in blocks:
        places.add(name, np.array(positions, np.int64), np.array(numbers, np.int64))
        expected |= {at: f"{name}:{n}" for at, n in zip(positions, numbers, strict=True)}
    assert {position: places.where(position) for position in expected} == expected


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("/root/math/a.jsonl:3", "math/a.jsonl:3"),
        ("/elsewhere/math/a.jsonl:3", "math/a.jsonl:3"),
        ("org/name[train]:3", "org/name[train]:3"),
        ("", ""),
    ],
)
def test_place_is_the_same_on_every_machine(where, expected):
    assert place(where, Path("/root")) == expected
