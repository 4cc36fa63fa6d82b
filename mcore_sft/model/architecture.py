"""The shape of a model: its sizes, its table of weights, and what can be asked of it.

A family (families/) adds how its config.json is read and what its layers are made of.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mcore_sft.config import ConfigError, ParallelConfig
from mcore_sft.model.weight_table import Table, plain

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
class Architecture(ABC):
    """The sizes of a decoder-only model with rotary embeddings."""

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

    @abstractmethod
    def layer_weights(self, theirs: str) -> Table:
        """The weights of one layer by their names in it; Hugging Face calls the layer `theirs`."""

    @abstractmethod
    def layer_settings(self) -> dict[str, Any]:
        """Megatron-core's words for what the layers are made of."""

    @abstractmethod
    def set_norms(self, layer: Any, norm: type) -> None:
        """Put `norm` wherever Megatron-core's local `layer` (a ModuleSpec) has a norm."""

    def weights(self) -> Table:
        """Megatron-core's name of each weight of the model -> what it is made of."""
        table = {
            "embedding.word_embeddings.weight": plain(
                "model.embed_tokens.weight", self.vocab, self.hidden, split="rows"
            ),
            "decoder.final_layernorm.weight": plain("model.norm.weight", self.hidden),
        }
        if not self.tied:
            table["output_layer.weight"] = plain(
                "lm_head.weight", self.vocab, self.hidden, split="rows"
            )
        for layer in range(self.layers):
            table |= {
                f"decoder.layers.{layer}.{ours}": weight
                for ours, weight in self.layer_weights(f"model.layers.{layer}").items()
            }
        return table

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every Hugging Face tensor by name, in the order of the export."""
        shapes: dict[str, tuple[int, ...]] = {}
        for weight in self.weights().values():
            shapes |= weight.shapes
        return shapes

    def layer_size(self, tensor: int = 1, *, matrices: bool = False) -> int:
        """Numbers in a layer, or in its `matrices`, on one of so many tensor-parallel ranks."""
        return _layer_size(self, tensor, matrices)

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


@cache  # a plan asks for it thousands of times
def _layer_size(architecture: Architecture, tensor: int, matrices: bool) -> int:
    weights = architecture.layer_weights("").values()
    return sum(weight.share(tensor) for weight in weights if weight.is_matrix or not matrices)
