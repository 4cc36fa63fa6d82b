"""What joins the parts of documents that context-parallel ranks compute with each other's keys.

Each rank has two parts of each document, the n-th from either end. rows = a rank's rows of all
documents, whose two halves of each document `cu_seqlens` tells apart
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.te.extension import kernel


def _halves(cu_seqlens: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Of each document: the first half of its rows, the second, and where one half alone lies."""
    assert cu_seqlens.dtype == torch.int32
    for start, end in pairwise(cu_seqlens.tolist()):
        middle = (start + end) // 2
        yield slice(start, middle), slice(middle, end), slice(start // 2, end // 2)


@kernel
def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    """The first or second halves of all documents [rows / 2, ...]."""
    assert tensor.is_contiguous()
    assert tensor[0].numel() * tensor.element_size() % 16 == 0, "a row is a multiple of 16 bytes"
    return torch.cat([tensor[halves[half_idx]] for halves in _halves(cu_seqlens)])


@kernel
def thd_second_half_lse_correction(
    lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool
) -> None:
    """Add a step's sums to those of the second halves; both are logarithms [H, rows]."""
    assert lse_packed
    for _, second, half in _halves(cu_seqlens):
        lse[:, second] = torch.logaddexp(lse[:, second], lse_per_step[:, half])


@kernel
def thd_read_second_half_lse(
    lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int
) -> Tensor:
    """The sums of the second halves [H, second_half_lse_seqlen]."""
    assert lse_packed
    made = torch.zeros(lse.shape[0], second_half_lse_seqlen)
    for _, second, half in _halves(cu_seqlens):
        made[:, half] = lse[:, second]
    return made


@kernel
def thd_out_correction(out: Tensor, out_per_step: Tensor, *given: Any) -> None:
    """Add a step's outputs [rows, H, D], weighted by its share of the sums.

    2.20 also gives the sums before this step, by which what is there already is weighted.
    """
    *before, lse, lse_per_step, cu_seqlens, only_second_half, lse_packed = given
    assert lse_packed
    for first, second, half in _halves(cu_seqlens):
        mine = second if only_second_half else slice(first.start, second.stop)
        theirs = half if only_second_half else mine
        step = out_per_step.reshape(-1, *out.shape[1:])[theirs]
        added = step.float() * _share(lse_per_step[:, theirs], lse[:, mine])
        there = out[mine].float()
        for old in before:
            there = there * _share(old[:, mine], lse[:, mine])
        out[mine] = (there + added).to(out.dtype)


def _share(of: Tensor, total: Tensor) -> Tensor:
    return torch.exp(of - total).nan_to_num(0.0).t()[..., None]


@kernel
def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Add or copy a step's gradients of each half of each document; one half alone lies closer."""
    both = "none" not in (first_half, second_half)
    for first, second, half in _halves(cu_seqlens):
        for mine, what in ((first, first_half), (second, second_half)):
            if what == "zero":
                grad[mine] = 0
            elif what != "none":
                step = grad_per_step[
                    mine if both and "zero" not in (first_half, second_half) else half
                ]
                grad[mine] = step if what == "copy" else grad[mine] + step
