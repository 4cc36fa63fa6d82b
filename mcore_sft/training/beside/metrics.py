"""What was measured: a StepResult in, a line on the console and a line of JSON out."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from mcore_sft.base import files
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Console
from mcore_sft.checkpoint.sharded import POINTER, Progress
from mcore_sft.config import LogConfig
from mcore_sft.data.packs.batch import Batch
from mcore_sft.model.architecture import Architecture
from mcore_sft.runtime.hardware import peak_flops
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.beside import curve, trackers
from mcore_sft.training.beside.callback import Callback, Step
from mcore_sft.training.flops import step_flops
from mcore_sft.training.step import StepResult

FILE = "metrics.jsonl"
STEP = ("data", "forward_backward", "optimizer")
"""What the seconds of a step are spent on."""
BETWEEN = ("validation", "checkpoint")
"""What holds the steps up; told with the step after."""


class Metrics(Callback):
    """The log of a run, written by one process for all."""

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: LogConfig,
        steps: int,
        architecture: Architecture,
        mesh: Mesh,
    ) -> None:
        trackers.check(settings)
        self.folder = folder
        self.name = name
        self.path = folder / FILE
        self.settings = settings
        self.steps = steps
        self.architecture = architecture
        self.mesh = mesh
        peak = settings.peak_tflops
        self.peak = 1e12 * peak if peak else peak_flops(mesh.device)
        self.console = Console(stderr=True, quiet=not mesh.is_main)
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (mesh.is_main and self.console.is_terminal),
        )
        self._trackers: list[trackers.Tracker] = []
        self._laps: dict[str, float] = {}
        self._began = self._last = time.perf_counter()

    @contextlib.contextmanager
    def logging(self, resumed_at: int) -> Iterator[None]:
        """Log what happens inside, after the lines up to `resumed_at` of an earlier try.

        Collective; raises `UserError` on every rank.
        """
        self.mesh.from_main(lambda: self._open(resumed_at))
        with self.bar:
            self._task = self.bar.add_task("", total=self.steps, completed=resumed_at, rate="")
            self._resumed_at = resumed_at
            self._began = self._last = time.perf_counter()
            yield
        if self.mesh.is_main and self.settings.curve:
            curve.draw(self.path, self.path.with_name("loss.png"))

    def _open(self, resumed_at: int) -> None:
        with self._named():
            _open(self.path, resumed_at)
        self._trackers = trackers.open_trackers(self.settings, self.folder, self.name, resumed_at)

    def sync(self) -> None:
        """Wait until all lines are on the disk: a checkpoint or a score must not outlive them."""
        if self.mesh.is_main:
            with self._named():
                files.sync(self.path)

    def book(self, what: str) -> None:
        """The time since it was booked last was spent on `what`."""
        now = time.perf_counter()
        self._laps[what] = self._laps.get(what, 0.0) + now - self._last
        self._last = now

    def after_step(self, taken: Step) -> None:
        """Log the step that was just taken."""
        progress, result, memory = taken.progress, taken.result, taken.memory
        laps, self._laps = self._laps, {}
        seconds = sum(laps.get(what, 0.0) for what in STEP)
        rate = result.tokens / seconds
        mfu = self._mfu(result, taken.batches, seconds)
        self._write(
            {
                "step": progress.step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "supervised_tokens": result.supervised,
                "tokens": result.tokens,
                "examples": result.examples,
                "examples_seen": progress.examples,
                "skipped_steps": progress.skipped,
                "tokens_per_second": rate,
                "mfu": mfu,
                "peak_memory_bytes": memory,
                "step_seconds": seconds,
                **{f"{what}_seconds": laps.get(what, 0.0) for what in (*STEP, *BETWEEN)},
            }
        )
        self.bar.update(self._task, completed=progress.step, rate=f"{rate:,.0f} tokens/s")
        if progress.step % self.settings.every == 0 or progress.step in (1, self.steps):
            self.say(
                f"step {progress.step:>{len(str(self.steps))}}/{self.steps}  "
                + (
                    "no supervised token: skipped"
                    if result.skipped
                    else f"loss {result.loss:.4f}  grad norm {result.grad_norm:.3f}"
                )
                + f"  lr {result.lr:.2e}  {result.supervised:,} supervised tokens  "
                f"{rate:,.0f} tokens/s  {'' if mfu is None else f'MFU {100 * mfu:.1f} %  '}"
                f"{memory / 2**30:.1f} GiB  {seconds:.2f} s  left {self._left(progress.step)}"
            )

    def validation(self, progress: Progress, loss: float) -> None:
        """Log the validation loss after the step that was just taken."""
        self._write({"step": progress.step, "validation_loss": loss})
        self.sync()
        self.say(
            f"step {progress.step:>{len(str(self.steps))}}/{self.steps}  validation loss {loss:.4f}"
        )

    def accuracy(self, step: int, percent: float, benchmark: str) -> None:
        """Log the accuracy of a checkpoint, which steps may have followed."""
        self._write({"step": step, "accuracy": percent, "benchmark": benchmark})
        self.sync()
        self.say(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  "
            f"accuracy {percent:.2f} % ({benchmark})"
        )

    def on_save(self, path: Path) -> None:
        """Say that a checkpoint is complete."""
        self.say(f"saved {path}")

    def flag(self, step: int, event: str, text: str, samples: dict[str, Any]) -> None:
        """Log what a guard found in `step`, with the samples that it names."""
        self.event(step, event, **samples)
        self.say(text)

    def event(self, step: int, event: str, **content: Any) -> None:
        """Log what happened in `step` and has no line on the console."""
        self._write({"step": step, "event": event, **content})

    def _mfu(self, result: StepResult, batches: Sequence[Batch], seconds: float) -> float | None:
        """The share of all devices' peak that useful operations take; None if that is not known.

        The other ranks' documents are taken to be as long as this one's.
        """
        if self.peak is None:
            return None
        squares = sum(batch.squares for batch in batches)
        useful = sum(batch.useful for batch in batches) * self.mesh.context.size
        needed = step_flops(
            self.architecture,
            tokens=result.tokens,
            supervised=result.supervised,
            squares=squares * result.tokens / max(1, useful),
        )
        return needed / (seconds * self.peak * self.mesh.world.size)

    def _left(self, step: int) -> timedelta:
        """How long the rest of the steps takes, as those since the start did with all around."""
        each = (time.perf_counter() - self._began) / (step - self._resumed_at)
        return timedelta(seconds=round(each * (self.steps - step)))

    def say(self, text: str) -> None:
        """Print one line, once for all processes, above the bar."""
        self.console.print(text, soft_wrap=True)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.mesh.is_main:
            # JSON knows no NaN and no infinity: they are null.
            plain = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in entry.items()
            }
            with self._named(), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain, allow_nan=False) + "\n")
            numbers = {name: x for name, x in plain.items() if isinstance(x, int | float)}
            for track in self._trackers:
                track(entry["step"], numbers)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Not a TrainingError: the other ranks know nothing of it, and end with this one.
            raise UserError(
                f"{self.path} could not be written ({error.strerror}); check the disk and "
                "start again: the run goes on from its newest checkpoint"
            ) from error


def _open(path: Path, step: int) -> None:
    """Make the log ready for the steps after `step`, durable by its name.

    Where the run goes on, lines of later steps are cut: those are taken again. But lines that
    nothing will write again stay, in metrics.1.jsonl and so on: those of a run that is begun anew
    after its checkpoints were moved away, and those up to a checkpoint that is no longer there.
    """
    content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = content.splitlines()
    kept = "".join(line + "\n" for line in lines if 0 < _step(line) <= step)
    last = max(map(_step, lines), default=0)
    if lines and (step == 0 or last >= _last_checkpoint(path.parent) > step):
        numbered = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
        files.write(next(place for place in numbered if not place.exists()), content)
    if kept != content or not path.exists():
        files.replace(path, kept)


def _last_checkpoint(folder: Path) -> int:
    """The step that was complete last, whether it is still there or not; 0 if none was."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / POINTER).read_text(encoding="ascii").strip().removeprefix("step_"))
    return 0


def _step(line: str) -> int:
    """The step that a line tells of; 0 if it is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
