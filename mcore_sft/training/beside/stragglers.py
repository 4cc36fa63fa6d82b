"""Which ranks make the others wait: each one's own time of a step, before gradients are reduced."""

import statistics
import time

from mcore_sft.runtime.hardware import finish_work
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.beside.callback import Callback, Step
from mcore_sft.training.beside.metrics import Metrics

SLOW = 1.25
"""A rank is named whose time is so many times that of the middle one."""


class OwnTime(Callback):
    """Seconds that this rank itself takes for its batches and their gradients, up to the exchange.

    Ranks of one tensor-parallel group or pipeline wait for each other within that, so that they are
    slow together.
    """

    def __init__(self, mesh: Mesh, metrics: Metrics, every: int) -> None:
        """The ranks are compared `every` so many steps; 0 is never."""
        self._mesh = mesh
        self._metrics = metrics
        self._every = every
        self._seconds = 0.0
        self._steps = 0
        self._start: float | None = None

    def before_step(self, step: int) -> None:
        """A step begins."""
        self._steps += 1
        self.go_on()

    def go_on(self) -> None:
        """This rank works from here on."""
        if self._start is None:
            self._start = time.perf_counter()

    def pause(self) -> None:
        """What comes now waits for other ranks, until the model begins to compute."""
        if self._start is not None:
            self._seconds += time.perf_counter() - self._start
        self._start = None

    def computed(self) -> None:
        """The gradients are there, and wait to be exchanged."""
        finish_work(self._mesh.device)
        self.pause()

    def after_step(self, taken: Step) -> None:
        """Compare the ranks if that is due, and name those that the others wait for; collective."""
        step = taken.progress.step
        if not self._every or step % self._every:
            return
        seconds = self._mesh.from_all(self._seconds / max(1, self._steps))
        self._seconds, self._steps = 0.0, 0
        slow = slow_ranks(seconds)
        self._metrics.event(step, "ranks", own_seconds=seconds, slow=slow)
        if slow:
            named = ", ".join(f"rank {rank} ({seconds[rank]:.2f} s)" for rank in slow)
            self._metrics.say(
                f"step {step}: the others wait for {named}; the fastest rank takes "
                f"{min(seconds):.2f} s a step"
            )


def slow_ranks(seconds: list[float]) -> list[int]:
    """The ranks that took `SLOW` times as long as the middle one, the slowest first."""
    limit = SLOW * statistics.median_low(seconds)
    return sorted(
        (rank for rank, taken in enumerate(seconds) if taken > limit), key=lambda r: -seconds[r]
    )
