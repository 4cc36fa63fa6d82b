"""Curves are trained and judged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import converge
from tests.distributed import run_ranks


def test_a_tiny_shape_learns_in_a_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = converge.curve
    monkeypatch.setattr(converge, "curve", lambda *asked: run_ranks(1, here, *asked)[0])
    file = tmp_path / "curves.json"
    assert converge.main(["--steps", "30", "--fp8", "delayed", "--json", str(file)]) == 0
    curves = json.loads(file.read_text())["curves"]
    assert curves.keys() == {"none"}, "a CPU has no FP8"
    assert len(curves["none"]["losses"]) == 30
    assert curves["none"]["last"] < curves["none"]["first"] / 2
    assert "bf16" in capsys.readouterr().out


def test_a_curve_that_there_was_no_time_for_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converge.main(["--minutes", "0"]) == 1
    assert "bf16: not run: the 0 min were over" in capsys.readouterr().out


def test_nine_tokens_of_ten_are_decided_by_the_one_before() -> None:
    first, again, other = (converge.batches("cpu", number) for number in (3, 3, 4))
    follows = np.random.default_rng(0).permutation(converge.CHAINED["cpu"])
    tokens = first[0].tokens[0].numpy()
    assert 0.85 < np.mean(tokens[1:] == follows[tokens[:-1]]) < 0.95
    assert np.array_equal(tokens, again[0].tokens[0].numpy())
    assert not np.array_equal(tokens, other[0].tokens[0].numpy())


@pytest.mark.parametrize(
    ("losses", "met"),
    [
        ([10.0] * 5 + [2.0] * 15, True),
        ([10.0] * 5 + [2.5] * 15, False),  # too far from bf16 in the mean
        ([10.0] * 5 + [2.0] * 14 + [float("nan")], False),
    ],
)
def test_a_curve_in_eight_bits_stays_beside_that_in_sixteen(losses: list[float], met: bool) -> None:
    plain: dict[str, Any] = {"losses": [10.0] * 5 + [2.0] * 15}
    found = converge.judged("delayed", {"none": plain, "delayed": {"losses": losses}})
    assert found["met"] is met


def test_a_curve_that_does_not_fall_is_not_met() -> None:
    assert not converge.judged("none", {"none": {"losses": [10.0] * 5 + [6.0] * 15}})["met"]
    assert "area" not in converge.judged("delayed", {"delayed": {"losses": [2.0] * 9}, "none": {}})
