"""Pieces of layers: packed attention and RMSNorm, which Megatron-core's local layers lack on CPU,
and Transformer Engine's SwiGLU.

T = rows of the pack on this rank, H = query heads of this rank, G = key-value heads of this rank,
D = head width
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mcore_sft.runtime import megatron_core  # noqa: F401  (before Megatron-core itself)

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


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


class ApexRMSNorm(RMSNorm):
    """The same norm by one kernel of NVIDIA's Apex, that of its FusedRMSNorm, which rounds once."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize and scale the last dimension of `x` in fp32."""
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        normal: Tensor = fused_rms_norm_affine(x, self.weight, (x.shape[-1],), self.eps)
        return normal


class FusedSwiGLU(torch.nn.Module):
    """silu(a) b of [..., a b] as one kernel of Transformer Engine, of which no checkpoint knows."""

    def __init__(self) -> None:
        super().__init__()
        from transformer_engine.pytorch.ops import SwiGLU

        self._operation = (SwiGLU(),)  # a module too, with an empty state of its own

    def forward(self, x: Tensor) -> Tensor:
        """The product, half as wide."""
        product: Tensor = self._operation[0](x)
        return product

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing."""
        return {}


class PackedAttention(torch.nn.Module):
    """Causal attention within each document of a pack, and never across two.

    Megatron-core's own local attention refuses packed sequences. Where context-parallel ranks share
    the documents (data/packs/batch.py says how), each gathers the keys and values of all.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.context = pg_collection.cp

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
        if self.context.size() > 1:
            outputs = self._shared(query_THD, key_TGD, value_TGD, lengths)
        else:
            documents = (torch.split(tensor, lengths) for tensor in (query_THD, key_TGD, value_TGD))
            outputs = [_attend(*document) for document in zip(*documents, strict=True)]
        return torch.cat(outputs).reshape(query_THD.shape[0], -1)

    def _shared(
        self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, lengths: list[int]
    ) -> list[Tensor]:
        """The outputs of this rank's two parts of each document, of 2 * ranks parts."""
        rank, ranks = self.context.rank(), self.context.size()
        both = gather_from_sequence_parallel_region(
            torch.stack((key_TGD, value_TGD), dim=1), group=self.context
        )
        sizes = [length // (2 * ranks) for length in lengths for _ in range(2)]
        queries = torch.split(query_THD, sizes)
        of_ranks = [torch.split(share, sizes) for share in both.chunk(ranks)]
        outputs = []
        for front in range(0, len(sizes), 2):
            parts = [share[front] for share in of_ranks]
            parts += [share[front + 1] for share in reversed(of_ranks)]
            key, value = torch.cat(parts).unbind(1)
            for query, place in (
                (queries[front], rank),
                (queries[front + 1], 2 * ranks - 1 - rank),
            ):
                end = sizes[front] * (place + 1)
                outputs.append(_attend(query, key[:end], value[:end]))
        return outputs


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention [Q, H, D] of the last Q rows of a document to those up to themselves."""
    rows, before = query.shape[0], key.shape[0] - query.shape[0]
    mask = None
    if before:
        mask = torch.ones(rows, key.shape[0], dtype=torch.bool, device=query.device).tril(before)
    output = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)
