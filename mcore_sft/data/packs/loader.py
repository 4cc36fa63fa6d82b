"""A packed dataset in, the batches of any step out: arithmetic, with nothing to remember.

(seed, step, rank) -> packs -> batches
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from mcore_sft.config import TrainConfig
from mcore_sft.data.errors import DataError
from mcore_sft.data.packs.batch import Batch, collate, document_unit
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.packs.pack import Pack


def packs_of_a_step(train: TrainConfig, examples_per_pack: float) -> int:
    """Packs that every step takes, whatever the layout: as stated, or as many as hold a batch."""
    if train.packs is not None:
        return train.packs
    assert train.global_batch is not None
    return max(1, round(train.global_batch / examples_per_pack))


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How many packs go through a layout at once; the last round is filled up with empty ones.

    In each round `size` data-parallel ranks compute a micro-batch of `micro_batch` packs each.
    """

    packs: int
    size: int
    micro_batch: int
    fewest: int = 1
    """Rounds that the layout needs at least."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank."""
        return max(self.fewest, -(-self.packs // self._round))

    @property
    def empty(self) -> float:
        """The share of empty packs among those that are computed."""
        return 1 - self.packs / (self.micro_batches * self._round)

    @property
    def nearest_full(self) -> int:
        """The number of packs, nearest to `packs`, that leaves none empty."""
        return max(self.fewest, round(self.packs / self._round)) * self._round

    @property
    def _round(self) -> int:
        return self.size * self.micro_batch

    def __str__(self) -> str:
        """The share of empty packs, and beyond a tenth the number of packs that needs none."""
        said = f"{100 * self.empty:.0f} % empty packs"
        if 10 * self.packs >= 9 * self.micro_batches * self._round:
            return said
        return f"{said} (none with train.packs={self.nearest_full} train.global_batch=null)"


class Loader:
    """Batches of every step for one data-parallel rank.

    A step takes `packs_per_step` packs. Micro-batch j of rank r takes the packs after those of
    rank r - 1, so that a step consumes the same packs in the same order for every number of ranks.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        packs_per_step: int,
        micro_batch: int,
        seed: int,
        last_step: Literal["drop", "pad"],
        rank: int,
        size: int,
        pad_id: int,
        align: int = 1,
        fewest: int = 1,
        context: int = 1,
        context_rank: int = 0,
    ) -> None:
        """`align` rounds each context rank's rows up; a step has `fewest` micro-batches or more.

        `context` ranks share each row (`collate`). Packs depend on none of these.
        """
        self._dataset = dataset
        self._micro_batch = micro_batch
        self._seed = seed
        self._rank = rank
        self._size = size
        self._pad_id = pad_id
        self._permutation = lru_cache(maxsize=2)(self._permute)
        self._fewest = fewest
        self._context = context
        self._context_rank = context_rank
        document = document_unit(context)
        longest = dataset.sequence_length if document == 1 else dataset.longest_pack(document)
        unit = math.lcm(align * context, document)
        self.length = -(-longest // unit) * unit
        self._last_step = last_step
        self.packs_per_step = packs_per_step

    def taking(self, packs_per_step: int) -> "Loader":
        """The same packs in the same order, so many a step."""
        other = copy.copy(self)
        other.packs_per_step = packs_per_step
        return other

    @property
    def examples_per_step(self) -> float:
        """Examples of a step on average."""
        return self.packs_per_step * self._dataset.num_examples / len(self._dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every pack once, but for those that `last_step` drops."""
        whole, rest = divmod(len(self._dataset), self.packs_per_step)
        return whole + (1 if rest and self._last_step == "pad" else 0)

    @property
    def filling(self) -> Filling:
        """How the packs of a step fill the micro-batches of all ranks."""
        return self._filled(self.packs_per_step)

    def check(self) -> None:
        """Raise `DataError` if the packs do not fill one step; validation needs no step."""
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the dataset has {len(self._dataset)} packs, fewer than the "
                f"{self.packs_per_step} of a step (about {self.examples_per_step:.0f} examples); "
                "lower train.global_batch or train.packs, fill up with train.last_step=pad, or "
                "give more data"
            )

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that `step` belongs to."""
        return step // self.steps_per_epoch

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of `step`; past the end of the data, packs are empty."""
        return [self._batch(packs) for packs in self.packs(step)]

    def packs(self, step: int) -> list[list[int]]:
        """The packs of each of this rank's micro-batches of `step`."""
        begin = step % self.steps_per_epoch * self.packs_per_step
        packs = self._permutation(self.epoch(step))[begin : begin + self.packs_per_step]
        return self._share(packs, self.packs_per_step)

    def validation_batches(self, limit: int = 0) -> Iterator[Batch]:
        """This rank's share of all packs, or the first `limit`; as many batches for each rank."""
        packs = np.arange(min(limit or len(self._dataset), len(self._dataset)), dtype=np.int64)
        return (self._batch(share) for share in self._share(packs, len(packs)))

    def _share(self, packs: npt.NDArray[np.int64], number: int) -> list[list[int]]:
        """This rank's micro-batches of `number` packs; those past the end of `packs` are left out.

        Every rank has as many micro-batches.
        """
        size = self._micro_batch
        rounds = range(self._filled(number).micro_batches)
        begins = [(micro * self._size + self._rank) * size for micro in rounds]
        return [packs[begin : begin + size].tolist() for begin in begins]

    def _filled(self, packs: int) -> Filling:
        return Filling(
            packs=packs, size=self._size, micro_batch=self._micro_batch, fewest=self._fewest
        )

    def _batch(self, packs: list[int]) -> Batch:
        real = [self._dataset.pack(index) for index in packs]
        empty = [Pack.empty()] * (self._micro_batch - len(real))
        return collate(
            [*real, *empty],
            self.length,
            pad_id=self._pad_id,
            context=self._context,
            rank=self._context_rank,
        )

    def _permute(self, epoch: int) -> npt.NDArray[np.int64]:
        # The raw stream of PCG64 is the same in every version of numpy; its shuffles need not be.
        draws = np.random.PCG64([self._seed, epoch]).random_raw(len(self._dataset))
        return np.argsort(np.asarray(draws), kind="stable").astype(np.int64)
