"""The validation loss of a run, after the steps where it is due.

A run that is asked to stop as it is due leaves it out, for its time is short; the next start makes
it up, so that the checkpoint has its score and the log its line.
"""

from collections.abc import Callable

from mcore_sft.checkpoint.sharded import Checkpoints, Progress
from mcore_sft.config import RunConfig
from mcore_sft.data.packs.loader import Loader
from mcore_sft.data.text.tokenizer import Tokenizer
from mcore_sft.model.architecture import Architecture
from mcore_sft.model.build import Chunks
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.beside.callback import Callback, Step
from mcore_sft.training.beside.metrics import Metrics
from mcore_sft.training.packs import load, open_dataset
from mcore_sft.training.step import validation_loss

SCORE = "validation_loss"
"""Its name in a checkpoint."""


class Validation(Callback):
    """Measures the loss of the validation packs; of nothing where train.validate_every is 0."""

    lap = "validation"

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        architecture: Architecture,
        mesh: Mesh,
        metrics: Metrics,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`beat` is called as each micro-batch begins."""
        self.scores: dict[str, float] = {}
        """What was measured after the step that was taken, by the name in a checkpoint."""
        self._beat = beat
        self._train = config.train
        self._mesh = mesh
        self._metrics = metrics
        self._loader: Loader | None = None
        if config.train.validate_every:
            dataset = open_dataset(config, "validation", mesh)
            self._loader = load(config, "validation", dataset, tokenizer, architecture, mesh)

    def is_due(self, step: int) -> bool:
        """Whether there is a loss to be measured after `step`."""
        if self._loader is None or step == 0:
            return False
        return due(step, self._train.validate_every, self._train.steps)

    def after_step(self, taken: Step) -> None:
        """Measure the validation loss if it is due, and the run is not asked to stop."""
        self.scores = {}
        if self.is_due(taken.progress.step) and not taken.asked:
            self._measure(taken.model, taken.progress)

    def make_up(self, model: Chunks, progress: Progress, checkpoints: Checkpoints) -> None:
        """Measure what the run left out as it was asked to stop after this step."""
        if self.is_due(progress.step) and checkpoints.lacks(progress.step, SCORE):
            self._measure(model, progress)
            checkpoints.add_score(progress.step, SCORE, self.scores[SCORE])

    def _measure(self, model: Chunks, progress: Progress) -> None:
        assert self._loader is not None
        batches = list(self._loader.validation_batches(self._train.validation_packs))
        loss = validation_loss(model, batches, self._mesh, self._beat)
        self._metrics.validation(progress, loss)
        self.scores = {SCORE: loss}


def due(step: int, every: int, last: int) -> bool:
    """Whether a thing done `every` so many steps, and at the last one, is due after `step`."""
    return step == last or (every > 0 and step % every == 0)
