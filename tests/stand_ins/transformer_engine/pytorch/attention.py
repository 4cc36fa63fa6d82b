"""Attention within the documents of a pack."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformer_engine.pytorch.fp8 import EightBits


class DotProductAttention(EightBits):
    """Causal attention of [T, heads, width]; it has an extra state that nothing fills."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0
        self.softmax_scale = softmax_scale
        self.groups = (num_gqa_groups or num_attention_heads) // tp_size
        self.width = kv_channels
        self.register_load_state_dict_post_hook(_without_own_state)

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        """Attention [T, heads * width]; documents lie between neighbours in `cu_seqlens_q`."""
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert query_layer.dim() == key_layer.dim() == value_layer.dim() == 3
        assert key_layer.shape[1:] == (self.groups, self.width)
        assert cu_seqlens_q is not None
        assert cu_seqlens_kv is not None
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert cu_seqlens_q.device == query_layer.device
        assert cu_seqlens_q_padded is None
        assert cu_seqlens_kv_padded is None
        assert not pad_between_seqs
        starts = cu_seqlens_q.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        assert starts[0] == 0
        assert starts[-1] == query_layer.shape[0]
        assert min(lengths) > 0
        assert max_seqlen_q == max_seqlen_kv == max(lengths)
        heads = (tensor.transpose(0, 1) for tensor in (query_layer, key_layer, value_layer))
        documents = (tensor.split(lengths, 1) for tensor in heads)
        parts = [
            functional.scaled_dot_product_attention(
                query[None],
                key[None],
                value[None],
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=True,
            )[0]
            for query, key, value in zip(*documents, strict=True)
        ]
        return torch.cat(parts, 1).transpose(0, 1).reshape(query_layer.shape[0], -1)


def _without_own_state(module: torch.nn.Module, found: Any) -> None:
    """Checkpoints need not hold the extra state of attention."""
    for key in found.missing_keys:
        if "core_attention._extra_state" in key:
            found.missing_keys.remove(key)
