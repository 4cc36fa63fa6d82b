from itertools import combinations

import pytest

from mcore_sft.evaluation.scores.statistics import Mean, Paired, Share, majority, pass_at_k, wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (300, 500, 55.6, 64.2),
        (297, 500, 55.0, 63.6),
        (224, 500, 40.5, 49.2),
        (2954, 5000, 57.7, 60.4),
    ],
)
def test_wilson(hits: int, total: int, low: float, high: float) -> None:
    assert tuple(round(end, 1) for end in wilson(hits, total)) == (low, high)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0, 16.11),
        (1, 29, 0.61, 17.18),
    ],
)
def test_wilson_as_it_is_published(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=0.005)
    assert Share(hits=hits, total=total).interval == wilson(hits, total)
    assert Share(hits=hits, total=total).percent == pytest.approx(100 * hits / total)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10) == pytest.approx((72.25, 100), abs=0.005)
    assert wilson(10, 10)[1] == 100
    assert wilson(0, 0) == (0, 100)
    assert wilson(1, 1)[0] > 0
    assert Share(hits=0, total=0).percent == 0


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("right", [[False] * 4, [True, False, False, True], [True] * 4])
def test_pass_at_k_is_the_share_of_all_choices(right: list[bool], k: int) -> None:
    choices = [any(chosen) for chosen in combinations(right, k)]
    assert pass_at_k(right, k) == pytest.approx(sum(choices) / len(choices))


def test_pass_at_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="pass@3 of 2 answers"):
        pass_at_k([True, False], 3)


@pytest.mark.parametrize(
    ("classes", "right", "value"),
    [
        ([0, 0, 1], [True, True, False], 1.0),
        ([0, 1, 1], [True, False, False], 0.0),
        ([0, 1, 0, 1], [True, False, True, False], 0.5),
        ([-1, -1, 0], [False, False, True], 1.0),
        ([-1, -1], [False, False], 0.0),
    ],
)
def test_majority_averages_ties(classes: list[int], right: list[bool], value: float) -> None:
    assert majority(classes, right) == value


def test_a_vote_has_a_voter() -> None:
    with pytest.raises(ValueError, match="shorter"):
        majority([0, 0], [True])


def test_mean_has_the_error_between_problems() -> None:
    mean = Mean(values=(1.0, 0.0, 0.5, 0.5))
    assert mean.percent == 50
    assert mean.standard_error == pytest.approx(20.412, abs=1e-3)
    assert mean.interval == pytest.approx((9.99, 90.01), abs=0.01)


def test_a_mean_without_spread_is_not_certain() -> None:
    assert Mean(values=(0.0,) * 40).interval == wilson(0, 40)
    assert Mean(values=(1.0, 0.0, 1.0)).interval == wilson(2, 3)


def test_a_mean_of_little() -> None:
    assert Mean(values=()).percent == 0
    assert Mean(values=()).interval == (0, 100)
    assert Mean(values=(0.5,)).standard_error == 0
    assert Mean(values=(0.5,)).interval == (50, 50)
    assert Mean(values=(0.4, 0.6)).standard_error == pytest.approx(10)
    assert Mean(values=(0.0, 0.0, 0.4)).interval == pytest.approx((0, 39.47), abs=0.005)
    assert Mean(values=(1.0, 1.0, 0.6)).interval == pytest.approx((60.53, 100), abs=0.005)


@pytest.mark.parametrize(
    ("paired", "difference", "low", "high", "p_value"),
    [
        # responses before and after a transplantation (Bentur et al., 2009), the interval as
        # Agresti and Min propose, the exact test as Fagerland et al. (2014) have it
        (Paired(both=1, only_a=1, only_b=7, neither=12), 28.57, 2.85, 49.32, 0.0703),
        (Paired(both=1, only_a=7, only_b=1, neither=12), -28.57, -49.32, -2.85, 0.0703),
        (Paired(both=9, only_a=28, only_b=1, neither=2), -67.5, -80.88, -47.69, 1.12e-07),
        (Paired(both=0, only_a=0, only_b=3, neither=0), 100, 1.86, 100, 0.25),
        (Paired(both=0, only_a=3, only_b=0, neither=0), -100, -100, -1.86, 0.25),
        (Paired(both=0, only_a=0, only_b=0, neither=0), 0, -98.0, 98.0, 1),
    ],
)
def test_paired_differences_as_they_are_published(
    paired: Paired, difference: float, low: float, high: float, p_value: float
) -> None:
    assert paired.difference == pytest.approx(difference, abs=0.005)
    assert paired.interval == pytest.approx((low, high), abs=0.006)
    assert paired.p_value == pytest.approx(p_value, rel=0.01)


def test_mcnemar_is_exact() -> None:
    paired = Paired(both=50, only_a=2, only_b=10, neither=38)
    # 2 * P(X <= 2) of a binomial of 12 and 1/2: 2 * (1 + 12 + 66) / 4096
    assert paired.p_value == pytest.approx(158 / 4096)
    assert paired.difference == pytest.approx(8.0)
    low, high = paired.interval
    assert 0 < low < 8 < high < 16


def test_runs_that_agree_differ_by_chance_alone() -> None:
    assert Paired(both=5, only_a=0, only_b=0, neither=5).p_value == 1
    assert Paired(both=0, only_a=3000, only_b=3000, neither=0).p_value == 1
    assert Paired(both=0, only_a=0, only_b=5000, neither=0).p_value == 0
