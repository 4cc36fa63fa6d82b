"""Each gate passes at its limit and fails beyond it, on NaN, and where its input is missing."""

import json
import math
from dataclasses import replace

import pytest

from mcore_sft.evaluation.scores.statistics import Share
from nightly.curve import Curve, CurveError
from nightly.history import Record
from nightly.judge import Finding, judge
from nightly.tier import Gates

CURVE = Curve(
    steps=(1, 2, 3, 4),
    loss=(4.0, 2.0, 2.0, 1.0),
    grad_norm=(8.0, 4.0, 2.0, 1.0),
    tokens_per_second=(1.0, 100.0, 100.0, 90.0),
    validation={2: 2.0, 4: 1.0},
    peak_memory=2**30,
)
NAN = math.nan


def only(measured=CURVE, reference=CURVE, *, inputs=None, **gates):
    """The one finding of one gate."""
    (found,) = judge(measured, reference, Gates(**gates), **(inputs or {}))
    return found


def test_no_gates_find_nothing():
    assert judge(CURVE, None, Gates()) == []


@pytest.mark.parametrize("series", ["loss", "grad_norm"])
def test_the_first_step_above_its_tolerance_is_named(series):
    gate = {1: 0.0, 3: 0.25, 4: 0.5}
    assert only(**{series: gate}).passed
    ours = {"loss": (4.0, 2.5, 2.6, 3.0), "grad_norm": (8.0, 5.0, 2.6, 3.0)}[series]
    found = only(replace(CURVE, **{series: ours}), **{series: gate})
    assert (found.gate, found.passed, found.step, found.limit) == (series, False, 3, 0.25)
    assert found.value == pytest.approx(0.3)
    assert f"{series} departs at step 3: 2.6, reference 2" in found.sentence


def test_a_difference_at_the_tolerance_passes_and_the_largest_is_told():
    found = only(replace(CURVE, loss=(4.0, 2.5, 2.0, 1.5)), loss={3: 0.25, 4: 0.5})
    assert (found.passed, found.value, found.limit, found.step) == (True, 0.5, 0.5, None)
    assert found.sentence.endswith("at most 0.5 apart, at step 4")


def test_steps_after_the_last_of_a_gate_are_not_judged_one_by_one():
    other = replace(CURVE, loss=(4.0, 2.0, 9.0, 9.0))
    assert only(other, loss={2: 0.1}).passed
    assert only(other, loss={3: 0.1}).step == 3


@pytest.mark.parametrize("series", ["loss", "grad_norm"])
@pytest.mark.parametrize("whose", ["measured", "reference"])
def test_no_number_departs(series, whose):
    broken = replace(CURVE, **{series: (4.0, NAN, 2.0, 1.0)})
    pair = (broken, CURVE) if whose == "measured" else (CURVE, broken)
    found = only(*pair, **{series: {1: 9.0, 4: 1e9}})
    assert (found.passed, found.step, found.value) == (False, 2, None)


def test_a_reference_of_zero_takes_zero_alone():
    zero = replace(CURVE, loss=(0.0,) * 4)
    assert only(zero, zero, loss={4: 0.1}).passed
    assert not only(CURVE, zero, loss={4: 0.1}).passed


def test_area_is_the_mean_difference_over_the_mean_loss():
    other = replace(CURVE, loss=(4.5, 1.5, 2.0, 1.0))
    assert only(other, area=0.1112).passed
    found = only(other, area=0.111)
    assert (found.passed, found.value, found.step) == (False, pytest.approx(1 / 9), 1)
    assert only(replace(CURVE, loss=(4.0, 2.1, 2.0, 9.0)), area=0.5).step == 4
    broken = only(replace(CURVE, loss=(4.0, 2.0, NAN, 1.0)), area=9.0)
    assert (broken.passed, broken.step) == (False, 3)


