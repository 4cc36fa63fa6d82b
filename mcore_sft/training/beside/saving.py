"""When checkpoints are saved, and completed once their writers have ended."""

import contextlib
from collections.abc import Iterator

from mcore_sft.checkpoint.describe import Description
from mcore_sft.checkpoint.sharded import Checkpoints
from mcore_sft.checkpoint.sums import Sums
from mcore_sft.training.beside.callback import Callback, Callbacks, Step
from mcore_sft.training.beside.metrics import Metrics
from mcore_sft.training.beside.validation import Validation, due
from mcore_sft.training.beside.watchdog import Watchdog
from mcore_sft.training.errors import TrainingError


class Saving(Callback):
    """Saves a checkpoint every so many steps, at the last, and where the run is asked to stop."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        description: Description,
        sums: Sums,
        validation: Validation,
        metrics: Metrics,
        watchdog: Watchdog,
        callbacks: Callbacks,
        *,
        steps: int,
    ) -> None:
        """`callbacks` are told of each checkpoint that is complete."""
        self._checkpoints = checkpoints
        self._description = description
        self._sums = sums
        self._validation = validation
        self._metrics = metrics
        self._watchdog = watchdog
        self._steps = steps
        self._callbacks = callbacks

    def after_step(self, taken: Step) -> None:
        """Complete the save that is written, and begin the one that is due."""
        if self._checkpoints.is_pending and not taken.writing:
            self._callbacks.on_save(self._checkpoints.complete())
        step = taken.progress.step
        if taken.asked or due(step, self._checkpoints.settings.every, self._steps):
            self._complete(f"while saving step_{step}")
            self._metrics.sync()
            description = self._description.with_sums(self._sums.wait(self._watchdog.beat))
            self._checkpoints.save(taken.progress, description.write, self._validation.scores)

    @contextlib.contextmanager
    def completed(self) -> Iterator[None]:
        """Complete the save that what happens inside has begun, if it ends on all ranks alike."""
        try:
            yield
        except TrainingError:
            self._complete("while saving")
            raise
        self._complete("while saving")

    def _complete(self, doing: str) -> None:
        self._watchdog.at(doing, slow=True)
        if path := self._checkpoints.wait(self._watchdog.beat):
            self._callbacks.on_save(path)
