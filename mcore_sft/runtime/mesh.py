"""Ranks, sizes and process groups: which peers this process computes with, along which axis.

Peers + ParallelConfig -> Mesh
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import say
from mcore_sft.config import ParallelConfig
from mcore_sft.ops import library
from mcore_sft.runtime.cpu import megatron_on_cpu
from mcore_sft.runtime.device import device as this_device
from mcore_sft.runtime.hardware import check_architecture
from mcore_sft.runtime.launch import Launch
from mcore_sft.runtime.megatron_core import check_version
from mcore_sft.runtime.peers import CONNECT_SECONDS, Peers, interface_of

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

Found = TypeVar("Found")

_NEVER_SECONDS = 10 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One way of splitting the work: this process's place in it and those it shares it with."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this process stands among all the others."""

    device: torch.device
    local_rank: int
    """Number of this process among those of its machine."""
    world: Axis
    tensor: Axis
    pipeline: Axis
    context: Axis
    data: Axis
    """Those that read other packs."""
    replicas: Axis
    """Those that hold the same weights: the data and context axes together."""
    parallel: ParallelConfig
    """What was asked for: sizes, and what goes without an axis of its own."""
    groups: ProcessGroupCollection
    hosts: tuple[str, ...] = ()
    """Host name of each rank, where ranks have met by `Peers`."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this process embeds the tokens."""
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes the loss."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def tells_loss(self) -> bool:
        """Whether this process speaks for its tensor ranks, all of which compute the loss."""
        return self.is_last_stage and self.tensor.rank == 0

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: it alone writes logs and manifests."""
        return self.world.rank == 0

    def name(self, rank: int) -> str:
        """A rank in a sentence, with its host: `rank 1 (node1)`."""
        return f"rank {rank} ({self.hosts[rank]})" if self.hosts else f"rank {rank}"

    def barrier(self) -> None:
        """Wait for every process."""
        dist.barrier(group=self.world.group)

    def from_main(self, find: Callable[[], Found]) -> Found:
        """What the main process finds, or its `UserError`, on every process; collective.

        A network file system may show each machine another state of a folder.
        """
        told: list[Any] = [None]
        if self.is_main:
            try:
                told = [find()]
            except UserError as error:
                told = [error]
        dist.broadcast_object_list(told, src=0, group=self.world.group)
        if isinstance(told[0], UserError):
            raise told[0]
        found: Found = told[0]
        return found

    def from_all(self, told: Found) -> list[Found]:
        """What each rank tells, in their order, on every rank; collective."""
        shares: list[Any] = [None] * self.world.size
        dist.all_gather_object(shares, told, group=self.world.group)
        return shares

    def largest(self, *values: int) -> list[int]:
        """The largest that any rank gives, of each value; collective."""
        shared = torch.tensor(values, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.world.group)
        return [int(value) for value in shared.tolist()]

    def gather(self, own: Tensor) -> Tensor:
        """The tensor [...] of each rank, stacked in their order [ranks, ...]; collective."""
        shares = [torch.empty_like(own) for _ in range(self.world.size)]
        dist.all_gather(shares, own, group=self.world.group)
        return torch.stack(shares)

    def reduce_to_replica(self, owner: int, tensor: Tensor) -> None:
        """Sum `tensor`, in place, on the replica numbered `owner`; collective among replicas."""
        group = self.replicas.group
        dist.reduce(tensor, dist.get_global_rank(group, owner), group=group)

    def sum_over_world(self, values: list[float]) -> list[float]:
        """The sum of each value over all ranks, in fp64; collective."""
        return self._sum(values, self.world)

    def sum_over_replicas(self, values: list[float]) -> list[float]:
        """The sum of each value over all tokens' ranks, in fp64; collective."""
        return self._sum(values, self.replicas)

    def _sum(self, values: list[float], axis: Axis) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=axis.group)
        sums: list[float] = total.tolist()
        return sums

    def say(self, text: str) -> None:
        """Print once for all."""
        if self.is_main:
            say(text)


@contextlib.contextmanager
def connect(parallel: ParallelConfig) -> Iterator[Mesh]:
    """Meet the other processes that torchrun started, or run alone, and lay out the mesh."""
    with Peers(Launch.read(), CONNECT_SECONDS) as peers, join(parallel, peers) as mesh:
        yield mesh


@contextlib.contextmanager
def join(parallel: ParallelConfig, peers: Peers, seconds: float | None = None) -> Iterator[Mesh]:
    """Make the process group of all `peers` and lay out the mesh.

    A collective fails after so many `seconds`; None is never.
    """
    check(parallel, peers.launch.size)
    check_version()
    device = this_device()
    host = megatron_on_cpu() if device.type == "cpu" else contextlib.nullcontext()
    timeout = timedelta(seconds=seconds or _NEVER_SECONDS)
    with host:
        if device.type == "cuda":
            check_architecture(device)
            library.load_cuda()
            torch.cuda.set_device(device)
        _choose_interface(peers)
        peers.store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("process group", peers.store),
            rank=peers.launch.rank,
            world_size=peers.launch.size,
            timeout=timeout,
            # NCCL connects here, and not in the first step.
            device_id=device if device.type == "cuda" else None,
        )
        try:
            yield lay_out(parallel, device, timeout, peers.hosts)
        except BaseException as error:
            peers.report(error)  # now: what follows may wait for ranks that are gone
            raise
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _choose_interface(peers: Peers) -> None:
    """Let gloo take the network by which the ranks have met, unless the environment says another.

    By itself it takes the address of the host's name, which Debian's /etc/hosts calls 127.0.1.1.
    """
    interface = interface_of(peers.address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def check(parallel: ParallelConfig, world_size: int) -> None:
    """Raise `ConfigError` where `world_size` processes cannot be laid out as asked."""
    least = parallel.model_size
    mend = f"start a multiple of {least}, as torchrun --nproc-per-node {least} does"
    parallel.require_split(world_size, "process(es)", mend)


def lay_out(
    parallel: ParallelConfig,
    device: torch.device,
    timeout: timedelta = timedelta(minutes=30),
    hosts: tuple[str, ...] = (),
) -> Mesh:
    """The mesh of the default process group, which is there already."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,  # twins of all groups, which nothing here uses
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    # Fills the table of random streams that Megatron's layers ask for; nothing random is drawn.
    model_parallel_cuda_manual_seed(1)
    return Mesh(
        device=device,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world=_axis(dist.group.WORLD),
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        context=_axis(parallel_state.get_context_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        replicas=_axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        parallel=parallel,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        hosts=hosts if len(hosts) > 1 else (),
    )


def _axis(group: dist.ProcessGroup | None) -> Axis:
    assert group is not None
    return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)
