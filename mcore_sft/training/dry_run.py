"""The real model, gradient buffers and optimizer of one rank, without their bytes.

Everything is built as for training, by the same functions, on the meta device: tensors of a full
size without memory. The other ranks are torch's "fake" process group, which answers at once.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mcore_sft.config import RunConfig
from mcore_sft.model import build
from mcore_sft.model.architecture import Architecture
from mcore_sft.model.build import Chunks
from mcore_sft.runtime import mesh as meshes
from mcore_sft.runtime.cpu import megatron_on_cpu
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training import optimizer as optim

from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer

META = torch.device("meta")


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
    with megatron_on_cpu(), _alone(config, rank, gpus) as mesh, META, _OnMeta():
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


@contextlib.contextmanager
def _alone(config: RunConfig, rank: int, size: int) -> Iterator[Mesh]:
    """The mesh of one rank among others that are not there."""
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs | {"backend": "fake", "pg_options": None})

    def agree(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with (
            mock.patch.object(dist, "new_group", fake_group),
            mock.patch.object(dist, "all_gather_object", agree),
        ):
            yield meshes.lay_out(config.parallel, META)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class _OnMeta(TorchFunctionMode):
    """Tensors that name a device are made on meta too, and have the types that a GPU's have."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return str(torch.empty(0, dtype=args[0].dtype, device="cpu").type())
        return func(*args, **kwargs)
