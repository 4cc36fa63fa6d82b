"""The context in which layers compute with 8 bits, and how their inputs are rounded."""

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Recipe

LARGEST = 448.0
BLOCK = 128


class FP8GlobalStateManager:
    """What holds in the innermost context."""

    recipe: Recipe | None = None
    group: Any = None
    depth = 0
    used: list["EightBits"]
    """Modules that have seen new largest values since the outermost context was entered."""
    scales: dict[Any, Any] | None = None
    """What modules that are to compute the same again later rounded with."""
    again = False

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether layers compute with 8 bits."""
        return cls.recipe is not None


FP8GlobalStateManager.used = []


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Let layers inside compute with 8 bits."""
    assert not calibrating
    state = FP8GlobalStateManager
    before = (state.recipe, state.group)
    state.recipe, state.group = (fp8_recipe, fp8_group) if enabled else (None, None)
    state.depth += 1
    try:
        yield
    finally:
        state.depth -= 1
        if enabled and state.depth == 0 and torch.is_grad_enabled() and not state.again:
            while state.used:
                state.used.pop(0).update(state.group)
        state.recipe, state.group = before


@contextlib.contextmanager
def fp8_model_init(
    enabled: bool = True,
    recipe: Recipe | None = None,
    preserve_high_precision_init_val: bool = False,
) -> Iterator[None]:
    """Make weights of 8 bits inside, which no layer here has."""
    assert not enabled
    yield


class EightBits(torch.nn.Module):
    """A layer that may compute with 8 bits, and what it keeps for delayed scaling."""

    def __init__(self) -> None:
        super().__init__()
        self.recipes: list[str | None] = []
        """The recipe of each forward pass, for tests to see."""
        self.history: Tensor | None = None
        self.scale = torch.ones(2)

    def rounded(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight as the recipe rounds them; gradients go through."""
        state = FP8GlobalStateManager
        self.recipes.append(type(state.recipe).__name__ if state.recipe else None)
        if state.recipe is None:
            return x, weight
        for tensor in (x, weight):
            assert tensor.shape[:-1].numel() % 8 == 0, f"rows of {tuple(tensor.shape)}"
            assert tensor.shape[-1] % 16 == 0, f"columns of {tuple(tensor.shape)}"
        # What cuBLAS wants besides for the products of the backward pass.
        assert x.shape[:-1].numel() % 16 == 0, f"rows of {tuple(x.shape)}"
        assert weight.shape[0] % 16 == 0, f"rows of {tuple(weight.shape)}"
        if not isinstance(state.recipe, DelayedScaling):
            block = isinstance(state.recipe, Float8BlockScaling)
            return _rounded(x, _scale(x, block)), _rounded(weight, _scale(weight, block))
        if self.history is None:
            self.history = torch.zeros(state.recipe.amax_history_len, 2)
        if state.again:
            scale = state.scales[self]
        else:
            scale = self.scale
            largest = torch.stack([x.detach().abs().max(), weight.detach().abs().max()])
            self.history[0] = torch.maximum(self.history[0], largest.float())
            if torch.is_grad_enabled() or state.scales is not None:
                state.used.append(self)
        if state.scales is not None:
            state.scales[self] = scale
        return _rounded(x, scale[0]), _rounded(weight, scale[1])

    def update(self, group: Any) -> None:
        """Take over the largest values of this pass."""
        if dist.is_initialized():
            dist.all_reduce(self.history, op=dist.ReduceOp.MAX, group=group)
        largest = self.history.max(0).values
        self.scale = torch.where(largest > 0, LARGEST / largest, self.scale)
        self.history = self.history.roll(-1, 0)
        self.history[0] = 0

    def get_extra_state(self) -> Tensor:
        """Bytes; none where nothing was computed with 8 bits."""
        if not any(self.recipes) and self.history is None:
            return torch.empty(0, dtype=torch.uint8)
        state = {"scale": self.scale, "history": self.history}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """What `get_extra_state` gave."""
        if state is not None and state.numel():
            found = pickle.loads(state.detach().cpu().numpy().tobytes())
            self.scale, self.history = found["scale"], found["history"]


def _scale(x: Tensor, block: bool) -> Tensor:
    largest = x.detach().abs()
    if block:
        parts = [part.amax(-1, True).expand_as(part) for part in largest.split(BLOCK, -1)]
        largest = torch.cat(parts, -1)
    else:
        largest = largest.max()
    return torch.where(largest > 0, LARGEST / largest, 1.0)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    eight = (x.detach() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return x + ((eight.float() / scale).to(x.dtype) - x.detach())
