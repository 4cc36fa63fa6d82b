"""A run that departs in, what it is run without to see with which part the departure goes away.

Every trial takes the same packs in each step as the run itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mcore_sft.config import ParallelConfig, RunConfig

_OFF: dict[str, dict[str, int | bool]] = {
    "sequence parallelism": {"sequence": False},
    "tensor parallelism": {"tensor": 1, "sequence": False},
    "interleaving": {"virtual": 1},
    "pipeline parallelism": {"pipeline": 1, "virtual": 1},
    "context parallelism": {"context": 1},
    "overlap": {"overlap": False},
    "the distributed optimizer": {"distributed_optimizer": False},
}
"""Axis of a layout -> what it is off with; data parallelism is what is left of the ranks."""
_BF16 = ("train.fp8=none", "train.fp8_bf16_ends=0")
_FP32 = ("train.precision=fp32", *_BF16)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The same run on another layout or in another precision."""

    name: str
    """As in: the departure goes away (or stays) ..."""
    overrides: tuple[str, ...]
    processes: int


@dataclass(frozen=True, kw_only=True)
class Departed:
    """What was run."""

    config: RunConfig
    processes: int

    @property
    def axes(self) -> list[Trial]:
        """Without each axis of the layout that is on, one at a time."""
        parallel = self.config.parallel
        trials = []
        for axis, off in _OFF.items():
            without = parallel.model_copy(update=off)
            first = next(iter(off))
            if getattr(without, first) != getattr(parallel, first):
                ranks = self.processes * without.model_size // parallel.model_size
                trials.append(self._laid_out(f"without {axis}", without, ranks))
        if (ranks := parallel.model_size) < self.processes:
            trials.append(self._laid_out("without data parallelism", parallel, ranks))
        return trials

    @property
    def alone(self) -> Trial:
        """In one process."""
        return self._laid_out("in one process", ParallelConfig(), 1)

    @property
    def precisions(self) -> list[Trial]:
        """In each precision above its own."""
        train, trials = self.config.train, []
        if train.fp8 != "none":
            trials.append(self._trial("in bf16", _BF16, self.processes))
        if train.precision != "fp32":
            trials.append(self._trial("in fp32", _FP32, self.processes))
        return trials

    @property
    def alone_and_exact(self) -> Trial:
        """In one process and fp32."""
        changes = (*self.alone.overrides, *_FP32)
        return self._trial("in one process and fp32", changes, 1)

    def _laid_out(self, name: str, parallel: ParallelConfig, processes: int) -> Trial:
        ours = self.config.parallel.model_dump()
        changes = [
            f"parallel.{axis}={str(value).lower()}"
            for axis, value in parallel.model_dump().items()
            if value != ours[axis]
        ]
        return self._trial(name, changes, processes)

    def _trial(self, name: str, changes: Sequence[str], processes: int) -> Trial:
        return Trial(name=name, overrides=tuple(changes), processes=processes)


def narrowed(run: Departed, departs: Callable[[Trial], bool | str]) -> str:
    """Without what the departure goes away, in a sentence; `departs` is why, where a trial crashes.

    The layout is taken apart only if the departure does not stay in one process.
    """
    found: dict[Trial, bool | str] = {}

    def tried(*trials: Trial) -> list[bool | str]:
        results = [departs(trial) for trial in trials]
        found.update(zip(trials, results, strict=True))
        return results

    axes, precisions = run.axes, run.precisions
    layout = tried(run.alone) if len(axes) > 1 else tried(*axes)
    precision = tried(*precisions)
    if axes and precisions and False not in (*layout, *precision):
        tried(run.alone_and_exact)
    if len(axes) > 1 and True not in layout:
        tried(*axes)
    crashes = [f"{trial.name} ({why})" for trial, why in found.items() if isinstance(why, str)]
    said = [
        ("goes away", [trial.name for trial, departs in found.items() if departs is False]),
        ("stays", [trial.name for trial, departs in found.items() if departs is True]),
        ("crashes", crashes),
    ]
    told = "; ".join(f"{what} {', '.join(names)}" for what, names in said if names)
    return told or "it runs in one process and in fp32 already"
