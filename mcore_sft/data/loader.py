"""A packed dataset in, the batches of any step out: arithmetic, with nothing to remember.

(seed, step, rank) -> packs -> batches
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from mcore_sft.data.batch import Batch, collate, document_unit
from mcore_sft.data.dataset import PackedDataset
from mcore_sft.data.errors import DataError
from mcore_sft.data.pack import Pack


def nearest_multiple(packs: float, unit: int) -> int:
    """The multiple of `unit`, and at least one, that is nearest to `packs`: those of a step."""
    return max(1, round(packs / unit)) * unit


class Loader:
    """Batches of every step for one data-parallel rank.

    A step takes `packs_per_step` packs: the multiple of size x micro_batch x rounds that is nearest
    to `global_batch` examples. Micro-batch j of rank r takes the packs after those of rank r - 1,
    so that a step consumes the same packs in the same order for every number of ranks.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        global_batch: int,
        micro_batch: int,
        seed: int,
        last_step: Literal["drop", "pad"],
        rank: int,
        size: int,
        pad_id: int,
        align: int = 1,
        rounds: int = 1,
        context: int = 1,
        context_rank: int = 0,
    ) -> None:
        """`align` rounds each context rank's rows up, `rounds` the micro-batches of a step.

        `context` ranks share each row (`collate`). Packs depend on none of these.
        """
        self._dataset = dataset
        self._micro_batch = micro_batch
        self._seed = seed
        self._rank = rank
        self._size = size
        self._pad_id = pad_id
        self._permutation = lru_cache(maxsize=2)(self._permute)
        self._rounds = rounds
        self._context = context
        self._context_rank = context_rank
        document = document_unit(context)
        longest = dataset.sequence_length if document == 1 else dataset.longest_pack(document)
        unit = math.lcm(align * context, document)
        self.length = -(-longest // unit) * unit
        examples_per_pack = dataset.num_examples / len(dataset)
        together = size * micro_batch * rounds
        self.packs_per_step = nearest_multiple(global_batch / examples_per_pack, together)
        self.examples_per_step = self.packs_per_step * examples_per_pack
        whole, rest = divmod(len(dataset), self.packs_per_step)
        self.steps_per_epoch = whole + (1 if rest and last_step == "pad" else 0)

    def check(self) -> None:
        """Raise `DataError` if the packs do not fill one step; validation needs no step."""
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the dataset has {len(self._dataset)} packs, fewer than the "
                f"{self.packs_per_step} of a step (about {self.examples_per_step:.0f} examples); "
                "lower train.global_batch or train.micro_batch, fill up with train.last_step=pad, "
                "or give more data"
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
        count = -(-number // (self._size * size * self._rounds)) * self._rounds
        begins = [(micro * self._size + self._rank) * size for micro in range(count)]
        return [packs[begin : begin + size].tolist() for begin in begins]

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
