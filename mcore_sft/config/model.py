"""What is trained: the model, and how it is split over processes."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from mcore_sft.config.section import ConfigError, Count, Place, Section


class ModelConfig(Section):
    """The model that training starts from."""

    path: Place
    """Hugging Face folder (config.json, safetensors) that training starts from."""
    tokenizer: Place | None = None
    """Folder, tokenizer.json or sentencepiece .model; without it, the model's own."""
    layers: Literal["auto", "local", "apex", "transformer_engine"] = "auto"
    """Layer implementation: `auto` is Transformer Engine for bf16 on CUDA, else local; `apex` is
    local with the norms and the weight gradients of NVIDIA's Apex, on CUDA alone."""

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer is read from."""
        return self.tokenizer or self.path


class ParallelConfig(Section):
    """How the model is split over processes."""

    tensor: Count = 1
    """Tensor-parallel ranks."""
    sequence: bool = False
    """Sequence parallelism over the tensor-parallel ranks."""
    pipeline: Count = 1
    """Pipeline stages."""
    virtual: Count = 1
    """Model chunks of each pipeline stage, which take turns (interleaved schedule): shorter waits
    for more messages."""
    context: Count = 1
    """Context-parallel ranks, which share the tokens of each document. Data parallelism is what is
    left of the world."""
    distributed_optimizer: bool = False
    """Whether ranks that hold the same weights share the optimizer's states (ZeRO stage 1)."""
    overlap: bool = False
    """Whether gradients are reduced while the backward pass goes on and, with the distributed
    optimizer, weights are gathered while the forward pass does."""

    @property
    def fewest_micro_batches(self) -> int:
        """Micro-batches that a step needs: the interleaved schedule takes one for each stage."""
        return self.pipeline if self.virtual > 1 else 1

    @property
    def model_size(self) -> int:
        """Processes that hold the model once; data parallelism takes a multiple of them."""
        return self.tensor * self.pipeline * self.context

    def require_split(self, size: int, named: str, mend: str) -> None:
        """Raise `ConfigError` unless `size` processes, which are `named`, hold whole models."""
        if size % self.model_size:
            raise ConfigError(
                f"{size} {named} cannot be split into parallel.tensor {self.tensor} x "
                f"parallel.pipeline {self.pipeline} x parallel.context {self.context}: {mend}"
            )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor of at least 2, given 1")
        if self.virtual > 1 and self.pipeline == 1:
            raise ValueError(f"virtual: {self.virtual} needs pipeline of at least 2, given 1")
        return self
