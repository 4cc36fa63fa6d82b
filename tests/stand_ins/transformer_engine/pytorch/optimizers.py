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
    """`op` on lists of tensors, which lie on a GPU."""
    raise AssertionError("a CUDA kernel of Transformer Engine was called on the CPU")


def multi_tensor_l2norm(*args: Any) -> tuple[Tensor, None]:
    """The norm [1] of all tensors of the first list; never on the CPU."""
    raise AssertionError("a CUDA kernel of Transformer Engine was called on the CPU")


def multi_tensor_scale(*args: Any) -> None:
    """Make the second list the first times a number; never on the CPU."""
    raise AssertionError("a CUDA kernel of Transformer Engine was called on the CPU")


def multi_tensor_scale_tensor(*args: Any) -> None:
    """Make the second list the first times a tensor; never on the CPU."""
    raise AssertionError("a CUDA kernel of Transformer Engine was called on the CPU")
