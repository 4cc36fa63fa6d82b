"""Nothing in, a model that solves word problems out: the whole product in one run, on two cores.

    make data and model -> grade -> preprocess -> train -> export -> grade -> table and curve

It runs the commands that a user would run, and prints each before it does.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from demo_data import write_data

from mcore_sft import command, config
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Console, Parser, say
from mcore_sft.evaluation.scores.report import nemo_skills_table
from mcore_sft.evaluation.scores.statistics import Share
from mcore_sft.training.beside import curve

EXPERIMENT = Path("configs/demo.yaml")
PACKS = 8
"""Packs of a step."""
PASS = 90.0
"""Percent of the held-out problems that must be right in the end."""
SHORT = (
    *("train.steps=20", "train.validate_every=10"),
    *("optimizer.warmup_steps=5", "evaluation.max_new_tokens=8"),
)
"""What --short changes of the experiment: all four commands run, and no score is asked for."""

console = Console(soft_wrap=True)


class DemoError(UserError):
    """The demo did not do what it promises."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks share the work, and how."""

    tensor: int
    sequence: bool
    pipeline: int
    data: int

    @property
    def processes(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        split = [f"{name} {size}" for name, size in parts.items() if size > 1]
        split += ["sequence parallel"] * self.sequence
        ranks = f"{self.processes} rank{'s' * (self.processes > 1)}"
        return f"{ranks} ({', '.join(split)})" if split else ranks

    @property
    def overrides(self) -> list[str]:
        """The layout as the configuration knows it; data parallelism is what is left.

        The packs of a step are spread over data-parallel ranks, and pipeline stages get a
        micro-batch each to work on at the same time.
        """
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"parallel.pipeline={self.pipeline}",
            f"train.micro_batch={max(1, PACKS // (self.data * self.pipeline))}",
        ]