@pytest.mark.parametrize("steps", [3, 0])
@pytest.mark.parametrize("gate", [{"loss": {4: 9.0}}, {"area": 9.0}, {"grad_norm": {4: 9.0}}])
def test_a_curve_that_ends_early_never_passes(steps, gate):
    series = ("steps", "loss", "grad_norm", "tokens_per_second")
    short = replace(CURVE, **{name: getattr(CURVE, name)[:steps] for name in series})
    for pair in ((short, CURVE), (CURVE, short), (short, short)):
        found = judge(*pair, Gates(**gate))
        same = pair[0] is pair[1] and steps
        assert all(x.passed for x in found) == bool(same)
    assert judge(short, CURVE, Gates(**gate))[0].step == steps + 1


def test_without_a_reference_its_gates_fail():
    gates = Gates(loss={1: 9.0}, grad_norm={1: 9.0}, area=9.0, validation_loss=9.0)
    found = judge(CURVE, None, gates)
    assert [x.gate for x in found] == ["loss", "grad_norm", "area", "validation_loss"]
    assert not any(x.passed for x in found)
    assert found[0].sentence == "loss: there is no reference curve"


def test_the_last_validation_loss_is_compared():
    other = replace(CURVE, validation={2: 9.0, 4: 1.25})
    assert only(other, validation_loss=0.25).passed
    found = only(other, validation_loss=0.24)
    assert (found.passed, found.step) == (False, 4)
    assert not only(replace(CURVE, validation={4: NAN}), validation_loss=9.0).passed
    assert not only(CURVE, replace(CURVE, validation={4: NAN}), validation_loss=9.0).passed
    assert "that of step 2" in only(
        replace(CURVE, validation={2: 2.0}), validation_loss=9.0
    ).sentence  # fmt: skip
    for pair in ((replace(CURVE, validation={}), CURVE), (CURVE, replace(CURVE, validation={}))):
        assert "no validation loss of" in only(*pair, validation_loss=9.0).sentence


def test_the_last_validation_loss_is_below_its_bound():
    assert (only(validation_below=1.01).passed, only(validation_below=1.01).step) == (True, None)
    assert (only(validation_below=1.0).passed, only(validation_below=1.0).step) == (False, 4)
    assert not only(replace(CURVE, validation={4: NAN}), validation_below=9.0).passed
    assert not only(replace(CURVE, validation={}), validation_below=9.0).passed


def test_losses_of_steps_are_below_their_bounds():
    found = judge(CURVE, None, Gates(loss_below={1: 4.1, 4: 1.0}))
    assert [(x.gate, x.passed, x.step) for x in found] == [
        ("loss_below at 1", True, None),
        ("loss_below at 4", False, 4),
    ]
    assert not only(replace(CURVE, loss=(NAN,) * 4), loss_below={1: 9.0}).passed
    assert "no step 250" in only(loss_below={250: 9.0}).sentence


@pytest.mark.parametrize(
    ("hits", "passed"), [(251, True), (230, True), (229, False), (0, False), (500, True)]
)
def test_accuracy_may_fall_short_by_its_interval(hits, passed):
    found = only(accuracy=0.502, inputs={"accuracy": Share(hits=hits, total=500)})
    assert (found.passed, found.value, found.limit) == (passed, hits / 500, 0.502)
    assert f"{hits} of 500" in found.sentence


def test_accuracy_of_nothing_fails():
    assert not only(accuracy=0.1).passed
    assert not only(accuracy=0.1, inputs={"accuracy": Share(hits=0, total=0)}).passed


@pytest.mark.parametrize(
    ("peer", "passed"),
    [(47.5, True), (47.6, False), (NAN, False), (0.0, False), (None, False)],
)
def test_speed_is_that_of_the_median_step_over_the_peers(peer, passed):
    found = only(speed=2.0, inputs={"peer_tokens_per_second": peer})
    assert found.passed is passed


def test_speed_without_numbers_fails():
    broken = replace(CURVE, tokens_per_second=(NAN,) * 4)
    assert not only(broken, speed=0.1, inputs={"peer_tokens_per_second": 1.0}).passed


def test_the_mean_step_time_is_below_its_bound():
    timed = replace(CURVE, step_seconds=(9.0, 3.0, 4.0, 4.0))
    assert only(timed, step_seconds=5.001).passed
    found = only(timed, step_seconds=5.0)
    assert (found.passed, found.value, found.limit) == (False, 5.0, 5.0)
    assert found.sentence == "mean step time in seconds is 5, must be below 5"
    assert not only(replace(CURVE, step_seconds=(NAN,) * 4), step_seconds=9.0).passed
    assert "no time of a step" in only(CURVE, step_seconds=9.0).sentence


