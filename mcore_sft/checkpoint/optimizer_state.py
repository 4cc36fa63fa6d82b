"""The optimizer's state as tensors of the model's shapes, whatever optimizer and layout held it.

    weights, AdamW -> step, and of each weight exp_avg, exp_avg_sq and, under bf16, the fp32 main

Megatron-core's distributed optimizer holds a run of each flattened weight on each rank, and its own
checkpoint formats take or bring back a wrong step with torch's AdamW. Here the runs of a weight are
put together on one of its ranks, each rank having its share of the weights, so that what is written
is what the plain optimizer would write.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mcore_sft.runtime.mesh import Mesh

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main"


def state(optimizer: ChainedOptimizer, model_state: Mapping[str, Any], mesh: Mesh) -> Any:
    """What to write of `optimizer`; `model_state` is that of the weights. Collective."""
    found: dict[str, Any] = {}
    for number, weight in enumerate(_weights(optimizer, model_state)):
        owner = number % mesh.replicas.size
        for name in weight.names:
            if weight.run is None:
                tensor: Tensor | None = weight.held(name)
                replica = weight.sharded.replica_id
            else:
                tensor = _together(weight, name, owner, mesh)
                replica = (*weight.sharded.replica_id[:-1], 0)
            if tensor is not None:
                found[f"{name}.{weight.sharded.key}"] = _sharded(weight, name, tensor, replica)
    return {"step": _step(optimizer), "of": found}


def wanted(optimizer: ChainedOptimizer, model_state: Mapping[str, Any]) -> Any:
    """What to read for `optimizer`: the whole of each weight that this rank has a run of."""
    found: dict[str, Any] = {}
    for weight in _weights(optimizer, model_state):
        if weight.main is None:
            continue
        for name in weight.names:
            tensor = torch.empty(weight.model.shape, dtype=torch.float32)
            found[f"{name}.{weight.sharded.key}"] = _sharded(
                weight, name, tensor, weight.sharded.replica_id
            )
    return {"step": 0, "of": found}


def restore(optimizer: ChainedOptimizer, model_state: Mapping[str, Any], read: Any) -> None:
    """Take over what was `read` of what was `wanted`."""
    for weight in _weights(optimizer, model_state):
        if weight.main is None:
            continue
        for name in weight.names:
            tensor = read["of"][f"{name}.{weight.sharded.key}"]
            weight.held(name).copy_(tensor if weight.run is None else tensor.view(-1)[weight.run])
        weight.state["step"].fill_(read["step"])


def size(optimizer: ChainedOptimizer, model_state: Mapping[str, Any]) -> int:
    """Bytes of weights and of their `state` that are saved, of those that are this rank's first."""
    return sum(
        weight.model.nbytes + 4 * weight.model.numel() * len(weight.names)
        for weight in _weights(optimizer, model_state)
        if is_main_replica(weight.sharded.replica_id)
    )


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """One weight of this rank: the model's own, and what the optimizer updates in its place."""

    model: Tensor
    sharded: ShardedTensor | ShardedTensorFactory
    main: Tensor | None
    """None if other ranks update all of it."""
    run: slice | None
    """Of the flattened weight, where several ranks update it."""
    state: dict[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """What is kept of it; an fp32 weight is its own main one."""
        return MOMENTS if self.model.dtype == torch.float32 else (*MOMENTS, MAIN)

    def held(self, name: str) -> Tensor:
        """The tensor of this name, of the main weight's shape."""
        assert self.main is not None
        return self.main.detach() if name == MAIN else self.state[name]


def _weights(optimizer: ChainedOptimizer, model_state: Mapping[str, Any]) -> Iterator[_Weight]:
    """The weights in an order that is the same on all ranks that hold them."""
    (own,) = optimizer.chained_optimizers
    for sharded in nested_values(model_state):
        model = getattr(sharded, "data", None)
        if not isinstance(model, torch.nn.Parameter):
            continue
        main, run = model, None
        if isinstance(own, DistributedOptimizer):
            main, run = _run(own, model)
        elif model.dtype != torch.float32:
            main = model.main_param  # type: ignore[attr-defined]
        held = own.optimizer.state[main] if main is not None else {}
        yield _Weight(model=model, sharded=sharded, main=main, run=run, state=held)


def _run(own: DistributedOptimizer, model: Tensor) -> tuple[Any, slice]:
    """The main weights of this rank's run of a flattened weight, and where the run lies."""
    if model not in own.model_param_gbuf_map:
        return None, slice(0, 0)
    group, place = own.model_param_group_index_map[model]
    run = own._get_model_param_range_map(model)["param"]
    return own.optimizer.param_groups[group]["params"][place], slice(run.start, run.end)


def _together(weight: _Weight, name: str, owner: int, mesh: Mesh) -> Tensor | None:
    """The runs of all ranks, on the CPU of the `owner` among those that hold the weight."""
    whole = torch.zeros(weight.model.numel(), device=mesh.device)
    if weight.main is not None:
        whole[weight.run] = weight.held(name)
    # As integers: each bit comes from one rank, and -0.0 stays what it is.
    mesh.reduce_to_replica(owner, whole.view(torch.int32))
    return whole.view(weight.model.shape).cpu() if mesh.replicas.rank == owner else None


def _sharded(
    weight: _Weight, name: str, tensor: Tensor, replica: Any
) -> ShardedTensor | ShardedTensorFactory:
    """`tensor` under a name of its own, where the weight lies in the whole model."""
    made = make_sharded_optimizer_tensor(weight.sharded, tensor, f"optimizer.{name}")
    return replace(made, replica_id=replica)


def _step(optimizer: ChainedOptimizer) -> int:
    """The updates that were made."""
    (own,) = optimizer.chained_optimizers
    steps = {int(state["step"]) for state in own.optimizer.state.values()}
    assert len(steps) <= 1, f"weights were updated {sorted(steps)} times"
    return steps.pop() if steps else 0
