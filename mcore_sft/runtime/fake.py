"""One rank of many without the others, and tensors without their bytes.

The other ranks are torch's "fake" process group, which answers at once; tensors lie on the meta
device.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mcore_sft.config import ParallelConfig
from mcore_sft.runtime.cpu import megatron_on_cpu
from mcore_sft.runtime.mesh import Mesh, lay_out
from mcore_sft.runtime.patches import replaced

from megatron.core import parallel_state

META = torch.device("meta")


@contextlib.contextmanager
def rank_without_memory(parallel: ParallelConfig, rank: int, size: int) -> Iterator[Mesh]:
    """The mesh of `rank` among `size`; whatever is made inside has a size and no bytes."""
    with megatron_on_cpu(), _alone(parallel, rank, size) as mesh, META, _OnMeta():
        yield mesh


@contextlib.contextmanager
def _alone(parallel: ParallelConfig, rank: int, size: int) -> Iterator[Mesh]:
    """The mesh of one rank among others that are not there."""
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs | {"backend": "fake", "pg_options": None})

    def agree(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with (
            replaced(dist, "new_group", fake_group),
            replaced(dist, "all_gather_object", agree),
        ):
            yield lay_out(parallel, META)
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
