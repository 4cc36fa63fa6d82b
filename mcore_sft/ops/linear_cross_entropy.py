"""Output layer and cross entropy as one operator: hidden states in, one loss a row out.

    hidden_TD --rows--> hidden_RD --weight_VD--> logits_RV --labels_R--> loss_R

T = rows of the pack (all of them, or this rank's share under sequence parallelism), R = supervised
rows, D = model width, V = vocabulary rows of this rank (padding included).

This is the plain-torch reference: the vocabulary-parallel cross entropy in fp32 whatever the
inputs, with padded vocabulary rows left out of the softmax. It holds R x V logits; it is the oracle
that compiled versions are measured against.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """Cross entropy [R] in fp32 of the supervised rows; it is differentiable in both tensors.

    hidden: [T, D]; with `sequence_parallel`, this rank's contiguous share of the T rows.
    weight: [V, D], this rank's vocabulary rows [rank * V, rank * V + V) of the padded vocabulary.
    rows: int64 [R], sorted row numbers among all T; only these enter the head.
    labels: int64 [R], token ids below `vocab_size`.
    group: the tensor-parallel ranks that share the vocabulary; None is one rank with all of it.
    """
    if group is not None and dist.get_world_size(group) > 1:
        rows_of_all: Any = _GatherRows if sequence_parallel else _ShareRows
        hidden = rows_of_all.apply(hidden, group)
    logits = (hidden.index_select(0, rows) @ weight.t()).float()
    cross_entropy: Any = _VocabParallelCrossEntropy
    losses: Tensor = cross_entropy.apply(logits, labels, vocab_size, group)
    return losses


class _ShareRows(torch.autograd.Function):
    """The same rows on every rank; their gradient is the sum of what each rank contributes."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _GatherRows(torch.autograd.Function):
    """All rows from each rank's share; the gradient is summed and split back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = hidden.new_empty(hidden.shape[0] * dist.get_world_size(group), *hidden.shape[1:])
        dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        share = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(share, grad.contiguous(), group=ctx.group)
        return share, None


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """-log softmax(logits_RV)[labels_R] over the vocabulary shards of `group`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        sharded = group is not None and dist.get_world_size(group) > 1
        width = logits.shape[1]
        first = dist.get_rank(group) * width if sharded else 0
        # Rows of the padded vocabulary beyond the real one take no part in the softmax.
        logits = logits.clone()
        logits[:, max(0, vocab_size - first) :] = -torch.inf

        largest = logits.amax(dim=1)
        if sharded:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exponentials = (logits - largest[:, None]).exp_()
        normalizer = exponentials.sum(dim=1)

        column = labels - first
        here = (column >= 0) & (column < width)
        column = column.clamp(0, width - 1)
        of_label = logits.gather(1, column[:, None])[:, 0].masked_fill(~here, 0.0)
        if sharded:
            sums = torch.stack([normalizer, of_label])
            dist.all_reduce(sums, group=group)
            normalizer, of_label = sums[0], sums[1]

        ctx.save_for_backward(exponentials.div_(normalizer[:, None]), column, here)
        return largest + normalizer.log() - of_label

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, column, here = ctx.saved_tensors
        gradient = probabilities * grad[:, None]
        gradient.scatter_add_(1, column[:, None], (-grad * here)[:, None])
        return gradient, None, None, None
