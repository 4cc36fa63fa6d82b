"""The task accuracy of checkpoints, measured by a process beside the training.

step_N --accuracy_process.py--> RUN/evaluation/step_N/ --Accuracy--> metrics, step_N/scores.json

    RUN/evaluation/step_N/config.yaml   how it is evaluated
                          log.txt       what the process said
                          NAME/         answers, verdicts and report on the benchmark
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import mcore_sft
from mcore_sft import config as configuration
from mcore_sft.base.errors import Stopped
from mcore_sft.checkpoint.retention import scores
from mcore_sft.checkpoint.sharded import Checkpoints
from mcore_sft.config import RunConfig
from mcore_sft.evaluation import benchmarks
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.beside.callback import Callback, Step
from mcore_sft.training.beside.metrics import Metrics
from mcore_sft.training.stop import Stop, reason

_END_SECONDS = 15.0
# What torchrun tells its ranks, of which the process is none.
_RANKS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """One that is under way."""

    step: int
    output: Path
    process: subprocess.Popen[bytes]


class Accuracy(Callback):
    """Evaluates one checkpoint at a time, the newest that is due; the main rank's work alone.

    Whatever goes wrong with an evaluation is told, and training goes on.
    """

    def __init__(
        self,
        config: RunConfig,
        checkpoints: Checkpoints,
        metrics: Metrics,
        mesh: Mesh,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`beat` is called while the ranks wait for an evaluation together."""
        self._config = config
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._mesh = mesh
        self._beat = beat
        self._every = config.train.evaluate_every
        self._folder = config.folder.absolute() / "evaluation"
        self._seen: Path | None = None
        self._latest = 0
        self._waiting: int | None = None
        self._running: _Evaluation | None = None

    def __enter__(self) -> Self:
        """What an earlier try left unmeasured is due."""
        if self._every and self._mesh.is_main:
            self._look()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind:
            self.end()

    @property
    def is_busy(self) -> bool:
        """Whether an evaluation is under way or due."""
        return not (self._running is None and self._waiting is None)

    def after_step(self, taken: Step) -> None:
        """Poll."""
        self.poll(taken.asked)

    def on_stop(self) -> None:
        """End the evaluation that is under way."""
        self.end()

    def poll(self, asked: int) -> None:
        """Tell of an evaluation that has ended, and begin the one that is due; waits for none.

        Where the run is `asked` to stop, what is due is left to the next start.
        """
        if not (self._every and self._mesh.is_main):
            return
        if self._checkpoints.newest != self._seen:
            self._seen = self._checkpoints.newest
            self._look()
        if asked:
            return
        if self._running and self._running.process.poll() is not None:
            ended, self._running = self._running, None
            self._hold()
            self._tell(ended)
        if self._running is None and self._waiting is not None:
            step, self._waiting = self._waiting, None
            try:
                self._running = self._begin(step)
            except OSError as error:
                self._warn(step, str(error))
        self._hold()

    def wait(self, stop: Stop) -> None:
        """Wait until no evaluation is left; `Stopped` if the run is asked to stop before.

        Collective.
        """
        if not self._every:
            return
        asked, busy = 0, 1
        try:
            with stop:
                self.poll(stop.asked)
                if self._running:
                    self._metrics.say(
                        f"waiting for the evaluation of step {self._running.step}; its log is "
                        f"{_log(self._running.output)}"
                    )
                while busy and not asked:
                    self._beat()
                    self.poll(stop.asked)
                    asked, busy = self._mesh.largest(stop.asked, int(self.is_busy))
                    time.sleep(0.2 * busy)
        finally:
            self.end()
        if busy:
            raise Stopped(f"{reason(asked)}; all steps are saved, start again to evaluate the last")

    def end(self) -> None:
        """End the evaluation that is under way; its answers stay for when the run goes on."""
        if self._running is None:
            return
        with self._running.process as process:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        self._metrics.say(f"the evaluation of step {self._running.step} was ended")
        self._running = None

    def _look(self) -> None:
        """Let the newest checkpoint that is due and has no accuracy be the next."""
        found = scores(self._checkpoints.folder, "accuracy")
        last = self._config.train.steps
        step = next((n for n in found if n == last or n % self._every == 0), 0)
        if step <= self._latest or found[step] is not None:
            return
        self._latest = step
        if self._waiting is not None:
            self._metrics.say(
                f"step {self._waiting} is not evaluated: step {step} came before its turn"
            )
        self._waiting = step
        self._hold()

    def _hold(self) -> None:
        """Keep the checkpoints that are being evaluated or about to be."""
        running = self._running.step if self._running else None
        self._checkpoints.held = {x for x in (running, self._waiting) if x is not None}

    def _begin(self, step: int) -> _Evaluation:
        output = self._folder / f"step_{step}"
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(configuration.dump(self._config), encoding="utf-8")
        with _log(output).open("ab") as log:
            process = subprocess.Popen(
                _command(self._checkpoints.folder / f"step_{step}", output),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(self._config.train.evaluate_gpus),
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
        return _Evaluation(step=step, output=output, process=process)

    def _tell(self, ended: _Evaluation) -> None:
        name = self._config.watched.name
        with ended.process as process:  # which closes its input
            if process.returncode:
                self._warn(ended.step, f"exit code {process.returncode}")
                return
        try:
            report = json.loads((ended.output / name / "report.json").read_text(encoding="utf-8"))
            if report.get("not_graded"):
                raise ValueError(f"{report['not_graded']} answers could not be graded")
            percent = float(report["score"]["symbolic_correct"]["percent"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            self._warn(ended.step, repr(error))
            return
        self._metrics.accuracy(ended.step, percent, name)
        try:
            self._checkpoints.add_score(ended.step, "accuracy", percent)
        except OSError as error:
            self._warn(ended.step, repr(error))

    def _warn(self, step: int, reason: str) -> None:
        self._metrics.say(
            f"warning: step {step} was not evaluated ({reason}), and training goes on; see "
            f"{_log(self._folder / f'step_{step}')}"
        )


def check_benchmark(config: RunConfig, mesh: Mesh) -> None:
    """Raise `EvaluationError` before the first step where the benchmark cannot be read."""
    if config.train.evaluate_every and mesh.is_main:
        benchmarks.load(config.watched, config.data.root)


def _log(output: Path) -> Path:
    return output / "log.txt"


def _command(checkpoint: Path, output: Path) -> list[str]:
    program = "mcore_sft.training.beside.accuracy_process"
    return [sys.executable, "-P", "-m", program, str(checkpoint), str(output)]


def _environment(gpus: str | None) -> dict[str, str]:
    """That of this process without what makes it a rank, and with the GPUs that are asked for."""
    made = {
        name: value
        for name, value in os.environ.items()
        if name not in _RANKS and not name.startswith("TORCHELASTIC_")
    }
    package = str(Path(mcore_sft.__file__).parent.parent)
    made["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [made.get("PYTHONPATH")])])
    if gpus is not None:
        made["CUDA_VISIBLE_DEVICES"] = gpus
    return made
