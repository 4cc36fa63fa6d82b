"""What a Hugging Face folder's config.json says of a model, checked and in our own words.

config.json -> Architecture
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_sft.config import ConfigError, ParallelConfig

VOCAB_MULTIPLE = 16
"""Each rank's vocabulary rows are padded to a multiple of this, for the matrix units of GPUs."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the low frequencies of rotary embeddings."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a Llama-family model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    max_positions: int

    def padded_vocab(self, tensor: int) -> int:
        """Vocabulary rows when split over `tensor` ranks, each rank's share being aligned."""
        return math.ceil(self.vocab / (VOCAB_MULTIPLE * tensor)) * VOCAB_MULTIPLE * tensor

    def check(self, parallel: ParallelConfig) -> None:
        """Raise `ConfigError` where the model cannot be split as `parallel` asks."""
        for what, count in (
            ("attention heads", self.heads),
            ("key-value heads", self.kv_heads),
            ("intermediate width", self.intermediate),
        ):
            if count % parallel.tensor:
                raise ConfigError(
                    f"parallel.tensor {parallel.tensor} does not divide the model's "
                    f"{count} {what}: choose a divisor of {count}"
                )
        if self.layers % parallel.pipeline:
            raise ConfigError(
                f"parallel.pipeline {parallel.pipeline} does not divide the model's "
                f"{self.layers} layers: choose a divisor of {self.layers}"
            )


def read(folder: Path) -> Architecture:
    """The architecture of the Hugging Face model in `folder`; raises `ConfigError`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"model.path {folder}: no config.json there; give a Hugging Face folder"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"{path}: names no model_type, so it is no model's configuration")
    _refuse_what_is_not_llama(path, config)
    try:
        return _architecture(path, config)
    except KeyError as error:
        raise ConfigError(f"{path}: the key {error} is missing; is this a Llama model?") from None
    except TypeError as error:
        raise ConfigError(f"{path}: a number is not a number: {error}") from None


def rope_frequencies(architecture: Architecture) -> Tensor:
    """Inverse frequencies [head_dim / 2] in fp32 of the rotary embedding.

    Llama 3's scaling leaves wavelengths below `original / high_freq_factor` alone, divides those
    above `original / low_freq_factor` by `factor`, and blends between (Llama 3.1 reference code).
    """
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (architecture.rope_theta ** (exponents / architecture.head_dim))
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _architecture(path: Path, config: dict[str, Any]) -> Architecture:
    heads = config["num_attention_heads"]
    theta, scaling = _rope(path, config)
    return Architecture(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config["max_position_embeddings"],
    )


def _refuse_what_is_not_llama(path: Path, config: dict[str, Any]) -> None:
    expected = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
    }
    for key, value in expected.items():
        if config.get(key, value) not in (value, None):
            raise ConfigError(f"{path}: {key} is {config[key]!r}; only {value!r} is supported")


def _rope(path: Path, config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from either form: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(
            f"{path}: rope scaling {kind!r} is not supported; expected 'default' or 'llama3'"
        )
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )
