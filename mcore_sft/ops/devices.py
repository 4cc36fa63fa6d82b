"""What the operators written in Python do on CPU tensors, on CUDA tensors and on fake ones.

Importing this module registers them; csrc/ops.cpp has their schemas.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mcore_sft.ops.head import Head, Inputs, Machine, Options, arithmetic

_HEAD = "mcore_sft::linear_cross_entropy"


def _add_product_cpu(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if fresh else 1, out=total)
        return
    # torch has no product of bf16 in fp32 here: it is rounded once, and then added in fp32.
    for part, columns in _slices(total, left):
        product = columns @ right
        part.copy_(product) if fresh else part.add_(product)


def _add_product_exactly_cpu(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    right = right.to(total.dtype)
    for part, columns in _slices(total, left):
        torch.addmm(part, columns.to(total.dtype), right, beta=0 if fresh else 1, out=part)


def _slices(total: Tensor, left: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, some vocabulary rows at a time, so that what lies between them stays small."""
    rows = max(1, (2 << 20) // (total.shape[1] * total.element_size()))
    return zip(torch.split(total, rows), torch.split(left, rows), strict=True)


def _add_product_cuda(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    beta = 0 if fresh else 1
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    else:
        addmm = torch.ops.aten.addmm.dtype_out
        addmm(total, left, right, total.dtype, beta=beta, out=total)


def _chunk_rows_cpu(weight: Tensor) -> int:
    """Every chunk adds to the weight's gradient in memory, which made a head of width 1,024 a third
    slower at 112 rows than at 256; larger ones gain little.
    """
    return {2: 448, 4: 320, 8: 160}[weight.element_size()]


def _chunk_rows_cuda(weight: Tensor) -> int:
    """A GiB of logits: with fewer than some 2,000 rows, adding up the weight's gradient in memory
    takes longer than its product (two passes over 4 bytes against 2 C operations an element).
    """
    return max(128, (1 << 30) // (len(weight) * weight.element_size()) // 128 * 128)


def _scale_cpu(values: Tensor, factor: Tensor) -> None:
    if factor != 1:
        values.mul_(factor)


def _scale_cuda(values: Tensor, factor: Tensor) -> None:
    values.mul_(factor)


def _head(machine: Machine) -> Callable[..., tuple[Tensor, ...]]:
    """linear_cross_entropy; its arguments are Inputs, upstream, Options, for_hidden, for_weight."""

    def compute(*arguments: Any) -> tuple[Tensor, ...]:
        upstream, *options, for_hidden, for_weight = arguments[4:]
        inputs = Inputs(*arguments[:4])
        return Head(machine, inputs, Options(*options), for_hidden, for_weight, upstream).run()

    return compute


def _head_into_main_grad(machine: Machine) -> Callable[..., tuple[Tensor, ...]]:
    """linear_cross_entropy_main_grad_; the arguments are Inputs, main_grad, Options, for_hidden."""

    def compute(*arguments: Any) -> tuple[Tensor, ...]:
        main_grad, *options, for_hidden = arguments[4:]
        inputs = Inputs(*arguments[:4])
        head = Head(machine, inputs, Options(*options), for_hidden, True, main_grad=main_grad)
        return head.run()

    return compute


for _device, _machine, _scale in (
    ("cpu", Machine(_chunk_rows_cpu, 16, _add_product_cpu, _add_product_exactly_cpu), _scale_cpu),
    ("cuda", Machine(_chunk_rows_cuda, 128, _add_product_cuda, _add_product_cuda), _scale_cuda),
):
    torch.library.impl(_HEAD, _device, _head(_machine))
    torch.library.impl(_HEAD + "_main_grad_", _device, _head_into_main_grad(_machine))
    torch.library.impl("mcore_sft::scale_", _device, _scale)


@torch.library.register_fake(_HEAD)  # type: ignore[untyped-decorator]
def _fake_head(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, labels = arguments[:3]
    for_hidden, for_weight = arguments[-2:]
    token_loss = labels.new_empty(labels.shape, dtype=arithmetic(hidden.dtype))
    return (
        token_loss.new_empty(()),
        token_loss,
        hidden.new_empty(hidden.shape if for_hidden else 0),
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
    )


@torch.library.register_fake(_HEAD + "_main_grad_")  # type: ignore[untyped-decorator]
def _fake_head_into_main_grad(*arguments: Any) -> tuple[Tensor, ...]:
    losses_and_gradients: tuple[Tensor, ...] = _fake_head(*arguments[:3], arguments[-1], False)
    return losses_and_gradients[:-1]
