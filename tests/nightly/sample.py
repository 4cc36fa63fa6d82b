"""A made-up history: thirty commits, three benchmarks; one fails, one crashes, one gets better."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha1
from pathlib import Path

from nightly import history
from nightly.curve import Curve
from nightly.history import Record
from nightly.judge import Finding
from nightly.run import Night
from nightly.tier import Tier

PASSED = Finding(gate="loss", passed=True, value=3e-7, limit=1e-4, sentence="loss is within")
DEPARTS = Finding(
    gate="loss",
    passed=False,
    value=3e-3,
    limit=1e-4,
    step=13,
    sentence="loss departs at step 13: 1.70512, reference 1.7, 0.003 apart, at most 0.0001",
)


def night(wanted: Tier, folder: Path, seconds: float, earlier: Sequence[Record] = ()) -> Night:
    """A night of `wanted` in `folder`, on a machine and at a commit that are made up."""
    return Night(
        tier=wanted,
        commit="abc",
        commit_time="2026-01-01T00:00:00+00:00",
        machine={"device": "none", "cores": 2},
        output=folder,
        data=None,
        until=time.monotonic() + seconds,
        earlier=earlier,
    )


def record(number: int, benchmark: str = "short_dp2", **changes) -> Record:
    wave = math.sin(number * 1.7)
    made = Record(
        tier="cpu",
        benchmark=benchmark,
        commit=sha1(str(number).encode()).hexdigest(),
        commit_time=f"2025-06-{number % 30 + 1:02}T09:00:00+00:00",
        date=f"2025-06-{number % 30 + 1:02}T23:10:00+00:00",
        machine={"device": "cpu", "cores": 2},
        outcome="passed",
        findings=(PASSED,),
        figures={
            "final_loss": 1.2 + 2e-4 * wave,
            "validation_loss": 1.31 + 2e-4 * wave,
            "tokens_per_second": 10400 + 120 * wave,
            "peak_memory_gib": 1.62,
            "seconds": 71 + wave,
        },
        curve=None,
        reference=None,
    )
    return replace(made, **changes)


def curve(steps: int, departs: int | None = None) -> Curve:
    """A loss that falls; from the step `departs` on it falls less."""
    counted = range(1, steps + 1)
    off = [
        0.0 if departs is None else 3e-7 * i if i < departs else 3e-3 * (i - departs + 1)
        for i in counted
    ]
    loss = [1 + 6 * math.exp(-i / 6) + x for i, x in zip(counted, off, strict=True)]
    return Curve(
        steps=tuple(counted),
        loss=tuple(loss),
        grad_norm=tuple(2 + 5 / i + 10 * x for i, x in zip(counted, off, strict=True)),
        tokens_per_second=(10400.0,) * steps,
        validation={steps: loss[-1]},
        peak_memory=2**30,
    )


def write(folder: Path, nights: int = 30) -> Path:
    """The history's file; the curves lie beside it."""
    file = folder / "history.jsonl"
    names = {"measured": curve(20, departs=13), "reference": curve(20)}
    for name, made in names.items():
        made.write(folder / f"{name}.json")
    beside = {"curve": "measured.json", "reference": "reference.json"}
    for night in range(nights):
        left = nights - night
        history.append(file, _failing(night, left, beside))
        history.append(file, _crashing(night, left))
        history.append(file, _improving(night, nights))
    return file


def _failing(night: int, left: int, beside: dict[str, str]) -> Record:
    good = record(night, curve="reference.json", reference="reference.json")
    if left > 3:
        return good
    return replace(
        good,
        outcome="failed",
        findings=(DEPARTS, replace(PASSED, gate="memory_gib", sentence="peak memory 1.62 GiB")),
        figures=good.figures | {"final_loss": 1.224, "validation_loss": 1.334},
        narrowed="goes away in fp32, stays in one process",
        commits="one of 4 commits after a, the last that passed, up to b: git bisect start b a",
        **beside,
    )


def _crashing(night: int, left: int) -> Record:
    good = record(night, "demo_tp2")
    if left not in (1, 12):
        return good
    crash = "train: exit code 1\nTraceback (most recent call last):\nRuntimeError: <mask> & more"
    return replace(good, outcome="crashed", findings=(), figures={}, crash=crash)


def _improving(night: int, nights: int) -> Record:
    good = record(night, "math_dp2", curve="reference.json", reference="reference.json")
    share = 41 + 20 * night / nights + math.sin(night)
    better = {"accuracy": share, "accuracy_low": share - 4, "accuracy_high": share + 4}
    speed = {"tokens_per_second": 6100 + 60 * night, "speed_ratio": 1.2 + night / 50}
    return replace(good, figures=good.figures | better | speed)
