"""Two curves and the gates between them in, what passed and what did not out; nothing is run."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from mcore_sft.evaluation.scores.statistics import Share
from nightly.curve import Curve
from nightly.tier import CurveGate, Gates

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one gate says."""

    gate: str
    passed: bool
    value: float | None = None
    """What was measured; None where there is no finite number."""
    limit: float | None = None
    """What it is held against."""
    step: int | None = None
    """The first step that departs; None where none does, or where it is not about steps."""
    sentence: str
    """The same for people."""


def judge(
    measured: Curve,
    reference: Curve | None,
    gates: Gates,
    *,
    accuracy: Share | None = None,
    peer_tokens_per_second: float | None = None,
    resumed: Curve | None = None,
) -> list[Finding]:
    """What each gate that is set says; NaN and missing inputs never pass."""
    found = list(_compared(measured, reference, gates))
    if gates.validation_below is not None:
        found.append(_validation_below(measured, gates.validation_below))
    found += [_loss_below(measured, step, limit) for step, limit in gates.loss_below.items()]
    if gates.accuracy is not None:
        found.append(_accuracy(accuracy, gates.accuracy))
    if gates.speed is not None:
        found.append(_speed(measured, peer_tokens_per_second, gates.speed))
    if gates.step_seconds is not None:
        found.append(_step_seconds(measured, gates.step_seconds))
    if gates.memory_gib is not None:
        found.append(_memory(measured, gates.memory_gib))
    if gates.resume:
        found.append(_resume(measured, resumed))
    return found


def speed(curve: Curve) -> float:
    """Tokens per second of the median step; NaN of no steps."""
    return median(curve.tokens_per_second) if curve.steps else math.nan


def step_seconds(curve: Curve) -> float:
    """Mean seconds of a step; NaN where nobody measured it."""
    return fmean(curve.step_seconds) if curve.step_seconds else math.nan


def last_validation(curve: Curve) -> float:
    """The last validation loss; NaN where there is none."""
    return curve.validation[max(curve.validation)] if curve.validation else math.nan


def _compared(measured: Curve, reference: Curve | None, gates: Gates) -> Iterator[Finding]:
    """The gates that look at a reference."""
    named = ("loss", "grad_norm", "area", "validation_loss")
    limits = {name: limit for name in named if (limit := getattr(gates, name)) is not None}
    if not limits:
        return
    if reference is None:
        for name in limits:
            yield _missing(name, "reference curve")
        return
    if measured.steps != reference.steps:
        yield _other_steps("steps", measured, reference, "the reference")
    for name in ("loss", "grad_norm"):
        if name in limits:
            yield _pointwise(name, measured, reference, limits[name])
    if "area" in limits:
        yield _area(measured, reference, limits["area"])
    if "validation_loss" in limits:
        yield _validation(measured, reference, limits["validation_loss"])


def _pointwise(name: str, measured: Curve, reference: Curve, gate: CurveGate) -> Finding:
    """The first step whose difference is above its tolerance; else the largest difference."""
    largest, at = -1.0, 0
    for step, ours, theirs in _pairs(measured, reference, name):
        limit = next((limit for until, limit in gate.items() if step <= until), None)
        if limit is None:
            break
        apart = abs(ours - theirs)
        share = _share(apart, theirs)
        if not apart <= limit * abs(theirs):
            return Finding(
                gate=name,
                passed=False,
                value=_finite(share),
                limit=limit,
                step=step,
                sentence=f"{name} departs at step {step}: {ours:.6g}, reference {theirs:.6g}, "
                f"{share:.2g} apart, at most {limit:g}",
            )
        if share > largest:
            largest, at = share, step
    if not at:
        return _missing(name, "step that is in both curves")
    return Finding(
        gate=name,
        passed=True,
        value=largest,
        limit=next(limit for until, limit in gate.items() if at <= until),
        sentence=f"{name} is within its tolerance; at most {largest:.2g} apart, at step {at}",
    )


def _area(measured: Curve, reference: Curve, limit: float) -> Finding:
    pairs = list(_pairs(measured, reference, "loss"))
    if not pairs:
        return _missing("area", "step that is in both curves")
    mean = fmean(theirs for _, _, theirs in pairs)
    share = _share(fmean(abs(ours - theirs) for _, ours, theirs in pairs), mean)
    said = "mean difference of the losses, relative to their mean"
    found = _at_most("area", share, limit, said)
    beyond = [step for step, a, b in pairs if not abs(a - b) <= limit * abs(mean)]
    if found.passed or not beyond:
        return found
    said = f"{found.sentence}; step {beyond[0]} is the first above"
    return replace(found, step=beyond[0], sentence=said)


def _validation(measured: Curve, reference: Curve, limit: float) -> Finding:
    """The last validation losses, which must be of the same step."""
    for curve, whose in ((measured, "this run"), (reference, "the reference")):
        if not curve.validation:
            return _missing("validation_loss", f"validation loss of {whose}")
    last, theirs = max(measured.validation), max(reference.validation)
    if last != theirs:
        return Finding(
            gate="validation_loss",
            passed=False,
            sentence=f"the last validation loss is that of step {last}, in the reference of "
            f"{theirs}",
        )
    ours, expected = measured.validation[last], reference.validation[last]
    said = f"validation loss {ours:.6g}, reference {expected:.6g}; difference"
    found = _at_most("validation_loss", _share(abs(ours - expected), expected), limit, said)
    return replace(found, step=None if found.passed else last)


