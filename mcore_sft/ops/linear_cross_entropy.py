"""Output layer and cross entropy as one operator: hidden states in, the loss out.

    hidden_TD --rows--> hidden_RD --weight_VD--> logits_RV --labels_R--> loss

T = rows of the pack (all of them, or this rank's share under sequence parallelism), R = supervised
rows, D = model width, V = vocabulary rows of this rank (padding included).

`reference` says what is computed, in plain torch. The operator computes the gradients with the
loss, in the forward pass, so that nothing is computed twice and no more logits exist at a time than
those of a chunk of rows; csrc/ turns the logits of a chunk into their gradient in place, in fp32
arithmetic. Only supervised rows enter the head. Over a tensor-parallel group each rank holds its
own vocabulary rows; three numbers a row are exchanged, and combined in the order of the ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from mcore_sft.ops import devices  # noqa: F401 (registers what the operators compute)
from mcore_sft.ops.forward_mode import AUTOGRAD, refuse_forward_mode
from mcore_sft.ops.head import IGNORE, Options, arithmetic


class LinearCrossEntropy(NamedTuple):
    """What the operator says of R supervised rows."""

    loss: Tensor
    """Scalar, the sum of token_loss; with reduction "none" [R], without the sum."""
    token_loss: Tensor
    """[R], in nats, free of gradients; 0 for an ignored row."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    reduction: str = "sum",
    main_grad: Tensor | None = None,
) -> LinearCrossEntropy:
    """Cross entropy of `labels` under softmax(hidden[rows] @ weight.T), in fp32 arithmetic.

    hidden: [T, D], fp32 or bf16 (fp64 on the CPU); with `sequence_parallel` this rank's share.
    weight: [V, D], this rank's vocabulary rows [rank * V, rank * V + V) of the padded vocabulary.
    labels: int64 [R], token ids below `vocab_size`, or `IGNORE`: that row counts for nothing.
    rows: int64 [R], increasing, ON THE CPU: numbers among all T rows. None means all of them.
    vocab_size: columns that are no padding; None means all.
    group: the tensor-parallel ranks that share the vocabulary; None is one rank with all of it.
    reduction: "sum", whose gradients are made in the forward pass; "none", for an upstream gradient
        that differs from row to row, computes the logits once more in the backward pass.
    main_grad: fp32 [V, D]. The weight's gradient is added to it, in the forward pass (not under
        no_grad), and autograd is given an empty one for it, which Megatron-core throws away where
        `weight.grad_added_to_main_grad`. A detached weight is given nothing. The upstream gradient
        must be 1. A weight that has another use must be detached; and what runs the forward pass
        twice (checkpointing) adds twice.

    Gradients flow to `hidden` and `weight`; there are no second derivatives and no forward-mode
    ones: asking for them is a RuntimeError. All ranks of `group` must agree in everything but their
    part of hidden and weight. ValueError and RuntimeError say what does not fit.
    """
    refuse_forward_mode("linear_cross_entropy", hidden, weight)
    _check_reduction(reduction, main_grad)
    _check_tensors(hidden, weight, labels)
    ranks = dist.get_world_size(group) if group is not None else 1
    sharded = group is not None and ranks > 1
    if vocab_size is None:
        vocab_size = len(weight) * ranks
    if not 0 < vocab_size <= len(weight) * ranks:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected 1 to {len(weight) * ranks}: "
            f"{ranks} rank(s) of {len(weight)} vocabulary rows"
        )
    options = Options(
        vocab_size=vocab_size,
        group=group.group_name if group is not None and sharded else "",
        sequence_parallel=sequence_parallel and sharded,
    )
    tensors = (hidden, weight, labels.contiguous(), rows)
    for_hidden = torch.is_grad_enabled() and hidden.requires_grad
    for_weight = torch.is_grad_enabled() and weight.requires_grad
    if reduction == "none" and (for_hidden or for_weight):
        per_row: Any = _PerRow
        return LinearCrossEntropy(*per_row.apply(*tensors, options))
    if main_grad is not None and torch.is_grad_enabled():
        into: Any = _IntoMainGrad
        return LinearCrossEntropy(*into.apply(*tensors, main_grad, options))
    loss, token_loss, _, _ = _operator(*tensors, None, *options, for_hidden, for_weight)
    return LinearCrossEntropy(token_loss if reduction == "none" else loss, token_loss)


