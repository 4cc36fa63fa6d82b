import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mcore_sft.config import TrainConfig
from mcore_sft.data.errors import DataError
from mcore_sft.data.packs.loader import Filling, Loader, packs_of_a_step
from mcore_sft.data.packs.pack import Pack
from mcore_sft.data.text.prompt import Example

PAD = 0


@dataclass
class Packs:
    """As many packs as wanted, two examples each; the tokens of pack p are all p + 1."""

    count: int
    sequence_length: int = 8
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    @property
    def num_examples(self) -> int:
        return 2 * self.count

    def longest_pack(self, unit: int) -> int:
        return 2 * -(-3 // unit) * unit

    def pack(self, index: int) -> Pack:
        one = Example(
            tokens=np.full(3, index + 1, dtype=np.int32), spans=np.array([[1, 3]], dtype=np.int32)
        )
        return Pack(examples=(one, one))


def loader(count: int, **settings) -> Loader:
    dataset: Any = Packs(count)
    known = {"packs_per_step": 8, "micro_batch": 1, "seed": 3, "last_step": "drop", "pad_id": PAD}
    return Loader(dataset, **{**known, "rank": 0, "size": 1, **settings})


def packs_of(batch, length: int = 8) -> list[int]:
    """Which packs lie in a batch; -1 is an empty one."""
    return [int(row[0]) - 1 for row in batch.tokens.view(-1, length)]


def step_order(count: int, step: int, size: int = 1, **settings) -> list[int]:
    """Packs of a step in the order in which they are consumed by all ranks together."""
    ranks = [loader(count, rank=r, size=size, **settings).batches(step) for r in range(size)]
    return [
        pack for micro in zip(*ranks, strict=True) for batch in micro for pack in packs_of(batch)
    ]


@pytest.mark.parametrize(
    ("stated", "examples_per_pack", "expected"),
    [
        ({"global_batch": 512}, 8.7, 59),
        ({"global_batch": 512}, 12.0, 43),
        ({"global_batch": 1}, 8.7, 1),
        ({"packs": 64}, 8.7, 64),
        ({}, 8.0, 64),
    ],
)
def test_packs_of_a_step_are_stated_or_those_nearest_to_the_examples(
    stated, examples_per_pack, expected
):
    assert packs_of_a_step(TrainConfig(**stated), examples_per_pack) == expected


@pytest.mark.parametrize(
    ("packs", "size", "micro_batch", "fewest", "micro_batches", "percent", "full"),
    [
        (59, 1, 1, 1, 59, 0, 59),
        (59, 16, 1, 1, 4, 8, 64),
        (59, 48, 1, 1, 2, 39, 48),
        (59, 2, 4, 1, 8, 8, 56),
        (9, 10, 1, 1, 1, 10, 10),
        (5, 1, 1, 8, 8, 38, 8),
        (1, 2, 3, 1, 1, 83, 6),
    ],
)
def test_the_last_round_is_filled_up_and_told(
    packs, size, micro_batch, fewest, micro_batches, percent, full
):
    filling = Filling(packs=packs, size=size, micro_batch=micro_batch, fewest=fewest)
    assert filling.micro_batches == micro_batches
    assert round(100 * filling.empty) == percent
    assert filling.nearest_full == full
    said = str(filling)
    assert said.startswith(f"{percent} % empty packs")
    assert (f"train.packs={full}" in said) == (percent > 10)


def test_every_layout_takes_the_same_packs_once_in_the_same_order():
    """Each rank has as many micro-batches of as many packs, on every layout."""
    for packs, count in ((1, 10), (3, 10), (5, 13), (8, 23)):
        order = [
            pack for step in range(5) for pack in step_order(count, step, packs_per_step=packs)
        ]
        for size, micro_batch, fewest in itertools.product((1, 2, 3, 4), (1, 2, 5), (1, 2, 4)):
            layout = {"size": size, "micro_batch": micro_batch, "fewest": fewest}
            seen = []
            for step in range(5):
                taken = step_order(count, step, packs_per_step=packs, **layout)
                assert taken[packs:] == [-1] * (len(taken) - packs), layout
                seen += taken[:packs]
            assert seen == order, layout


@pytest.mark.parametrize("last_step", ["drop", "pad"])
def test_an_epoch_has_as_many_steps_on_every_layout(last_step):
    """Where it is padded, the last step's packs are followed by empty ones."""
    settings = {"packs_per_step": 5, "last_step": last_step}
    steps = 2 if last_step == "drop" else 3
    for size, micro_batch, fewest in itertools.product((1, 2, 3), (1, 4), (1, 4)):
        layout = {"size": size, "micro_batch": micro_batch, "fewest": fewest}
        assert loader(13, **settings, **layout).steps_per_epoch == steps
        seen = [
            pack
            for step in range(steps)
            for pack in step_order(13, step, **settings, **layout)
            if pack >= 0
        ]
        assert len(seen) == len(set(seen)) == (10 if last_step == "drop" else 13)


def test_another_number_of_packs_a_step_changes_no_order():
    before = loader(40)
    other = before.taking(5)
    assert (before.packs_per_step, other.packs_per_step) == (8, 5)
    assert (before.steps_per_epoch, other.steps_per_epoch) == (5, 8)
    one, two = (
        [pack for step in range(x.steps_per_epoch) for micro in x.packs(step) for pack in micro]
        for x in (before, other)
    )
    assert one == two


def test_number_of_ranks_does_not_change_what_a_step_consumes():
    alone = step_order(40, 3, size=1)
    assert len(set(alone)) == 8
    assert step_order(40, 3, size=2) == alone
    assert step_order(40, 3, size=4, micro_batch=2) == alone
    assert step_order(40, 3, size=8) == alone


def test_epoch_visits_every_pack_once_and_the_next_in_another_order():
    one = [pack for step in range(5) for pack in step_order(40, step, size=2)]
    two = [pack for step in range(5, 10) for pack in step_order(40, step, size=2)]
    assert sorted(one) == sorted(two) == list(range(40))
    assert one != two
    assert [loader(40).epoch(step) for step in (0, 4, 5, 10)] == [0, 0, 1, 2]


def test_batches_follow_from_seed_and_step_alone():
    used = loader(40)
    for step in (7, 2, 9):
        used.batches(step)
    fresh = [packs_of(batch) for batch in loader(40).batches(8)]
    assert [packs_of(batch) for batch in used.batches(8)] == fresh
    assert [packs_of(batch) for batch in loader(40, seed=4).batches(8)] != fresh


def test_order_of_packs_is_fixed_for_all_time():
    assert step_order(8, 0, size=1) == [0, 4, 7, 1, 5, 6, 3, 2]


def test_last_step_is_dropped_or_filled_with_empty_packs():
    assert loader(20).steps_per_epoch == 2
    padded = loader(20, last_step="pad")
    assert padded.steps_per_epoch == 3
    seen = [pack for step in range(3) for pack in step_order(20, step, size=2, last_step="pad")]
    assert sorted(seen) == [-1] * 4 + list(range(20))
    assert seen[-4:] == [-1] * 4
    empty = padded.batches(2)[-1]
    assert (empty.supervised, empty.useful, empty.examples) == (0, 0, 0)


def test_dataset_smaller_than_a_step():
    with pytest.raises(DataError, match=r"7 packs, fewer than the 8 .*train.last_step=pad"):
        loader(7).check()
    assert loader(7, last_step="pad").steps_per_epoch == 1


def test_row_length_is_aligned_and_packs_are_not():
    batch = loader(40, align=5, micro_batch=2).batches(0)[0]
    assert batch.length == 20
    assert packs_of(batch, 10) == packs_of(loader(40, micro_batch=2).batches(0)[0])


@pytest.mark.parametrize(("limit", "expected"), [(0, 7), (5, 5), (99, 7)])
def test_validation_takes_all_packs_in_order_as_many_batches_for_each_rank(limit, expected):
    ranks = [
        list(loader(7, last_step="pad", rank=r, size=2).validation_batches(limit)) for r in (0, 1)
    ]
    assert len(ranks[0]) == len(ranks[1])
    seen = [packs_of(batch)[0] for micro in zip(*ranks, strict=True) for batch in micro]
    assert [pack for pack in seen if pack >= 0] == list(range(expected))


def test_validation_has_the_micro_batches_that_a_schedule_needs():
    held_out = loader(7, fewest=2, size=2)
    found = [packs_of(batch) for batch in held_out.validation_batches()]
    assert found == [[0], [2], [4], [6]]
    found = [packs_of(batch) for batch in loader(3, fewest=4).validation_batches()]
    assert found == [[0], [1], [2], [-1]]


def test_a_row_that_context_ranks_share_holds_every_pack_filled_up():
    """Two examples of three tokens are eight once each is filled up to four, ten rounds to 12."""
    shared = [loader(10, context=2, context_rank=rank, align=3) for rank in range(2)]
    assert [one.length for one in shared] == [12, 12]
    assert [one.packs_per_step for one in shared] == [8, 8]
    first, second = (one.batches(0)[0] for one in shared)
    assert first.length == second.length == 6
    assert first.starts.tolist() == second.starts.tolist() == [0, 4, 8, 12]
