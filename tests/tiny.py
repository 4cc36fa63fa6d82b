"""Tiny models with real structure, and batches for them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mcore_sft.data.packs.batch import Batch, collate
from mcore_sft.data.packs.pack import Pack
from mcore_sft.data.text.prompt import Example

VOCAB = 611
"""No tensor-parallel size divides it."""


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""Scaling that bites at position 32."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-2": {"model_type": "llama", "num_key_value_heads": 4, "head_dim": 16},
    "llama-3": {"model_type": "llama"},
    "llama-3.1": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama-3.2": {
        "model_type": "llama",
        "rope_parameters": LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2.5": {"model_type": "qwen2", "head_dim": 16},
    "qwen2.5-tied": {"model_type": "qwen2", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
}
"""What the models that we know differ in; the head width is not hidden / heads where it can be."""


def make_model(folder: Path, *, seed: int = 0, family: str = "llama-3.1", **changes: Any) -> Path:
    """A random model with grouped queries, SwiGLU and the oddities of its family."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**(settings | FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config)
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
