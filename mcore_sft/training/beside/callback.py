"""The one interface of what runs beside the steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_sft.checkpoint.sharded import Progress
from mcore_sft.data.packs.batch import Batch
from mcore_sft.model.build import Chunks
from mcore_sft.training.step import StepResult


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that was taken; `progress` counts it already."""

    model: Chunks
    progress: Progress
    result: StepResult
    batches: Sequence[Batch]
    """Those of this rank."""
    asked: int
    """What asks the run to stop here (`Stop.asked`, agreed on by the ranks), or 0."""
    writing: bool
    """Whether any rank is still writing a checkpoint."""
    memory: int
    """Most bytes that any rank's device has held."""


class Callback:
    """Is called around each step, on every rank; does nothing where it says nothing else."""

    lap = "checkpoint"
    """What the time of `after_step` is booked as in the log."""

    def before_step(self, step: int) -> None:
        """The step numbered `step` (from 1) begins."""

    def after_step(self, taken: Step) -> None:
        """A step was taken."""

    def on_save(self, path: Path) -> None:
        """The checkpoint at `path` is complete."""

    def on_stop(self) -> None:
        """The run is asked to stop before its work is done."""


class Callbacks(list[Callback]):
    """Those of a run, called in their order."""

    def before_step(self, step: int) -> None:
        """The step numbered `step` (from 1) begins."""
        for callback in self:
            callback.before_step(step)

    def on_save(self, path: Path) -> None:
        """The checkpoint at `path` is complete."""
        for callback in self:
            callback.on_save(path)

    def on_stop(self) -> None:
        """The run is asked to stop before its work is done."""
        for callback in self:
            callback.on_stop()