def _check_reduction(reduction: str, main_grad: Tensor | None) -> None:
    if reduction not in ("sum", "none"):
        raise ValueError(f'reduction is {reduction!r}, expected "sum" or "none"')
    if main_grad is not None and reduction == "none":
        raise ValueError('main_grad needs reduction "sum"')


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    known = (torch.float32, torch.bfloat16, torch.float64)
    if hidden.dtype not in known or hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"hidden is {hidden.dtype} {list(hidden.shape)}, weight {weight.dtype} "
            f"{list(weight.shape)}; expected two matrices in fp32, bf16 or fp64"
        )
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}, expected int64 [R]")
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, labels on {labels.device}; "
            "expected one device"
        )


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    vocab_size: int | None = None,
) -> LinearCrossEntropy:
    """What `linear_cross_entropy` computes on one rank, by the book: R x V logits and autograd."""
    if rows is not None:
        hidden = hidden.index_select(0, rows.to(hidden.device))
    logits = (hidden @ weight.t())[:, :vocab_size].to(arithmetic(hidden.dtype))
    token_loss = functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return LinearCrossEntropy(token_loss.sum(), token_loss.detach())


_operator = torch.ops.mcore_sft.linear_cross_entropy
_mutating_operator = torch.ops.mcore_sft.linear_cross_entropy_main_grad_


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros are made for each of them
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    ctx.gradients = output[-2:]


def _refuse_second_derivatives(grad: Tensor) -> None:
    if torch.is_grad_enabled() and type(grad) is Tensor and not torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_cross_entropy has no second derivatives; call backward without create_graph"
        )


def _scale_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The gradients made in the forward pass times that of the loss, in place.

    A second backward pass through the same loss finds them used up, and computes them anew.
    """
    found: list[Tensor | None] = [None] * (5 + len(ctx.options))
    if grad is None:
        return tuple(found)
    _refuse_second_derivatives(grad)
    gradients = ctx.gradients or _operator(*ctx.saved_tensors, *ctx.options)[-2:]
    ctx.gradients = None
    for place, wanted in enumerate(ctx.options[-2:]):
        if wanted and type(grad) is Tensor:
            torch.ops.mcore_sft.scale_(gradients[place], grad)
            found[place] = gradients[place]
        elif wanted:  # torch.compile traces: no output of the forward pass may change after it
            found[place] = gradients[place] * grad
    return tuple(found)


torch.library.register_autograd(
    "mcore_sft::linear_cross_entropy",
    _scale_gradients,
    setup_context=_keep_gradients,
    lib=AUTOGRAD,
)


class _IntoMainGrad(torch.autograd.Function):
    """The gradient of the weight goes into main_grad at once; that of hidden waits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: Tensor | None,
        main_grad: Tensor,
        options: Options,
    ) -> tuple[Tensor, ...]:
        for_hidden = ctx.needs_input_grad[0]
        loss, token_loss, grad_hidden = _mutating_operator(
            hidden, weight, labels, rows, main_grad, *options, for_hidden
        )
        ctx.mark_non_differentiable(token_loss)
        ctx.save_for_backward(grad_hidden, weight)
        return loss, token_loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives(grad)
        torch._assert_async(
            grad == 1,
            "the upstream gradient is not 1, but main_grad has the weight's gradient already: "
            "scale the gradients after the backward pass",
        )
        grad_hidden, weight = ctx.saved_tensors
        return (
            grad_hidden if ctx.needs_input_grad[0] else None,
            _empty_gradient(weight) if ctx.needs_input_grad[1] else None,
            *[None] * 4,
        )


def _empty_gradient(weight: Tensor) -> Tensor:
    """One without entries, so that hooks run and nothing is added.

    It is sparse: torch copies a dense one of stride 0 to its full size before it keeps it.
    """
    traced = torch.compiler.is_compiling()  # where sparse tensors are unknown
    return torch.zeros_like(weight, layout=torch.strided if traced else torch.sparse_coo)


class _PerRow(torch.autograd.Function):
    """One loss a row, whose gradients need another computation once the upstream ones are known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, weight, labels, rows)
        ctx.options = options
        _, token_loss, _, _ = _operator(hidden, weight, labels, rows, None, *options, False, False)
        ctx.mark_non_differentiable(token_loss)
        return token_loss.clone(), token_loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives(grad)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        *_, grad_hidden, grad_weight = _operator(
            *ctx.saved_tensors, grad, *ctx.options, for_hidden, for_weight
        )
        return (
            grad_hidden if for_hidden else None,
            grad_weight if for_weight else None,
            *[None] * 3,
        )
