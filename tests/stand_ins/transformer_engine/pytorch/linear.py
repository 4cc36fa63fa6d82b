"""Products with weights, split over tensor ranks or not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformer_engine.common.recipe import Float8BlockScaling
from transformer_engine.pytorch.fp8 import BLOCK, EightBits, FP8GlobalStateManager
from transformer_engine.pytorch.norm import rms_norm


class _AddedInPlace(torch.autograd.Function):
    """x W^T, whose gradient of W is added to W.main_grad; autograd gets one that nobody reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, rounded: Tensor) -> Tensor:
        """The product of x [..., K] and `rounded`, which stands for the weight."""
        ctx.save_for_backward(x, rounded)
        ctx.weight = weight
        return functional.linear(x, rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """As the real one leaves it: Megatron-core's hook runs, and adds nothing more."""
        (gradient,) = gradients
        x, rounded = ctx.saved_tensors
        ctx.weight.main_grad += gradient.flatten(0, -2).t().float() @ x.flatten(0, -2).float()
        ctx.weight.grad_added_to_main_grad = True
        return gradient @ rounded, torch.full_like(rounded, torch.nan), None


class Linear(EightBits):
    """x W^T + b."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        assert not return_bias
        self.tp_group, self.tp_size = tp_group, tp_group.size() if tp_group else tp_size
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.save_original_input = save_original_input
        self.use_bias = bias
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        place = {"dtype": params_dtype, "device": device}
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **place))
        self._split(self.weight, 1 if parallel_mode == "row" else 0)
        self.bias: Any = torch.empty(0, **place)
        if bias:
            assert parallel_mode == "column"
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **place))
            self._split(self.bias, 0)

    def _split(self, weight: Any, dimension: int) -> None:
        weight.tensor_model_parallel = True
        weight.partition_dim = dimension
        weight.partition_stride = 1

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """The product with x [..., K], and what is to be said to the other tensor ranks."""
        from megatron.core.tensor_parallel import mappings

        group = self.tp_group
        column, row = (self.parallel_mode == mode for mode in ("column", "row"))
        recipe = FP8GlobalStateManager.recipe
        if column and self.sequence_parallel:
            if isinstance(recipe, Float8BlockScaling):
                sizes = (x.shape[:-1].numel(), x.shape[-1])
                assert all(size % BLOCK == 0 for size in sizes), (
                    f"All-gather requires quantizable tensor, given {sizes}"
                )
            x = mappings.gather_from_sequence_parallel_region(x, group=group)
        elif column:
            x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        x, weight = self.rounded(x, self.weight)
        if self.fuse_wgrad_accumulation:
            y = _AddedInPlace.apply(x, self.weight, weight)
        else:
            y = functional.linear(x, weight)
        if row and self.sequence_parallel:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
        elif row:
            y = mappings.reduce_from_tensor_model_parallel_region(y, group=group)
        return y + self.bias if self.use_bias else y


class LayerNormLinear(Linear):
    """norm(x) W^T + b."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(in_features, out_features, **settings)
        assert normalization == "RMSNorm"
        assert not return_layernorm_output
        assert not zero_centered_gamma
        self.eps = eps
        place = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, **place))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """The product with the normalized x [..., K]."""
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps), is_first_microbatch)


class GroupedLinear(torch.nn.Module):
    """No model here has experts."""
