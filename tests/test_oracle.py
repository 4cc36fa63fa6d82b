"""The oracle by itself; equality 10 holds the trainer against it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mcore_sft.config import OptimizerConfig
from mcore_sft.data.text.prompt import Example
from mcore_sft.training import optimizer
from nightly.curve import Curve
from tests import oracle, runs


def test_the_examples_of_a_step_are_those_of_all_ranks(model: Path, tmp_path: Path) -> None:
    changes = {"train__micro_batch": 2, "train__global_batch": 24, "train__steps": 3}
    config = runs.experiment(tmp_path, model, **changes)
    for step, examples in zip(
        runs.train(config, "dp2"), oracle.examples_of_steps(config, 3), strict=True
    ):
        assert step["examples"] == len(examples)
        assert step["tokens"] == sum(len(example) for example in examples)
        assert step["supervised_tokens"] == sum(len(oracle.learned(x)) for x in examples)


@pytest.mark.parametrize("warmup", [{"warmup_steps": 4}, {"warmup_ratio": 0.12}])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedules_are_those_of_the_trainer(schedule: str, warmup: dict[str, float]) -> None:
    lowest = {} if schedule == "constant" else {"min_lr": 1e-4}
    falls = {"decay_ratio": 0.33} if schedule == "wsd" else {}
    settings = OptimizerConfig(lr=1e-3, schedule=schedule, **warmup, **lowest, **falls)
    for step in range(1, 21):
        expected = optimizer.learning_rate(settings, step - 1, 20)
        assert oracle.learning_rate(settings, step, 20) == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_that_of_the_learned_tokens_alone(model: Path) -> None:
    tokens = np.arange(5, 15, dtype=np.int32)
    example = Example(tokens=tokens, spans=np.array([[0, 2], [4, 7]], dtype=np.int32))
    assert oracle.learned(example).tolist() == [1, 4, 5, 6]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        chances = plain(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
    expected = -sum(chances[at - 1, tokens[at]].item() for at in (1, 4, 5, 6))
    assert oracle.summed_loss(plain, example).item() == pytest.approx(expected, rel=1e-6)


def test_a_part_of_the_steps_is_written(model: Path, tmp_path: Path) -> None:
    config = runs.experiment(tmp_path, model, train__steps=20)
    found = oracle.run(config, steps=2)
    found.write(tmp_path / "curve.json")
    assert Curve.read(tmp_path / "curve.json") == found
    assert found.steps == (1, 2)
    assert min(found.tokens_per_second) > 0
    assert found.peak_memory > 0
