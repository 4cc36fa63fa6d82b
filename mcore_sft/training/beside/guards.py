"""Between the gradients and the weights: an update that would do harm is not made, and named.

gradients -> norm, loss of each micro-batch -> update | no update, or the end of the run
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mcore_sft.checkpoint.sharded import Progress
from mcore_sft.config import OptimizerConfig, TrainConfig
from mcore_sft.data.batch import Batch
from mcore_sft.data.dataset import PackedDataset
from mcore_sft.data.loader import Loader
from mcore_sft.model.build import Chunks
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.beside.metrics import Metrics
from mcore_sft.training.errors import TrainingError
from mcore_sft.training.step import StepResult, train_step

from megatron.core.optimizer import MegatronOptimizer

PATIENCE = 10
"""So many steps in a row without a finite loss and gradient, and the weights are past repair; so
many spikes in a row, and they are the level of the loss."""
SHOWN = 8
"""Packs and examples that a sentence names; the JSON line names all."""


class Guard:
    """Takes the steps of a run, and withholds the updates that `TrainConfig` does not want."""

    def __init__(
        self,
        settings: TrainConfig,
        dataset: PackedDataset,
        loader: Loader,
        folder: Path,
        model: Chunks,
        optimizer: MegatronOptimizer,
        mesh: Mesh,
        metrics: Metrics,
    ) -> None:
        """`folder` is where `dataset` lies, for the sentences."""
        self._settings = settings
        self._dataset = dataset
        self._loader = loader
        self._folder = folder
        self._model = model
        self._optimizer = optimizer
        self._mesh = mesh
        self._metrics = metrics
        self._losses: list[torch.Tensor] = []
        model[-1].register_forward_hook(self._record)

    def step(
        self, progress: Progress, batches: Sequence[Batch], settings: OptimizerConfig, lr: float
    ) -> StepResult:
        """Take the step after `progress`."""
        self._losses.clear()

        def withholds(norm: float) -> bool:
            return self._withholds(progress, batches, norm)

        return train_step(
            self._model, self._optimizer, batches, self._mesh, settings, lr, withholds
        )

    def _record(self, model: Any, given: Any, output: torch.Tensor) -> None:
        """Keep the summed loss of a micro-batch: what the last stage gives out."""
        if model.training and self._mesh.is_last_stage:
            self._losses.append(output.detach())

    def _withholds(self, progress: Progress, batches: Sequence[Batch], norm: float) -> bool:
        """Whether the update must not be made; the same on every rank."""
        self._metrics.lap("forward_backward")
        counts = self._mesh.is_last_stage and self._mesh.tensor.rank == 0
        losses = torch.stack(self._losses).tolist() if counts else []
        supervised = sum(batch.supervised for batch in batches) if counts else 0
        told = [sum(losses), supervised, 0.0 if math.isfinite(norm) else 1.0]
        total = torch.tensor(told, dtype=torch.float64, device=self._mesh.device)
        dist.all_reduce(total, group=self._mesh.world.group)
        loss = float(total[0] / total[1])
        if not math.isfinite(loss) or total[2]:
            progress.nonfinite += 1
            self._report_nonfinite(progress, self._means(losses, batches, progress.step), norm)
            return True
        progress.nonfinite = 0
        if not take_in(progress, loss, self._settings):
            return False
        self._report_spike(progress, self._means(losses, batches, progress.step), loss)
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

    def _means(self, losses: list[float], batches: Sequence[Batch], step: int) -> list["Mean"]:
        """The micro-batches of all ranks; `losses` are empty on all but one of those alike."""
        mine = [
            Share(loss, batch.supervised, tuple(packs))
            for loss, batch, packs in zip(losses, batches, self._loader.packs(step), strict=False)
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
