"""Norms."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In fp32, the weight too."""
    return functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


class RMSNorm(torch.nn.Module):
    """Root mean square norm; it has an extra state, which is empty."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        size = normalized_shape or hidden_size
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return rms_norm(x, self.weight, self.eps)

    def get_extra_state(self) -> Tensor:
        """No bytes."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """There is none."""


class LayerNorm(RMSNorm):
    """No model here has one."""
