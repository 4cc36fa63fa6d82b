"""The pieces that Megatron-core's local layers lack on CPU: packed attention and RMSNorm.

T = rows of the pack, H = query heads of this rank, G = key-value heads of this rank, D = head width
"""

import itertools
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class RMSNorm(torch.nn.Module):
    """Root mean square norm whose weight is marked for sequence parallelism.

    Megatron-core's own torch norm refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of `x` in fp32, then scale it in its own precision."""
        normal = functional.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return self.weight * normal.to(x.dtype)


class PackedAttention(torch.nn.Module):
    """Causal attention within each document of a pack, and never across two.

    Megatron-core's own local attention refuses packed sequences.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number

    def forward(
        self,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        packed_seq_params: PackedSeqParams,
        **kwargs: Any,
    ) -> Tensor:
        """Attention [T, H * D]; documents lie between neighbours in `cu_seqlens_q`."""
        starts = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        documents = (torch.split(tensor, lengths) for tensor in (query_THD, key_TGD, value_TGD))
        outputs = [
            functional.scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                is_causal=True,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
            for query, key, value in zip(*documents, strict=True)
        ]
        return torch.cat(outputs).reshape(query_THD.shape[0], -1)
