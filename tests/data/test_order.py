import random

import numpy as np
import pytest

from mcore_sft.config import FilterConfig, HoldoutConfig
from mcore_sft.data.selection.order import held_out, row_order, visits

PROBLEMS = [7, 3, 7, 9, 3, 7, 3, 1]
GROUPED = [0, 2, 5, 1, 4, 6, 3, 7]
TURNS = [0, 1, 3, 7, 2, 4, 5, 6]


def nemo_skills_order(problems, method=None, count=None, seed=42):
    """By the book: lists of samples by problem, and the global generator."""
    groups = {}
    for row, problem in enumerate(problems):
        groups.setdefault(problem, []).append(row)
    rows = [row for group in groups.values() for row in group]
    if method == "fair" and count < len(rows):
        longest = max(map(len, groups.values()))
        rows = [group[k] for k in range(longest) for group in groups.values() if k < len(group)]
        rows = rows[:count]
    random.seed(seed)
    random.shuffle(rows)
    return rows[:count]


def test_order_of_nemo_skills():
    config = FilterConfig(order="nemo_skills")
    # What random.seed(42) and random.shuffle make of ten rows.
    assert row_order(np.arange(10), config).tolist() == [7, 3, 2, 8, 5, 6, 9, 4, 0, 1]
    expected = GROUPED.copy()
    random.Random(42).shuffle(expected)
    assert row_order(np.array(PROBLEMS), config).tolist() == expected
    assert nemo_skills_order(PROBLEMS) == expected


@pytest.mark.parametrize("count", [1, 3, 5, 7, 8, 9])
@pytest.mark.parametrize("method", ["random", "fair"])
def test_downsampling(method, count):
    options = {"downsampling_method": method, "num_output_samples": count}
    order = row_order(np.array(PROBLEMS), FilterConfig(order="nemo_skills", **options)).tolist()
    assert order == nemo_skills_order(PROBLEMS, method, count)
    assert len(order) == min(count, 8)
    if method == "fair":
        assert set(order) == set(TURNS[:count])
    in_source = row_order(np.array(PROBLEMS), FilterConfig(**options)).tolist()
    assert in_source == sorted(order)


@pytest.mark.parametrize("method", [None, "random", "fair"])
@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
def test_order_of_many(method, rows):
    ids = np.random.default_rng(rows).integers(0, 2**63, max(1, rows // 9), dtype=np.uint64)
    problems = ids[np.random.default_rng(1).integers(0, len(ids), rows)]
    count = None if method is None else max(1, rows // 2)
    config = FilterConfig(
        order="nemo_skills", downsampling_method=method, num_output_samples=count, random_seed=3
    )
    order = row_order(problems, config)
    assert order.dtype == np.int64
    assert order.tolist() == nemo_skills_order(problems.tolist(), method, count, seed=3)


def test_source_order_is_untouched():
    assert row_order(np.array(PROBLEMS), FilterConfig()).tolist() == list(range(8))


@pytest.mark.parametrize("rows", [1000, 1019])
def test_rows_are_held_out_as_datasets_cuts_them(rows):
    import datasets

    both = datasets.Dataset.from_dict({"row": list(range(rows))})
    expected = both.train_test_split(test_size=0.05, seed=42)["test"]["row"]
    positions = np.arange(rows)[::3]
    held = held_out(
        HoldoutConfig(fraction=0.05),
        positions=positions,
        problems=np.zeros(len(positions), np.uint64),
        num_rows=rows,
    )
    assert set(positions[held].tolist()) == set(expected) & set(positions.tolist())


def test_problems_are_held_out_whole_and_wherever_they_stand():
    ids = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)
    problems = np.repeat(ids, 3)
    config = HoldoutConfig(fraction=0.1, by="problem")
    rows = {"positions": np.arange(12000), "num_rows": 12000}
    held = held_out(config, problems=problems, **rows)
    assert np.array_equal(held, np.repeat(held[::3], 3))
    assert 0.08 < held.mean() < 0.12
    backwards = held_out(config, problems=problems[::-1], **rows)
    assert np.array_equal(backwards, held[::-1])
    other = held_out(config.model_copy(update={"seed": 1}), problems=problems, **rows)
    assert 0.005 < (held & other).mean() < 0.02


def test_weights_say_how_often_an_epoch_shows_a_row():
    sources = np.array([0] * 1000 + [1] * 10 + [2] * 400, np.int16)
    times = visits([0.25, 1.0, 2.5], sources, seed=3)
    assert sorted(set(times[:1000].tolist())) == [0, 1]
    assert times[:1000].sum() == 250
    assert times[1000:1010].tolist() == [1] * 10
    assert sorted(set(times[1010:].tolist())) == [2, 3]
    assert times[1010:].sum() == 1000
    assert not np.array_equal(times, visits([0.25, 1.0, 2.5], sources, seed=4))
