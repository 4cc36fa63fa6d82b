from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_sft.ops.packing import best_fit_pack, best_fit_pack_reference


def pack(lengths: list[int], capacity: int, seed: int = 0, dtype=torch.int32) -> list[list[int]]:
    order, offsets = best_fit_pack(torch.tensor(lengths, dtype=dtype), capacity, seed)
    assert order.dtype == offsets.dtype == torch.int64
    bounds = offsets.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    return [order[a:b].tolist() for a, b in pairwise(bounds)]


def check_valid(packs: list[list[int]], lengths: list[int], capacity: int) -> None:
    assert sorted(i for one in packs for i in one) == list(range(len(lengths)))
    assert all(one and sum(lengths[i] for i in one) <= capacity for one in packs)


def test_three_examples_fill_two_packs():
    packs = pack([5, 3, 4], 8)
    assert sorted(sorted(one) for one in packs) == [[0, 1], [2]]


def test_best_fit_takes_the_fullest_pack_that_holds_the_example():
    # 6 and 5 open two packs of 8 with room 2 and 3; the 2 belongs with the 6, the 3 with the 5.
    assert sorted(sorted(one) for one in pack([6, 5, 2, 3], 8)) == [[0, 2], [1, 3]]


@settings(max_examples=200, deadline=None)
@given(
    data=st.integers(1, 64).flatmap(
        lambda capacity: st.tuples(
            st.just(capacity), st.lists(st.integers(1, capacity), max_size=80)
        )
    ),
    seed=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_as_many_packs_as_item_by_item(data, seed, dtype):
    capacity, lengths = data
    packs = pack(lengths, capacity, seed, dtype)
    check_valid(packs, lengths, capacity)
    reference = best_fit_pack_reference(lengths, capacity)
    check_valid(reference, lengths, capacity)
    assert len(packs) == len(reference)


def test_fill_of_each_pack_is_that_of_item_by_item():
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 400, (5000,), generator=draw).tolist()
    ours = sorted(sum(lengths[i] for i in one) for one in pack(lengths, 1024))
    theirs = best_fit_pack_reference(lengths, 1024)
    assert ours == sorted(sum(lengths[i] for i in one) for one in theirs)


def test_seed_decides_order_and_nothing_else():
    lengths = [3, 3, 3, 5, 5, 5, 8, 1, 1, 1, 2, 2] * 5
    assert pack(lengths, 8, 1) == pack(lengths, 8, 1)
    assert pack(lengths, 8, 1) != pack(lengths, 8, 2)
    assert len(pack(lengths, 8, 1)) == len(pack(lengths, 8, 2))


def test_neither_examples_of_a_length_nor_packs_keep_their_order():
    order, _ = best_fit_pack(torch.full((1000,), 4), 4, 7)
    assert order.tolist() != sorted(order.tolist())
    lengths = torch.arange(1, 1001)
    order, offsets = best_fit_pack(lengths, 1000, 7)
    longest = [int(lengths[order[a]]) for a in offsets[:-1].tolist()]
    assert longest != sorted(longest, reverse=True)


def test_no_example_no_pack():
    assert pack([], 8) == []


def test_strided_lengths_are_read_as_they_are():
    lengths = torch.tensor([8, 1, 7, 1, 1, 1])[::2]
    order, offsets = best_fit_pack(lengths, 8, 0)
    assert len(offsets) == 3
    assert sorted(order.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("lengths", "capacity", "said"),
    [
        ([3, 9], 8, r"lengths\[1\] is 9, expected 1 to 8"),
        ([0], 8, r"lengths\[0\] is 0"),
        ([-2], 8, r"lengths\[0\] is -2"),
        ([1], 0, "capacity is 0"),
    ],
)
def test_what_no_pack_can_hold_is_named(lengths, capacity, said):
    with pytest.raises(RuntimeError, match=said):
        pack(lengths, capacity)


def test_other_types_and_shapes_are_refused():
    with pytest.raises(RuntimeError, match="int32 or int64"):
        best_fit_pack(torch.ones(3), 8, 0)
    with pytest.raises(RuntimeError, match="2 dimensions, expected 1"):
        best_fit_pack(torch.ones(3, 2, dtype=torch.int32), 8, 0)


def test_operator_is_registered_in_full():
    lengths = torch.tensor([5, 3, 4])
    torch.library.opcheck(
        torch.ops.mcore_sft.best_fit_pack.default,
        (lengths, 8, 0),
        test_utils=("test_schema", "test_faketensor"),
    )
