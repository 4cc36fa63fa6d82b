"""Tiny models with real structure, and batches for them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mcore_sft.data.batch import Batch, collate
from mcore_sft.data.pack import Pack
from mcore_sft.data.prompt import Example

VOCAB = 611
"""No tensor-parallel size divides it."""


def make_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Llama: grouped queries, SwiGLU, llama3 RoPE scaling that bites at position 32."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than at initialization, so that attention and norms matter to the result.
            weight.normal_(1.0, 0.2) if "norm" in name else weight.normal_(0.0, 0.08)
    model.save_pretrained(folder)
    return folder


def make_batch(
    lengths: Sequence[int], *, length: int, seed: int = 0, prompts: Sequence[int] | None = None
) -> Batch:
    """One pack of random documents; each learns all tokens but its first third (or `prompts`)."""
    return collate([make_pack(lengths, seed=seed, prompts=prompts)], length, pad_id=0)


def make_pack(
    lengths: Sequence[int], *, seed: int = 0, prompts: Sequence[int] | None = None
) -> Pack:
    """Random documents of the given lengths."""
    random = np.random.default_rng(seed)
    starts = prompts if prompts is not None else [size // 3 for size in lengths]
    return Pack(
        examples=tuple(
            Example(
                tokens=random.integers(0, VOCAB, size, dtype=np.int32),
                spans=np.array([[start, size]] if start < size else [], np.int32).reshape(-1, 2),
            )
            for size, start in zip(lengths, starts, strict=True)
        )
    )


def hf_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content