def test_peak_memory_is_in_gib():
    assert only(memory_gib=1.0).passed
    assert not only(memory_gib=0.99).passed
    assert not only(replace(CURVE, peak_memory=0), memory_gib=1.0).passed


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"loss": (4.0, 2.0, math.nextafter(2.0, 3.0), 1.0)}, 3),
        ({"grad_norm": (8.0, math.nextafter(4.0, 3.0), 2.0, 0.0)}, 2),
        ({"validation": {2: 2.0, 4: 1.5}}, 4),
        ({"validation": {4: 1.0}}, 2),
        ({"loss": (NAN, 2.0, 2.0, 1.0)}, 1),
    ],
)
def test_a_resumed_run_is_the_same_to_the_last_bit(changes, step):
    found = only(resume=True, inputs={"resumed": replace(CURVE, **changes)})
    assert (found.passed, found.step) == (False, step)


def test_a_resumed_run_may_differ_in_speed_alone():
    other = replace(CURVE, tokens_per_second=(2.0,) * 4, peak_memory=5)
    assert only(resume=True, inputs={"resumed": other}).passed
    assert not only(resume=True).passed
    short = replace(CURVE, steps=(1, 2, 4))
    assert only(resume=True, inputs={"resumed": short}).step == 3


def test_a_curve_is_read_from_the_metrics_of_a_run(tmp_path):
    step = {"loss": None, "grad_norm": 2.0, "tokens_per_second": 7.0, "peak_memory_bytes": 5}
    step |= {"step_seconds": 3.0}
    lines = [
        {"step": 1} | step,
        {"step": 1, "event": "spike"},
        {"step": 2} | step | {"loss": 0.5, "peak_memory_bytes": 4},
        {"step": 2, "validation_loss": 0.25},
        {"step": 2, "accuracy": 90.0, "benchmark": "demo"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = Curve.of_run(tmp_path)
    assert found.steps == (1, 2)
    assert math.isnan(found.loss[0])
    assert (found.loss[1], found.validation, found.peak_memory) == (0.5, {2: 0.25}, 5)
    assert found.step_seconds == (3.0, 3.0)
    assert found.until(1).step_seconds == (3.0,)
    found.write(tmp_path / "curve.json")
    again = Curve.read(tmp_path / "curve.json")
    assert math.isnan(again.loss[0])
    assert replace(again, loss=()) == replace(found, loss=())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": [1]}'])
def test_what_is_no_curve_is_an_error(tmp_path, text):
    with pytest.raises(CurveError, match="no metrics of a run"):
        Curve.of_run(tmp_path)
    (tmp_path / "curve.json").write_text(text)
    with pytest.raises(CurveError, match=r"curve\.json: no curve"):
        Curve.read(tmp_path / "curve.json")


def record(**changes):
    told = {
        "tier": "cpu",
        "benchmark": "short",
        "commit": "c0ffee",
        "commit_time": "2026-01-01T00:00:00+00:00",
        "date": "2026-01-02T00:00:00+00:00",
        "machine": {"device": "cpu", "cores": 2},
        "outcome": "failed",
        "findings": (Finding(gate="loss", passed=False, step=3, sentence="a\nb"),),
        "figures": {"final_loss": 0.1},
        "curve": "cpu/c0ffee/short/curve.json",
        "reference": None,
    }
    return Record(**(told | changes))


def test_a_record_is_one_line_and_comes_back():
    line = record().to_json()
    assert "\n" not in line
    assert Record.from_json(line) == record()
    broken = record(figures={"final_loss": NAN, "seconds": 1.0})
    assert Record.from_json(broken.to_json()).figures == {"seconds": 1.0}


@pytest.mark.parametrize(
    "line", ["", "{}", "[]", "3", record().to_json()[:-9], record(outcome="fine").to_json()]
)
def test_a_line_that_is_no_record_is_a_value_error(line):
    with pytest.raises(ValueError, match=r"no record|Expecting value|Unterminated|delimiter"):
        Record.from_json(line)
