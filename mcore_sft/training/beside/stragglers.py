"""Which ranks make the others wait: each one's own time of a step, before gradients are reduced."""

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from mcore_sft.model.build import Chunks
from mcore_sft.runtime.hardware import finish_work
from mcore_sft.runtime.mesh import Mesh

from megatron.core.utils import get_model_config

SLOW = 1.25
"""A rank is named whose time is so many times that of the middle one."""


class OwnTime:
    """Seconds that this rank itself takes for its batches and their gradients, up to the exchange.

    Ranks of one tensor-parallel group or pipeline wait for each other within that, so that they are
    slow together.
    """

    def __init__(self, model: Chunks, mesh: Mesh) -> None:
        self._mesh = mesh
        self._seconds = 0.0
        self._steps = 0
        self._start: float | None = None
        config = get_model_config(model[0])
        reduce = config.finalize_model_grads_func

        def ready(*arguments: Any, **keywords: Any) -> Any:
            finish_work(mesh.device)
            self.pause()
            return reduce(*arguments, **keywords)

        config.finalize_model_grads_func = ready
        for chunk in model:
            chunk.register_forward_pre_hook(self._go_on)

    def begin(self) -> None:
        """A step begins."""
        self._steps += 1
        self._start = time.perf_counter()

    def pause(self) -> None:
        """What comes now waits for other ranks, until the model begins to compute."""
        if self._start is not None:
            self._seconds += time.perf_counter() - self._start
        self._start = None

    def _go_on(self, *_: Any) -> None:
        if self._start is None:
            self._start = time.perf_counter()

    def gather(self) -> list[float]:
        """The mean of each rank's steps since the last time; collective."""
        mean = self._seconds / max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        mine = torch.tensor([mean], dtype=torch.float64, device=self._mesh.device)
        found = mine.new_empty(self._mesh.world.size)
        dist.all_gather_into_tensor(found, mine, group=self._mesh.world.group)
        return [float(seconds) for seconds in found]


def slow_ranks(seconds: list[float]) -> list[int]:
    """The ranks that took `SLOW` times as long as the middle one, the slowest first."""
    limit = SLOW * statistics.median_low(seconds)
    return sorted(
        (rank for rank, taken in enumerate(seconds) if taken > limit), key=lambda r: -seconds[r]
    )