def _validation_below(measured: Curve, limit: float) -> Finding:
    if not measured.validation:
        return _missing("validation_below", "validation loss of this run")
    last = max(measured.validation)
    said = "last validation loss"
    return _below("validation_below", last_validation(measured), limit, said, last)


def _loss_below(measured: Curve, step: int, limit: float) -> Finding:
    gate = f"loss_below at {step}"
    if step not in measured.steps:
        return _missing(gate, f"step {step} of this run")
    loss = measured.loss[measured.steps.index(step)]
    return _below(gate, loss, limit, f"loss at step {step}", step)


def _accuracy(accuracy: Share | None, least: float) -> Finding:
    if accuracy is None or not accuracy.total:
        return _missing("accuracy", "evaluation of this run")
    low, high = accuracy.interval
    return Finding(
        gate="accuracy",
        passed=high >= 100 * least,
        value=accuracy.hits / accuracy.total,
        limit=least,
        sentence=f"{accuracy.hits} of {accuracy.total} answers are right: {accuracy.percent:.1f} % "
        f"(95 % interval {low:.1f} to {high:.1f}), which must reach {100 * least:g} %",
    )


def _speed(measured: Curve, peer: float | None, least: float) -> Finding:
    if peer is None or not peer > 0:
        return _missing("speed", "speed of the peer")
    ratio = speed(measured) / peer
    return Finding(
        gate="speed",
        passed=ratio >= least,
        value=_finite(ratio),
        limit=least,
        sentence=f"{speed(measured):,.0f} tokens per second, peer {peer:,.0f}: ratio {ratio:.2f}, "
        f"at least {least:g}",
    )


def _step_seconds(measured: Curve, limit: float) -> Finding:
    if not measured.step_seconds:
        return _missing("step_seconds", "time of a step of this run")
    return _below("step_seconds", step_seconds(measured), limit, "mean step time in seconds")


def _memory(measured: Curve, limit: float) -> Finding:
    if not measured.peak_memory:
        return _missing("memory_gib", "peak memory of this run")
    return _at_most("memory_gib", measured.peak_memory / GIB, limit, "peak memory in GiB")


def _resume(measured: Curve, resumed: Curve | None) -> Finding:
    """The first step at which a number is not the same to the last bit; NaN never is."""
    if resumed is None:
        return _missing("resume", "run that was killed and started again")
    if resumed.steps != measured.steps or not measured.steps:
        return _other_steps("resume", resumed, measured, "the run that was left alone")
    series = [
        _pairs(resumed, measured, "loss"),
        _pairs(resumed, measured, "grad_norm"),
        (
            (step, resumed.validation.get(step, math.nan), measured.validation.get(step, math.nan))
            for step in resumed.validation.keys() | measured.validation.keys()
        ),
    ]
    departs = [step for pairs in series for step, again, once in pairs if again != once]
    first = min(departs, default=None)
    if first is None:
        said = "killed and started again, the run measures the same to the last bit"
    else:
        said = f"killed and started again, the run departs at step {first}"
    return Finding(gate="resume", passed=first is None, step=first, sentence=said)


def _pairs(ours: Curve, theirs: Curve, name: str) -> Iterator[tuple[int, float, float]]:
    """(step, ours, theirs) of the steps that are in both, in order."""
    mine: Sequence[float] = getattr(ours, name)
    other = dict(zip(theirs.steps, getattr(theirs, name), strict=True))
    for step, value in zip(ours.steps, mine, strict=True):
        if step in other:
            yield step, value, other[step]


def _other_steps(gate: str, measured: Curve, reference: Curve, whose: str) -> Finding:
    """Two curves that are not of the same steps, or of none."""
    return Finding(
        gate=gate,
        passed=False,
        step=min(set(measured.steps) ^ set(reference.steps), default=None),
        sentence=f"the curves are of {len(measured.steps)} steps, and {len(reference.steps)} of "
        f"{whose}; they must be the same, and some",
    )


def _missing(gate: str, what: str) -> Finding:
    return Finding(gate=gate, passed=False, sentence=f"{gate}: there is no {what}")


def _at_most(gate: str, value: float, limit: float, what: str) -> Finding:
    return Finding(
        gate=gate,
        passed=value <= limit,
        value=_finite(value),
        limit=limit,
        sentence=f"{what} {value:.4g}, at most {limit:g}",
    )


def _below(gate: str, value: float, limit: float, what: str, step: int | None = None) -> Finding:
    passed = value < limit
    return Finding(
        gate=gate,
        passed=passed,
        value=_finite(value),
        limit=limit,
        step=None if passed else step,
        sentence=f"{what} is {value:.4g}, must be below {limit:g}",
    )


def _share(apart: float, of: float) -> float:
    """How large `apart` is, relative to `of`."""
    if of:
        return apart / abs(of)
    return math.inf if apart else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
