"""What a Hugging Face folder's config.json says of a model, checked and in our own words.

config.json -> Architecture
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_sft.base.errors import UserError
from mcore_sft.base.model_folder import PLAIN, read_json, stored_types, weight_files
from mcore_sft.config import ConfigError, ParallelConfig

VOCAB_MULTIPLE = 16
"""Each rank's vocabulary rows are padded to a multiple of this, for the matrix units of GPUs."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """In what the models of one model_type are not Llama."""

    qkv_bias: bool = False
    qk_norm: bool = False
    needs: tuple[str, ...] = ()
    """Keys that every published config.json of the family has, and whose default is not Llama's."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(needs=("num_key_value_heads", "sliding_window")),
    "qwen2": Family(qkv_bias=True, needs=("num_key_value_heads",)),
    "qwen3": Family(qk_norm=True, needs=("num_key_value_heads", "head_dim")),
}
"""config.json's model_type -> family; Qwen2.5 calls itself qwen2."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the low frequencies of rotary embeddings."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a model that is Llama's, but for what its family differs in."""

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
    rope_factor: float = 1.0
    """Linear scaling: positions are divided by this."""
    tied: bool
    max_positions: int
    qkv_bias: bool = False
    """Whether queries, keys and values, and they alone, have a bias."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalized before they are turned."""
    window: int | None = None
    """Tokens that one token sees, where that is less than `max_positions`."""

    def padded_vocab(self, tensor: int) -> int:
        """Vocabulary rows when split over `tensor` ranks, each rank's share being aligned."""
        return math.ceil(self.vocab / (VOCAB_MULTIPLE * tensor)) * VOCAB_MULTIPLE * tensor

    @property
    def positions(self) -> int:
        """Positions that it is made for.

        Of linear scaling, `max_positions` is without it (Vicuna's 16k), or with it (DeepSeek
        Coder's), and nothing tells which: no length that either allows is refused.
        """
        scaled = self.max_positions * self.rope_factor
        if self.rope_scaling is not None:
            scaled = self.rope_scaling.original_max_positions * self.rope_scaling.factor
        return max(self.max_positions, int(scaled))

    def check(self, parallel: ParallelConfig, sequence_length: int = 0) -> None:
        """Raise `ConfigError` where the model cannot be split, or read so much, as is asked."""
        self.check_length(sequence_length)
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
        if self.layers % (parallel.pipeline * parallel.virtual):
            raise ConfigError(
                f"parallel.virtual {parallel.virtual} does not divide the "
                f"{self.layers // parallel.pipeline} layers of a pipeline stage: choose a divisor "
                f"of {self.layers // parallel.pipeline}"
            )

    def check_length(self, sequence_length: int) -> None:
        """Raise `ConfigError` where the model cannot read so many tokens."""
        if sequence_length > self.positions:
            raise ConfigError(
                f"data.sequence_length: the model has too few positions (got {sequence_length}, "
                f"expected at most {self.positions}: max_position_embeddings and the scaling of "
                f"RoPE in its config.json). Fix: data.sequence_length={self.positions}, or a model "
                "with more (model.path)"
            )
        if self.window is not None and sequence_length > self.window:
            raise ConfigError(
                f"data.sequence_length {sequence_length} is more than the sliding window of the "
                f"model's config.json, {self.window}, and attention here is full: set "
                f"data.sequence_length to {self.window} or less, or take a model without a window"
            )


def read(folder: Path) -> Architecture:
    """The architecture of the Hugging Face model in `folder`; raises `UserError`."""
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"model.path {folder}: no config.json there; give a Hugging Face folder"
        ) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"{path}: names no model_type, so it is no model's configuration")
    try:
        _refuse_what_cannot_be_built(path, config)
        _refuse_quantized_weights(path, config)
        return _architecture(path, config)
    except UserError:
        raise
    except KeyError as error:
        raise ConfigError(f"{path}: the key {error} is missing; copy the model again") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: a value is not what it should be: {error}") from None


def rope_frequencies(architecture: Architecture) -> Tensor:
    """Inverse frequencies [head_dim / 2] in fp32 of the rotary embedding.

    Llama 3's scaling leaves wavelengths below `original / high_freq_factor` alone, divides those
    above `original / low_freq_factor` by `factor`, and blends between (Llama 3.1 reference code).
    """
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (architecture.rope_theta ** (exponents / architecture.head_dim))
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies / architecture.rope_factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _architecture(path: Path, config: dict[str, Any]) -> Architecture:
    family = FAMILIES[config["model_type"]]
    for key in family.needs:
        if key not in config:
            raise KeyError(key)
    heads = config["num_attention_heads"]
    theta, factor, scaling = _rope(path, config)
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
        rope_factor=factor,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config["max_position_embeddings"],
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        window=_window(config),
    )


def _refuse_what_cannot_be_built(path: Path, config: dict[str, Any]) -> None:
    if config["model_type"] not in FAMILIES:
        raise ConfigError(
            f"{path}: model_type is {config['model_type']!r}; supported are {', '.join(FAMILIES)}"
        )
    expected = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "partial_rotary_factor": 1.0,
    }
    found = _rope_section(config) | config
    for key, value in expected.items():
        if found.get(key, value) not in (value, None):
            raise ConfigError(f"{path}: {key} is {found[key]!r}; only {value!r} is supported")


def _refuse_quantized_weights(path: Path, config: dict[str, Any]) -> None:
    """Raise `ConfigError` if the folder holds weights that are no plain numbers.

    A quantization beside plain weights is what is left of one that was undone.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return
    files = set(weight_files(path.parent).values())
    types = {found for file in files for found in stored_types(path.parent / file).values()}
    if not types <= PLAIN.keys():
        method = quantization
        if isinstance(quantization, dict):
            method = quantization.get("quant_method", "no quant_method")
        raise ConfigError(
            f"{path}: the weights are quantized (quantization_config: {method}), and a quantized "
            "model cannot be trained. Fix: take the unquantized model (model.path)"
        )


def _window(config: dict[str, Any]) -> int | None:
    """Qwen says by a key of its own whether its window is used; Llama has none."""
    used = config["model_type"] == "mistral" or config.get("use_sliding_window", False)
    window: int | None = config.get("sliding_window") if used else None
    return window if window and window < config["max_position_embeddings"] else None


def _rope_section(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 calls `rope_scaling`, and 5 `rope_parameters`."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope(path: Path, config: dict[str, Any]) -> tuple[float, float, RopeScaling | None]:
    """Base, linear factor and Llama 3's scaling."""
    rope = _rope_section(config)
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, 1.0, None
    if kind == "linear":
        return theta, float(rope["factor"]), None
    if kind != "llama3":
        raise ConfigError(
            f"{path}: rope scaling {kind!r} is not supported; expected 'default', 'linear' or "
            "'llama3'"
        )
    original = "original_max_position_embeddings"
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(config[original] if original in config else rope[original]),
    )
    return theta, 1.0, scaling
