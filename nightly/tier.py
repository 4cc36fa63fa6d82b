"""One file of configs/nightly/ in, checked sections out: what runs in a night, and what it must be.

In the commands of inputs and the overrides of benchmarks, {work} is the folder where the inputs
are made and {data} the folder given by --data.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self, cast

from pydantic import AfterValidator, Field, model_validator

from mcore_sft.config import (
    ConfigError,
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    Section,
    parse_section,
    read_tree,
)

FOLDER = Path("configs/nightly")
PLAIN = "plain"
GOLDEN = "golden"
Name = Annotated[str, Field(pattern="^[a-z0-9_]+$")]


def _rising(tolerances: dict[int, float]) -> dict[int, float]:
    if not tolerances:
        raise ValueError("expected steps and tolerances, such as {1: 1e-6, 20: 1e-4}, given none")
    if any(a >= b for a, b in pairwise(tolerances)):
        raise ValueError(f"expected rising steps, given {', '.join(map(str, tolerances))}")
    return tolerances


CurveGate = Annotated[dict[Count, NonNegative], AfterValidator(_rising)]
"""Last step -> the largest difference up to it, relative to the reference; later steps are not
judged one by one."""


class Gates(Section):
    """What a benchmark must be to pass; a gate whose input is missing fails."""

    loss: CurveGate | None = None
    """Step by step against the reference."""
    grad_norm: CurveGate | None = None
    """Step by step against the reference."""
    area: NonNegative | None = None
    """Largest mean difference of the losses, relative to the mean loss of the reference."""
    validation_loss: NonNegative | None = None
    """Largest difference of the last validation loss, relative to the reference's."""
    validation_below: Positive | None = None
    """What the last validation loss must be less than."""
    loss_below: dict[Count, Positive] = Field(default_factory=dict)
    """Step -> what its loss must be less than."""
    accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """The least share of right answers, which the upper end of the 95 % interval must reach."""
    speed: Positive | None = None
    """The least ratio of tokens per second to those of the peer of the same job."""
    step_seconds: Positive | None = None
    """What the mean time of a step, without validation and checkpoints, must be less than."""
    memory_gib: Positive | None = None
    """The largest peak memory of the process that writes the metrics, the first."""
    resume: bool = False
    """Killed and started again, the run must measure the same to the last bit."""

    @property
    def compares(self) -> bool:
        """Whether a reference is looked at."""
        gates = (self.loss, self.grad_norm, self.area, self.validation_loss)
        return any(gate is not None for gate in gates)


class Inputs(Section):
    """What several benchmarks start from: made once."""

    commands: tuple[str, ...]
    """Commands as one types them, without a shell."""


class Benchmark(Section):
    """One run and what is asked of it."""

    name: Name
    inputs: str | None = None
    """Which of the tier's inputs {work} holds."""
    config: Path
    """The experiment."""
    overrides: tuple[str, ...] = ()
    """Dotted overrides of the experiment, as on the command line."""
    processes: Count = 1
    """Ranks."""
    against: str | None = None
    """Where the reference comes from: `plain` runs the oracle, `golden` is a kept curve of it, and
    anything else is an earlier benchmark."""
    peer_steps: CountOrZero = 0
    """Steps that the oracle takes in the same job to be compared in speed, where it does not run
    for the reference."""
    evaluate: bool = False
    """Whether the trained model is exported and asked the experiment's first benchmark."""
    gates: Gates

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gates.compares and self.against is None:
            raise ValueError("gates against a reference need against, given none")
        if self.gates.accuracy is not None and not self.evaluate:
            raise ValueError("gates.accuracy needs evaluate: true")
        if self.gates.speed is not None and not (self.peer_steps or self.against == PLAIN):
            raise ValueError(f"gates.speed needs peer_steps or against: {PLAIN}")
        return self


class Suite(Section):
    """Tests that are too long for every change."""

    name: Name
    tests: tuple[str, ...]
    """Files, folders and options, as pytest is told; those marked slow are run too."""


class Tier(Section):
    """The benchmarks and long tests of one kind of machine."""

    name: Name
    minutes: Positive
    """How long all of it may take."""
    webhook: str | None = None
    """Address that the summary is sent to."""
    inputs: dict[Name, Inputs] = Field(default_factory=dict)
    """Name -> what is made before the benchmarks."""
    benchmarks: tuple[Benchmark, ...]
    """In this order."""
    suites: tuple[Suite, ...] = ()
    """Tests, after the benchmarks."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.benchmarks:
            raise ValueError("benchmarks: expected at least one")
        earlier: list[str] = [PLAIN, GOLDEN]
        for benchmark in self.benchmarks:
            name, against, inputs = benchmark.name, benchmark.against, benchmark.inputs
            if name in earlier:
                raise ValueError(f"benchmark {name}: the name is taken; expected another")
            if against is not None and against not in earlier:
                raise ValueError(
                    f"benchmark {name}: against {against}, expected one of {', '.join(earlier)}"
                )
            if inputs is not None and inputs not in self.inputs:
                raise ValueError(
                    f"benchmark {name}: inputs {inputs}, expected one of "
                    f"{', '.join(self.inputs) or 'none'}"
                )
            earlier.append(name)
        for suite in self.suites:
            if suite.name in earlier:
                raise ValueError(f"suite {suite.name}: the name is taken; expected another")
            earlier.append(suite.name)
        return self

    @property
    def names(self) -> list[str]:
        """Of all benchmarks and suites, in the order in which they are run."""
        return [x.name for x in self.benchmarks] + [x.name for x in self.suites]

    def suite(self, name: str) -> Suite | None:
        """The suite of this name, if there is one."""
        return next((suite for suite in self.suites if suite.name == name), None)

    def benchmark(self, name: str) -> Benchmark:
        """The benchmark of this name; raises `ConfigError`."""
        for benchmark in self.benchmarks:
            if benchmark.name == name:
                return benchmark
        known = ", ".join(self.names)
        raise ConfigError(f"tier {self.name} has no benchmark {name}; expected one of {known}")


def read(path: Path) -> Tier:
    """The tier in `path`; raises `ConfigError`."""
    tree = read_tree(path)
    try:
        return cast(Tier, parse_section(Tier, tree))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def named(name: str, folder: Path = FOLDER) -> Tier:
    """The tier called `name`; raises `ConfigError`."""
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"no tier {name} in {folder}; expected one of {', '.join(known)}")
    return read(folder / f"{name}.yaml")
