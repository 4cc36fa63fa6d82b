"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values."""

from dataclasses import dataclass

from mcore_sft.model.families.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Qwen2(Llama):
    """Qwen2.5 calls itself qwen2 too."""

    needs = ("num_key_value_heads",)
    qkv_bias: bool = True
