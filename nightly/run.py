"""One benchmark of a tier in, its record out; what is done is not done again.

    inputs -> dataset -> training -> reference, peer -> killed and started again -> evaluation
    -> judgement -> (a failure: narrowed) -> Record

Every stage leaves a file in <output>/<tier>/<commit>/<benchmark>/, and is passed over where that is
there: a night that was stopped goes on. A reference that is an earlier benchmark is read there.
"""

import contextlib
import json
import math
import os
import random
import shlex
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from mcore_sft import config as configuration
from mcore_sft.base import files
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import say
from mcore_sft.config import RunConfig
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.packs.loader import packs_of_a_step
from mcore_sft.evaluation.scores.statistics import Share
from nightly import commits, golden, judge, narrow, work
from nightly.curve import Curve, CurveError
from nightly.golden import GoldenError
from nightly.history import Outcome, Record
from nightly.judge import Finding
from nightly.tier import GOLDEN, PLAIN, Benchmark, Tier

LATEST = "latest"
"""What a training run's folder has from its first complete checkpoint on."""
SECONDS = "seconds.json"
NARROWED = "narrowed"
NARROW_BEYOND = 2
"""Steps after the first that departs, up to which a narrowing run goes."""


@dataclass(frozen=True, kw_only=True)
class Night:
    """A tier at a commit on this machine; `until` is when all must have ended (monotonic)."""

    tier: Tier
    commit: str
    commit_time: str
    machine: dict[str, str | int]
    output: Path
    data: Path | None
    until: float
    earlier: Sequence[Record]
    """What the history holds of the tier."""

    @property
    def folder(self) -> Path:
        """Where all of this night is."""
        return self.output / self.tier.name / self.commit


