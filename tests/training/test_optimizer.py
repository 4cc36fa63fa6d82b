import pytest

from mcore_sft.config import OptimizerConfig
from mcore_sft.training.optimizer import learning_rate


def _rates(steps: int, **settings: object) -> list[float]:
    config = OptimizerConfig.model_validate({"lr": 1.0, **settings})
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_constant() -> None:
    assert _rates(3) == [1.0, 1.0, 1.0]


def test_warmup_reaches_the_peak_with_its_last_step() -> None:
    assert _rates(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear() -> None:
    assert _rates(4, schedule="linear", min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine() -> None:
    rates = _rates(6, schedule="cosine", warmup_steps=2)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466])


def test_a_warmup_may_be_a_share_of_the_steps() -> None:
    for ratio in (0.25, 0.29):
        assert _rates(7, warmup_ratio=ratio) == [0.5, *[1.0] * 6]


def test_wsd_keeps_the_rate_and_falls_at_the_end() -> None:
    rates = _rates(10, schedule="wsd", decay_ratio=0.4, warmup_steps=2, min_lr=0.2)
    assert rates == pytest.approx([0.5, *[1.0] * 6, 0.8, 0.6, 0.4])
    assert _rates(4, schedule="wsd", decay_ratio=1.0) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert _rates(3, schedule="wsd") == [1.0, 1.0, 1.0]  # its fall is within the last step
