"""Qwen3, dense: Llama with norms of the queries and keys of each head."""

from dataclasses import dataclass

from mcore_sft.model.families.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Qwen3(Llama):
    """Its heads are as wide as config.json says, which is not hidden size / heads."""

    needs = ("num_key_value_heads", "head_dim")
    qk_norm: bool = True