class Run:
    """The stages of one benchmark of a night."""

    def __init__(self, night: Night, benchmark: Benchmark) -> None:
        self.night, self.benchmark = night, benchmark
        self.folder = night.folder / benchmark.name
        self.work = night.folder / "inputs" / (benchmark.inputs or benchmark.name)

    # ---- what is run

    @property
    def overrides(self) -> list[str]:
        """Those of the benchmark, with its folders."""
        return [self._named(text) for text in self.benchmark.overrides]

    def config(self, folder: Path, changes: Sequence[str] = ()) -> RunConfig:
        """The experiment, to be trained in `folder`."""
        words = [*self.overrides, *changes, f"output={folder}"]
        return configuration.load(str(self.benchmark.config), words)

    def check(self) -> None:
        """Raise `ConfigError` of whatever can be seen to be wrong before anything is run."""
        config, name = self.config(self.folder), f"benchmark {self.benchmark.name}"
        size, mend = self.benchmark.processes, "change processes, or the layout in overrides"
        config.parallel.require_split(size, f"processes of {name}", mend)
        every, steps = config.checkpoint.every, config.train.steps
        if self.benchmark.gates.resume and not 0 < every < steps:
            raise configuration.ConfigError(
                f"{name}: gates.resume with checkpoint.every {every} of {steps} steps; expected 1 "
                f"to {steps - 1}, so that there is one to go on from"
            )
        if self.benchmark.evaluate and not config.evaluation.benchmarks:
            raise configuration.ConfigError(
                f"{name}: evaluate needs evaluation.benchmarks in {self.benchmark.config}"
            )

    def record(self) -> Record:
        """Run what has not been run yet, and judge."""
        file = self.folder / "record.json"
        try:
            if _is_kept(file, _record):
                return _record(file)
            self.check()
            files.make_folder(self.folder)
            made = self._judged()
            files.replace(file, made.to_json() + "\n")
        except Exception as error:  # whatever it is, the other benchmarks of the night are run
            return self._record("crashed", crash=told(error))
        return made

    def _judged(self) -> Record:
        self.inputs()
        self.dataset()
        measured = self.trained()
        findings = []
        try:
            reference = self.reference()
        except GoldenError as error:
            reference = None
            findings.append(Finding(gate="golden", passed=False, sentence=str(error)))
        peer = self.peer()
        resumed = self.resumed() if self.benchmark.gates.resume else None
        accuracy = self.accuracy() if self.benchmark.evaluate else None
        findings += judge.judge(
            measured,
            reference,
            self.benchmark.gates,
            accuracy=accuracy,
            peer_tokens_per_second=judge.speed(peer) if peer else None,
            resumed=resumed,
        )
        failed = [finding for finding in findings if not finding.passed]
        return self._record(
            "failed" if failed else "passed",
            findings=findings,
            figures=self._figures(measured, peer, accuracy),
            narrowed=self.narrowed(failed, reference) if failed else None,
        )

    def _figures(
        self, measured: Curve, peer: Curve | None, accuracy: Share | None
    ) -> dict[str, float]:
        """Those of `Record`; what is not known is NaN."""
        figures = {
            "final_loss": measured.loss[-1] if measured.steps else math.nan,
            "validation_loss": judge.last_validation(measured),
            "tokens_per_second": judge.speed(measured),
            "peak_memory_gib": measured.peak_memory / judge.GIB,
            "step_seconds": judge.step_seconds(measured),
            "seconds": self._seconds(),
        }
        if accuracy:
            low, high = accuracy.interval
            shares = ("accuracy", "accuracy_low", "accuracy_high")
            figures |= dict(zip(shares, (accuracy.percent, low, high), strict=True))
        if peer:
            figures["speed_ratio"] = judge.speed(measured) / judge.speed(peer)
        return figures

    def _record(
        self,
        outcome: Outcome,
        findings: Sequence[Finding] = (),
        figures: dict[str, float] | None = None,
        narrowed: str | None = None,
        crash: str | None = None,
    ) -> Record:
        night = self.night
        curve, reference = (
            str(file.relative_to(night.output)) if file.exists() else None
            for file in (self.folder / "curve.json", self.folder / "reference.json")
        )
        return Record(
            tier=night.tier.name,
            benchmark=self.benchmark.name,
            commit=night.commit,
            commit_time=night.commit_time,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=night.machine,
            outcome=outcome,
            findings=tuple(findings),
            figures={name: x for name, x in (figures or {}).items() if math.isfinite(x)},
            curve=curve,
            reference=reference,
            narrowed=narrowed,
            commits=None if outcome == "passed" else self._suspects(outcome),
            crash=crash,
        )

    def _suspects(self, outcome: Outcome) -> str:
        own = [x for x in self.night.earlier if x.benchmark == self.benchmark.name]
        return commits.suspects(own, self.night.commit, outcome)

    # ---- the stages

    def inputs(self) -> None:
        """What the tier's commands make, once for all that share it."""
        done = self.work / "made"
        if self.benchmark.inputs is None or done.exists():
            return
        shutil.rmtree(self.work, ignore_errors=True)  # half made, which the commands refuse
        for number, command in enumerate(self.night.tier.inputs[self.benchmark.inputs].commands):
            words = [self._named(word) for word in shlex.split(command)]
            self._run(f"inputs {number}", words, self.work / "inputs.log")
        files.sync_tree(self.work)
        files.write(done, "")

    def dataset(self) -> None:
        """The packed dataset."""
        config = self.config(self.folder)
        if not (config.packed / "manifest.json").exists():
            self._run("dataset", ["python", "tools/preprocess.py", *self._words(self.folder)])

    def trained(self) -> Curve:
        """The curve of the run itself."""
        file = self.folder / "curve.json"
        if not _is_kept(file, Curve.read):
            folder = self.folder / "run"
            self._run("training", self._training(folder))
            Curve.of_run(folder).write(file)
        return Curve.read(file)

    def reference(self) -> Curve | None:
        """What the run is held against: of the oracle, kept, or of another benchmark's run."""
        against, file = self.benchmark.against, self.folder / "reference.json"
        if against is None:
            return None
        if not _is_kept(file, Curve.read):
            if against == PLAIN:
                self._oracle("reference", file)
            elif against == GOLDEN:
                kept = golden.FOLDER / f"{self.benchmark.name}.json"
                golden.read(kept, self.made_from(), self._golden_command).write(file)
            else:
                other = Run(self.night, self.night.tier.benchmark(against))
                other.inputs()
                other.dataset()
                other.trained().write(file)
        return Curve.read(file)

    def peer(self) -> Curve | None:
        """Some steps of the oracle in the same job, for its speed."""
        if self.benchmark.against == PLAIN:
            return self.reference()
        if not self.benchmark.peer_steps:
            return None
        file = self.folder / "peer.json"
        if not _is_kept(file, Curve.read):
            self._oracle("peer", file, "--steps", str(self.benchmark.peer_steps))
        return Curve.read(file)

    def resumed(self) -> Curve:
        """The same run, killed at a step that the commit and the name choose, and started again."""
        file, folder = self.folder / "resumed.json", self.folder / "resumed"
        if not _is_kept(file, Curve.read):
            killed = self.folder / "killed_at"
            if not killed.exists():
                shutil.rmtree(folder, ignore_errors=True)
                step = self._step_to_kill()
                self._run_until("training that is killed", folder, step)
                files.replace(killed, f"{step}\n")
            self._run("training that is started again", self._training(folder))
            Curve.of_run(folder).write(file)
        return Curve.read(file)

    def _step_to_kill(self) -> int:
        config = self.config(self.folder)
        draw = random.Random(f"{self.night.commit} {self.benchmark.name}")
        return draw.randint(config.checkpoint.every, config.train.steps - 1)

    def accuracy(self) -> Share:
        """Of the experiment's first benchmark, by the exported model."""
        file = self.folder / "evaluation" / "report.json"
        if not _is_kept(file, _share):
            run, model = self.folder / "run", self.folder / "model"
            steps = self.config(run).train.steps
            if not (model / "config.json").exists():
                export = ["python", "tools/to_hf.py", "--checkpoint", str(run / f"step_{steps}")]
                self._run("export", [*export, "--output", str(model)])
            name = self.config(run).evaluation.benchmarks[0].name
            ask = ["python", "tools/evaluate.py", "--model", str(model), "--benchmark", name]
            words = ["--output", str(file.parent), *self._words(run)]
            self._run("evaluation", [*ask, *words])
        return _share(file)

    def made_from(self) -> dict[str, object]:
        """What decides the curve of the oracle."""
        config = self.config(self.folder)
        data = PackedDataset(config.packed, verify=False)
        packs = packs_of_a_step(config.train, data.num_examples / len(data))
        return golden.made_from(config, packs)

    def keep_golden(self, reason: str) -> Path:
        """Run the oracle and keep its curve."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.inputs()
        self.dataset()
        file, kept = self.folder / "oracle.json", golden.FOLDER / f"{self.benchmark.name}.json"
        if not _is_kept(file, Curve.read):
            self._oracle("golden", file)
        made, command = self.made_from(), self._golden_command
        golden.keep(kept, Curve.read(file), made, command=command, reason=reason)
        return kept

    @property
    def _golden_command(self) -> str:
        """What makes the golden curve, but for the reason."""
        data = "" if self.night.data is None else " --data DIR"
        name = self.benchmark.name
        return f"python tools/nightly.py --tier {self.night.tier.name}{data} --golden {name}"

    # ---- a failure, narrowed

    def narrowed(self, failed: list[Finding], reference: Curve | None) -> str | None:
        """Without which layout or precision the departure goes away; None where none is known."""
        steps = [f.step for f in failed if f.step and f.gate in ("loss", "grad_norm")]
        return self._without(min(steps), reference) if reference and steps else None

    def _without(self, step: int, reference: Curve) -> str:
        run = narrow.Departed(config=self.config(self.folder), processes=self.benchmark.processes)
        return narrow.narrowed(run, lambda trial: self._departs(step, trial, reference))

    def _departs(self, step: int, trial: narrow.Trial, reference: Curve) -> bool | str:
        """Whether the same run departs in `trial` up to `step` and a little beyond, or crashes."""
        folder, last = self.folder / _stage(trial), step + NARROW_BEYOND
        file = folder.with_suffix(".json")
        try:
            if not _is_kept(file, Curve.read):
                if last < self.config(folder).train.steps:
                    self._run_until(_stage(trial), folder, last, trial)
                else:
                    self._run(_stage(trial), self._training(folder, trial))
                Curve.of_run(folder).write(file)
        except UserError as error:  # what failed is told all the same
            return str(error).splitlines()[-1]
        gates = self.benchmark.gates
        judged = judge.judge(
            Curve.read(file).until(last),
            reference.until(last),
            type(gates)(loss=gates.loss, grad_norm=gates.grad_norm),
        )
        return not all(finding.passed for finding in judged)

    # ---- how it is run

    def _training(self, folder: Path, trial: narrow.Trial | None = None) -> list[str]:
        ranks = trial.processes if trial else self.benchmark.processes
        start = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        changes = trial.overrides if trial else ()
        return [*start, "mcore_sft/train.py", *self._words(folder, changes)]

    def _words(self, folder: Path, changes: Sequence[str] = ()) -> list[str]:
        config = ["--config", str(self.benchmark.config)]
        return [*config, *self.overrides, *changes, f"output={folder}"]

    def _oracle(self, stage: str, file: Path, *words: str) -> None:
        oracle = ["python", "-m", "tests.oracle", "--curve", str(file)]
        self._run(stage, [*oracle, *words, *self._words(self.folder)])

    def _run(self, stage: str, command: list[str], log: Path | None = None) -> None:
        with self._timed(stage):
            file = log or self._log(stage)
            work.run(command, file, threads=self._threads(command), until=self.night.until)

    def _run_until(
        self, stage: str, folder: Path, step: int, trial: narrow.Trial | None = None
    ) -> None:
        """Train until the metrics show `step`; kill it. What is no trial has a checkpoint then."""
        command = self._training(folder, trial)
        reached = partial(_has_reached, folder, step, saved=trial is None)
        threads, until = self._threads(command), self.night.until
        with self._timed(stage):
            work.run_and_kill(command, self._log(stage), reached, threads=threads, until=until)

    def _log(self, stage: str) -> Path:
        return self.folder / f"{stage.replace(' ', '_')}.log"

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Keep how long a stage took that has come to its end, if the night is stopped too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        yield
        taken = self._stages() | {stage: time.monotonic() - begun}
        files.replace(self.folder / SECONDS, json.dumps(taken, indent=1) + "\n")

    def _stages(self) -> dict[str, float]:
        """Stage that has come to its end -> seconds."""
        file = self.folder / SECONDS
        return _seconds(file) if _is_kept(file, _seconds) else {}

    def _seconds(self) -> float:
        """Of all stages up to the judgement."""
        return sum(x for stage, x in self._stages().items() if not stage.startswith(NARROWED))

    def _threads(self, command: list[str]) -> int:
        ranks = int(command[3]) if command[0] == "torchrun" else 1
        return max(1, len(os.sched_getaffinity(0)) // ranks)

    def _named(self, text: str) -> str:
        if "{data}" in text and self.night.data is None:
            raise configuration.ConfigError(
                f"benchmark {self.benchmark.name} needs --data, the folder for {{data}} in {text!r}"
            )
        return text.replace("{work}", str(self.work)).replace("{data}", str(self.night.data))


def _is_kept(file: Path, read: Callable[[Path], object]) -> bool:
    """Whether an earlier night left what `read` reads.

    An empty or torn file, as a power loss leaves it, is told and made again.
    """
    if not file.exists():
        return False
    try:
        read(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"{file} is skipped, and made again: {error}", error=True)
        return False
    return True


def _record(file: Path) -> Record:
    return Record.from_json(file.read_text(encoding="utf-8"))


def _seconds(file: Path) -> dict[str, float]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _share(file: Path) -> Share:
    """Right answers, as report.json says it."""
    report = json.loads(file.read_text(encoding="utf-8"))
    if report.get("not_graded"):
        raise work.Crash(f"{file}: {report['not_graded']} answers could not be graded")
    score = report["score"]["symbolic_correct"]
    return Share(hits=score["hits"], total=score["total"])


def _stage(trial: narrow.Trial) -> str:
    return f"{NARROWED} {trial.name}".replace(" ", "_")


def told(error: Exception) -> str:
    """An error that is meant to be read, or where one that is not comes from."""
    if isinstance(error, UserError):
        return work.tail(str(error), work.LAST_LINES + 2)
    return work.tail("".join(traceback.format_exception(error)))


def _has_reached(folder: Path, step: int, *, saved: bool) -> bool:
    if saved and not (folder / LATEST).exists():
        return False
    try:
        return bool(Curve.of_run(folder).until(step).steps[-1:] == (step,))
    except CurveError:
        return False
