"""Lengths of examples in, packs out: best fit decreasing, in some hundredths of a second a million.

    lengths_N -> order_N, offsets_P1

N = examples, P = packs.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from mcore_sft.ops import library

library.load()


def best_fit_pack(lengths: Tensor, capacity: int, seed: int) -> tuple[Tensor, Tensor]:
    """Lay every example in a pack of at most `capacity` tokens, in few packs.

    lengths int32 or int64 [N], each 1 to capacity, on the CPU. Returns order int64 [N], the
    examples' indices pack by pack, and offsets int64 [P + 1]: pack p is
    order[offsets[p]:offsets[p + 1]]. Which of the examples of one length goes where, and the order
    of the packs, are shuffled by `seed`; the same input gives the same packs everywhere.
    RuntimeError names the first length that no pack can hold.
    """
    order, offsets = torch.ops.mcore_sft.best_fit_pack(lengths, capacity, seed)
    return order, offsets


def best_fit_pack_reference(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The same packing item by item, without shuffles: what the operator is measured against."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens still free, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"lengths[{index}] is {length}, expected 1 to {capacity}")
        fullest = bisect_left(room, (length, -1))
        if fullest == len(room):
            free, pack = capacity, len(packs)
            packs.append([])
        else:
            free, pack = room.pop(fullest)
        packs[pack].append(index)
        insort(room, (free - length, pack))
    return packs


@torch.library.register_fake("mcore_sft::best_fit_pack")  # type: ignore[untyped-decorator]
def _fake(lengths: Tensor, capacity: int, seed: int) -> tuple[Tensor, Tensor]:
    num_offsets = torch.library.get_ctx().new_dynamic_size(min=1)
    order = lengths.new_empty(lengths.shape, dtype=torch.int64)
    return order, lengths.new_empty((num_offsets,), dtype=torch.int64)