@dataclass
class Demo:
    """One run: its folder, the commands that it runs there, and how long each stage took."""

    folder: Path
    layout: Layout
    short: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def experiment(self) -> list[str]:
        """The arguments that all commands share."""
        return [
            "--config",
            str(EXPERIMENT),
            f"output={self.folder}",
            f"model.path={self.folder / 'base'}",
            f"data.root={self.folder / 'text'}",
            *(SHORT if self.short else ()),
        ]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and take its time."""
        console.print(f"\n{len(self.seconds) + 1}. {name}", style="bold")
        begun = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun

    def run(self, *words: str, threads: int | None = None) -> None:
        """Print one command and run it; `threads` is what torch may use in each process."""
        typed = shlex.join(words).replace(" --config", " \\\n      --config")
        console.print(f"  $ {typed}\n", style="green")
        limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        code = subprocess.run(words, env={**os.environ, **limit}, check=False).returncode
        if code:
            script = next(Path(word).name for word in words if word.endswith(".py"))
            raise DemoError(f"`{script}` ended with code {code}; its own words are above")


def main() -> None:
    """Run the demo; fails if too few answers are right in the end."""
    layout, short = _parse()
    demo = Demo(folder=_new_folder(), layout=layout, short=short)
    settings = config.load(EXPERIMENT, [*demo.layout.overrides, *(SHORT if short else ())])
    console.print(
        f"A small model learns to solve word problems, on {demo.layout}. "
        f"All of it goes to {demo.folder}."
    )
    with demo.stage("Make the data and a model of random weights"):
        make_data(demo)
        make_model(demo)
    with demo.stage("Grade the untouched model"):
        grade(demo, demo.folder / "base", "before")
    with demo.stage("Preprocess: text -> packed dataset"):
        demo.run(_program("python"), "tools/preprocess.py", *demo.experiment)
    with demo.stage("Train: packed dataset -> distributed checkpoint"):
        train(demo)
    step = f"step_{settings.train.steps}"
    with demo.stage("Export: checkpoint -> Hugging Face folder"):
        checkpoint, model = str(demo.folder / step), str(demo.folder / "model")
        demo.run(
            _program("python"), "tools/to_hf.py", "--checkpoint", checkpoint, "--output", model
        )
    with demo.stage("Grade the trained model"):
        grade(demo, demo.folder / "model", "after")
    finish(demo)


def make_data(demo: Demo) -> None:
    """Write the rows to train on, the rows held out, and a tokenizer of their text."""
    learned, held_out, tokenizer = write_data(demo.folder)
    example = learned[0]
    console.print(
        f"{len(learned):,} word problems to learn from, {len(held_out)} held out with other "
        f"numbers, a tokenizer of {tokenizer.get_vocab_size()} tokens. One of them:\n"
    )
    for text in (example["problem"], *example["generated_solution"].splitlines()):
        console.print(f"    {text}", style="dim")
    console.print()


def make_model(demo: Demo) -> None:
    """Make the random weights that everything starts from."""
    base, tokenizer = str(demo.folder / "base"), str(demo.folder / "tokenizer")
    demo.run(
        _program("python"),
        *("tools/make_random_model.py", "--output", base, "--tokenizer", tokenizer),
    )


def grade(demo: Demo, model: Path, name: str) -> None:
    """Ask the model the held-out problems and grade its answers."""
    demo.run(
        *(_program("python"), "tools/evaluate.py", "--model", str(model)),
        *("--output", str(demo.folder / name), *demo.experiment),
    )


def train(demo: Demo) -> None:
    """Start the ranks of the layout."""
    processes = demo.layout.processes
    demo.run(
        *(_program("torchrun"), "--standalone", "--nproc-per-node", str(processes)),
        *("mcore_sft/train.py", *demo.experiment, *demo.layout.overrides),
        threads=max(1, (os.cpu_count() or 1) // processes),
    )


def finish(demo: Demo) -> None:
    """Show what came of it, and where; raises `DemoError` where it is not good enough."""
    curve.draw(demo.folder / "metrics.jsonl", demo.folder / "loss.png")
    before, after = (read_shares(demo.folder / name) for name in ("before", "after"))
    console.print("\nWhat came of it\n", style="bold")
    modes = {"before": before, "after": after}
    say(nemo_skills_table("demo", modes, after[0].total).rstrip() + "\n")
    _show("What lies where", places(demo))
    _show("Time", times(demo))
    right = after[0]
    if demo.short:
        console.print("\nAll four commands ran; 20 steps teach too little to score.", style="green")
        return
    if right.percent < PASS:
        raise DemoError(
            f"{right.hits} of {right.total} held-out problems are right after training, at least "
            f"{PASS:.0f} % were expected; the loss curve in {demo.folder / 'loss.png'} shows how "
            f"far it came, and train.steps in {EXPERIMENT} takes it further"
        )
    console.print(f"\n{right.hits} of {right.total} held-out problems are right.", style="green")


def places(demo: Demo) -> list[tuple[str, str]]:
    """What the run has left behind, and where."""
    names = {
        "word problems, learned and held out": "text",
        "packed dataset": "data",
        "tokenizer": "tokenizer",
        "untouched model": "base",
        "its score": "before",
        "trained model (Hugging Face)": "model",
        "its score after training": "after",
        "checkpoints": "step_*",
        "loss curve": "loss.png",
        "every step, as JSON lines": "metrics.jsonl",
    }
    return [(what, str(demo.folder / name)) for what, name in names.items()]


def times(demo: Demo) -> list[tuple[str, str]]:
    """Seconds of each stage and of the whole."""
    whole = {**demo.seconds, "together": sum(demo.seconds.values())}
    return [(name, f"{seconds:4.0f} s") for name, seconds in whole.items()]


def read_shares(graded: Path) -> tuple[Share, Share]:
    """How many answers are right and how many problems have none, from an evaluation's report."""
    score = json.loads((graded / "report.json").read_text(encoding="utf-8"))["score"]
    right, silent = (
        Share(hits=score[name]["hits"], total=score[name]["total"])
        for name in ("symbolic_correct", "no_answer")
    )
    return right, silent


def _show(title: str, rows: list[tuple[str, str]]) -> None:
    console.print(f"\n{title}", style="bold")
    width = max(len(what) for what, _ in rows)
    for what, told in rows:
        console.print(f"  {what.ljust(width)}  {told}")


def _new_folder() -> Path:
    """A folder that no run has used; the name says when it began."""
    name = f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path("results") / name
    number = 1
    while folder.exists():
        number += 1
        folder = Path("results") / f"{name}-{number}"
    folder.mkdir(parents=True)
    return folder


def _program(name: str) -> str:
    """`name` beside the running Python, as short as it can be typed here."""
    program = Path(sys.executable).with_name(name)
    here = Path.cwd()
    return str(program.relative_to(here) if program.is_relative_to(here) else program)


def _parse() -> tuple[Layout, bool]:
    """The layout of the command line and --short; a layout that cannot be stops here."""
    made = Parser(
        description="Train a small model to solve word problems, from nothing to a graded model."
    )
    made.add_argument("--tensor", type=_count, default=2, help="tensor-parallel ranks (2)")
    made.add_argument("--pipeline", type=_count, default=1, help="pipeline stages (1)")
    made.add_argument("--data", type=_count, default=1, help="data-parallel ranks (1)")
    made.add_argument(
        "--sequence",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="sequence parallelism (on where --tensor is at least 2)",
    )
    made.add_argument(
        "--short", action="store_true", help="20 steps: shows that all commands run, not a score"
    )
    given = made.parse_args()
    sequence = given.tensor > 1 if given.sequence is None else given.sequence
    layout = Layout(
        tensor=given.tensor, sequence=sequence, pipeline=given.pipeline, data=given.data
    )
    return layout, given.short


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, given {number}")
    return number


if __name__ == "__main__":
    command.run(main)
