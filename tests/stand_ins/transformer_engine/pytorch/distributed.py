"""Recomputation, and the table of random streams."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


class CudaRNGStatesTracker:
    """Nothing random is drawn."""


def activation_recompute_forward(*args: Any, **kwargs: Any) -> None:
    """Which Megatron-core imports, and calls only where outputs are thrown away."""
    raise AssertionError("outputs were thrown away")


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    """`function(*args)`, computed again in the backward pass with the same 8 bits."""
    assert not distribute_saved_activations
    state = FP8GlobalStateManager
    recipe, group = state.recipe, state.group
    scales: dict[Any, Any] = {}
    first = True

    def run(*inputs: Any) -> Any:
        nonlocal first
        before = (state.scales, state.again)
        state.scales, state.again = scales, not first
        again, first = not first, False
        try:
            if not again:
                return function(*inputs, **kwargs)
            with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe, fp8_group=group):
                return function(*inputs, **kwargs)
        finally:
            state.scales, state.again = before

    assert any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    return torch_checkpoint(run, *args, use_reentrant=True)
