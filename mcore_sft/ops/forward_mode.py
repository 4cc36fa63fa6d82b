"""Derivatives in forward mode, which no operator has: asking for one is an error.

torch takes the tangent of what an operator of ours gives for 0, unless autograd is told otherwise.
Importing this module registers the refusal for every operator without a derivative of its own; one
that has a derivative is registered through `AUTOGRAD`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from mcore_sft.ops import library

library.load()


def refuse_forward_mode(name: str, *arguments: Any) -> None:
    """Raise `RuntimeError` if one of `arguments` is a tensor that carries a tangent."""
    if torch.compiler.is_compiling() or not torch._C._is_fwd_grad_enabled():
        return
    for value in arguments:
        if isinstance(value, Tensor) and _tangent(value) is not None:
            raise RuntimeError(
                f"{name} has no derivative in forward mode (torch.func.jvp, jacfwd, "
                "torch.autograd.forward_ad); use backward"
            )


def _tangent(value: Tensor) -> Tensor | None:
    found: Tensor | None = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
    return found


class _Refusing(Library):
    """Every kernel that is registered through it refuses tangents first."""

    def impl(self, op_name: str, fn: Callable[..., Any], *where: Any, **options: Any) -> None:
        """Register `fn`, which takes a keyset before the operator's arguments."""

        def kernel(keys: Any, *arguments: Any) -> Any:
            refuse_forward_mode(op_name, *arguments)
            return fn(keys, *arguments)

        super().impl(op_name, kernel, *where, **options)  # type: ignore[no-untyped-call]


AUTOGRAD = _Refusing("mcore_sft", "FRAGMENT")  # type: ignore[no-untyped-call]


def _without_derivative(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.mcore_sft, name).default

    def kernel(keys: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    return kernel


for _name in (
    "linear_cross_entropy_main_grad_",
    "scale_",
    "cross_entropy_statistics",
    "cross_entropy_gradient_",
    "cross_entropy_",
):
    AUTOGRAD.impl(_name, _without_derivative(_name), "Autograd", with_keyset=True)
