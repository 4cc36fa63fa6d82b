"""Between the gradients and the weights: an update that would do harm is not made, and named.

gradients -> norm, loss of each micro-batch -> update | no update, or the end of the run
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_sft.checkpoint.sharded import Progress
from mcore_sft.config import TrainConfig
from mcore_sft.data.packs.batch import Batch
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.packs.loader import Loader
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.beside.metrics import Metrics
from mcore_sft.training.errors import TrainingError
from mcore_sft.training.step import Gradients

PATIENCE = 10
"""So many steps in a row without a finite loss and gradient, and the weights are past repair; so
many spikes in a row, and they are the level of the loss."""
SHOWN = 8
"""Packs and examples that a sentence names; the JSON line names all."""


class Guard:
    """Judges the gradients of each step, and withholds updates that `TrainConfig` does not want."""

    def __init__(
        self,
        settings: TrainConfig,
        dataset: PackedDataset,
        loader: Loader,
        folder: Path,
        mesh: Mesh,
        metrics: Metrics,
    ) -> None:
        """`folder` is where `dataset` lies, for the sentences."""
        self._settings = settings
        self._dataset = dataset
        self._loader = loader
        self._folder = folder
        self._mesh = mesh
        self._metrics = metrics

    def withholds(self, progress: Progress, batches: Sequence[Batch], found: Gradients) -> bool:
        """Whether the update of the step after `progress` must not be made; alike on every rank.

        Raises `TrainingError` where the run cannot go on.
        """
        if not found.supervised:
            return False
        if not found.is_finite:
            progress.nonfinite += 1
            self._report_nonfinite(progress, self._means(batches, found, progress.step), found.norm)
            return True
        progress.nonfinite = 0
        if not take_in(progress, found.loss, self._settings):
            return False
        self._report_spike(progress, self._means(batches, found, progress.step), found.loss)
        if progress.spikes == PATIENCE:
            self._begin_anew(progress)
        return self._settings.on_spike == "skip"

    def _begin_anew(self, progress: Progress) -> None:
        """Let the spikes be the level of the loss, and learn from the next steps what one is."""
        progress.losses, progress.spikes = [], 0
        told = (
            f"step {progress.step + 1}: {PATIENCE} spikes in a row are a new level of the loss; "
            f"the window of the last {self._settings.spike_window} losses starts anew"
        )
        self._metrics.flag(progress.step + 1, "new_level", told, {})

    def _means(self, batches: Sequence[Batch], found: Gradients, step: int) -> list["Mean"]:
        """The micro-batches of all ranks."""
        mine = [
            Share(loss, batch.supervised, tuple(packs))
            for loss, batch, packs in zip(
                found.losses, batches, self._loader.packs(step), strict=False
            )
        ]
        return means_of([part for share in self._mesh.from_all(mine) for part in share])

    def _report_nonfinite(self, progress: Progress, means: list["Mean"], norm: float) -> None:
        step = progress.step
        damaged = [mean for mean in means if not math.isfinite(mean.loss)]
        if damaged:
            told = f"the loss is {damaged[0].loss} in {self._named(damaged)}"
        else:
            told = f"the gradient norm is {norm}, though every loss is finite, in a step of "
            told += self._named(means)
        told = f"step {step + 1}: {told}; the weights were left as they were"
        self._metrics.flag(step + 1, "nonfinite", told, self._samples(damaged or means))
        if self._settings.on_nonfinite == "stop":
            raise TrainingError(
                f"{told}. Look at them with tools/inspect_data.py {self._folder} --pack N, lower "
                "optimizer.lr, clip gradients with optimizer.clip_grad, or go on past such steps "
                "with train.on_nonfinite=skip"
            )
        if progress.nonfinite >= PATIENCE:
            raise TrainingError(
                f"{told}. So it was in {PATIENCE} steps in a row: the weights are damaged, and no "
                "step will repair them; go back to a checkpoint before, with a lower optimizer.lr"
            )

    def _report_spike(self, progress: Progress, means: list["Mean"], loss: float) -> None:
        step, before = progress.step, progress.losses
        worst = max(means, key=lambda mean: mean.loss)
        skips = self._settings.on_spike == "skip"
        told = (
            f"step {step + 1}: loss {loss:.4f} is a spike after {statistics.fmean(before):.4f} on "
            f"average (standard deviation {statistics.stdev(before):.4f}); the largest, "
            f"{worst.loss:.4f}, is of {self._named([worst])}"
            f"{'; the weights were left as they were' if skips else ''}"
        )
        self._metrics.flag(step + 1, "spike", told, self._samples([worst]))

    def _named(self, means: list["Mean"]) -> str:
        return " and ".join(
            f"{what} {', '.join(map(str, ids[:SHOWN]))}{', ...' if len(ids) > SHOWN else ''}"
            for what, ids in self._samples(means).items()
        )

    def _samples(self, means: list["Mean"]) -> dict[str, list[int]]:
        """The packs of these micro-batches, and the examples in them."""
        packs = [pack for mean in means for pack in mean.packs]
        examples = [example for pack in packs for example in self._dataset.examples_of(pack)]
        return {"packs": packs, "examples": examples}


def take_in(progress: Progress, loss: float, settings: TrainConfig) -> bool:
    """Whether the `loss` of a step is a spike; what is none joins those that the next is told by.

    A spike stays out: it would raise the mean and the deviation that it is told by.
    """
    window = settings.spike_window
    if is_spike(loss, progress.losses, settings.spike_sigmas, window):
        progress.spikes += 1
        return True
    progress.losses = [*progress.losses, loss][-window:]
    progress.spikes = 0
    return False


def is_spike(loss: float, before: Sequence[float], sigmas: float, window: int) -> bool:
    """Whether `loss` lies `sigmas` standard deviations above the mean of those before it."""
    if len(before) < max(2, window // 2):
        return False
    return loss > statistics.fmean(before) + sigmas * statistics.stdev(before)


@dataclass(frozen=True)
class Share:
    """What one rank knows of a micro-batch, whose rows context-parallel ranks share."""

    loss: float
    """The sum over its supervised tokens."""
    supervised: int
    packs: tuple[int, ...]


@dataclass(frozen=True)
class Mean:
    """Mean loss of one micro-batch, and its packs."""

    loss: float
    packs: tuple[int, ...]


def means_of(shares: Sequence[Share]) -> list[Mean]:
    """The micro-batches that `shares` are of."""
    whole: dict[tuple[int, ...], list[Share]] = {}
    for share in shares:
        whole.setdefault(share.packs, []).append(share)
    return [
        Mean(sum(x.loss for x in parts) / max(1, sum(x.supervised for x in parts)), packs)
        for packs, parts in whole.items()
    ]
