"""Whether weights that several ranks hold are the same on all of them, bit for bit.

weights, on their device -> 8 bytes -> the ranks that differ from the first of those that hold them

The bits of each number, as an integer, are multiplied by an odd factor of its position and summed
modulo 2^64. No single flipped bit is lost: an odd number times 2^k is 0 for no k below 64.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_sft.model.build import Chunks
from mcore_sft.runtime.mesh import Mesh

CHUNK = 2**20
"""Numbers that are summed at a time: as many factors, and as many products, are held."""

_NEXT_CHUNK = 0x1E3779B97F4A7C15
"""Odd, and 5 modulo 8, so that its powers are of a long period: those of chunks differ."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing(model: Chunks, mesh: Mesh) -> list[tuple[int, int]]:
    """Each rank whose weights differ, and the first of those that should have the same; collective.

    All weights are compared among the replicas, and those that tensor parallelism does not split
    among its ranks.
    """
    weights = [weight for chunk in model for weight in chunk.parameters()]
    whole = [one for one in weights if not getattr(one, "tensor_model_parallel", False)]
    parts = []
    for axis, held in ((mesh.replicas, weights), (mesh.tensor, whole)):
        first = dist.get_global_rank(axis.group, 0)
        total = bit_sum(held, mesh.device) if axis.size > 1 else torch.tensor(0, device=mesh.device)
        parts += [total, torch.full_like(total, first)]
    told = mesh.gather(torch.stack(parts)).tolist()
    found = {
        (rank, row[at + 1]): None
        for rank, row in enumerate(told)
        for at in (0, 2)
        if row[at] != told[row[at + 1]][at]
    }
    return list(found)


def bit_sum(weights: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum [] (int64) of the bits of `weights`, all on `device`, by their positions."""
    random = torch.Generator().manual_seed(1)
    factors = (torch.randint(-(2**63), 2**63 - 1, (CHUNK,), generator=random) | 1).to(device)
    products = torch.empty_like(factors)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for weight in weights:
        bits = weight.detach().contiguous().view(-1).view(_INTEGERS[weight.element_size()])
        for part in torch.split(bits, CHUNK):
            size = part.numel()
            torch.mul(part, factors[:size], out=products[:size])
            total.mul_(_NEXT_CHUNK).add_(products[:size].sum())
    return total
