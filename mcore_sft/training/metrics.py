"""What was measured: a StepResult in, a line on the console and a line of JSON out."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
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

from mcore_sft.checkpoint.sharded import Progress
from mcore_sft.config import LogConfig
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.step import StepResult

FILE = "metrics.jsonl"


class Metrics:
    """The log of a run, written by one process for all."""

    def __init__(self, folder: Path, settings: LogConfig, steps: int, mesh: Mesh) -> None:
        self.path = folder / FILE
        self.settings = settings
        self.steps = steps
        self.mesh = mesh
        self.console = Console(stderr=True, quiet=not mesh.is_main, highlight=False)
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
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def logging(self, resumed_at: int) -> Iterator[None]:
        """Log what happens inside; lines of steps after `resumed_at` of an earlier try are cut."""
        if self.mesh.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut(self.path, resumed_at)
        with self.bar:
            self._task = self.bar.add_task("", total=self.steps, completed=resumed_at, rate="")
            self._last = time.perf_counter()
            yield

    def step(self, progress: Progress, result: StepResult) -> None:
        """Log the step that was just taken."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = result.tokens / seconds
        self._write(
            {
                "step": progress.step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "supervised_tokens": result.supervised,
                "tokens": result.tokens,
                "examples": result.examples,
                "epoch_examples": progress.examples,
                "skipped_steps": progress.skipped,
                "tokens_per_second": rate,
                "step_seconds": seconds,
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
                f"{rate:,.0f} tokens/s  {seconds:.2f} s"
            )

    def validation(self, progress: Progress, loss: float) -> None:
        """Log the validation loss after the step that was just taken."""
        self._write({"step": progress.step, "validation_loss": loss})
        self.say(
            f"step {progress.step:>{len(str(self.steps))}}/{self.steps}  validation loss {loss:.4f}"
        )
        self._last = time.perf_counter()

    def saved(self, path: Path) -> None:
        """Say that a checkpoint is complete."""
        self.say(f"saved {path}")
        self._last = time.perf_counter()

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
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain, allow_nan=False) + "\n")


def _cut(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which are about to be taken again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line + "\n" for line in lines if 0 < _step(line) <= step]
    path.write_text("".join(kept), encoding="utf-8")


def _step(line: str) -> int:
    """The step that a line tells of; 0 if it is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
