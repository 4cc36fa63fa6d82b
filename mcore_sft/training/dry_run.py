"""The real model, gradient buffers and optimizer of one rank, without their bytes.

Everything is built as for training, by the same functions, on the meta device: tensors of a full
size without memory. The other ranks are torch's "fake" process group, which answers at once.
"""

from dataclasses import dataclass

import torch

from mcore_sft.config import RunConfig
from mcore_sft.model import build
from mcore_sft.model.architecture import Architecture
from mcore_sft.model.build import Chunks
from mcore_sft.runtime import mesh as meshes
from mcore_sft.runtime.fake import rank_without_memory
from mcore_sft.training import optimizer as optim

from megatron.core.optimizer import ChainedOptimizer


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that one rank holds from its first update on."""

    weights: int
    gradients: int
    optimizer: int


def dry_run(config: RunConfig, architecture: Architecture, gpus: int) -> list[Held]:
    """What a rank of each pipeline stage holds when `gpus` processes train `config`.

    Layers are the local ones, whose weights have the shapes of Transformer Engine's.
    """
    meshes.check(config.parallel, gpus)
    stages = config.parallel.pipeline
    return [_held(config, architecture, gpus, stage * gpus // stages) for stage in range(stages)]


def _held(config: RunConfig, architecture: Architecture, gpus: int, rank: int) -> Held:
    settings = config.model.model_copy(update={"layers": "local"})
    train = config.train.model_copy(update={"fp8": "none", "fp8_bf16_ends": 0})
    with rank_without_memory(config.parallel, rank, gpus) as mesh:
        model = build.build(architecture, settings, train, mesh)
        optimizer = optim.build(config.optimizer, train, model, mesh)
        return held(model, optimizer)


def held(model: Chunks, optimizer: ChainedOptimizer) -> Held:
    """The bytes of real objects."""
    buffers = [buffer for chunk in model for buffer in chunk.buffers]
    weights = [weight for chunk in model for weight in chunk.parameters()]
    states = 0
    for part in optimizer.chained_optimizers:
        states += sum(
            value.nbytes
            for state in part.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        # Of fp32 weights, the model's own are updated, or views of them.
        if any(weight.dtype != torch.float32 for weight in weights):
            states += sum(
                main.nbytes for group in part.optimizer.param_groups for main in group["params"]
            )
    return Held(
        weights=sum(weight.nbytes for weight in weights),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=states,
    )
