"""What Megatron-core takes from here wherever Transformer Engine is installed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Never to be made: the optimizer is torch's on every device."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("Transformer Engine's Adam was made")


class FusedSGD(FusedAdam):
    """Never to be made either."""


def multi_tensor_applier(
    op: Callable[..., Any], overflow: Tensor, lists: list[list[Tensor]], *args: Any
) -> Any:
    """`op` on lists of tensors."""
    return op(2048 * 32, overflow, lists, *args)


def multi_tensor_l2norm(
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """The norm [1] of all tensors of the first list."""
    assert not per_tensor
    return torch.stack([tensor.float().square().sum() for tensor in lists[0]]).sum().sqrt()[
        None
    ], None


def multi_tensor_scale(
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], scale: float
) -> None:
    """The second list becomes the first times `scale`."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
