"""Updates that would do harm are not made, and what caused them is named."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_sft.config import RunConfig, TrainConfig
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.packs.loader import Loader, packs_of_a_step
from mcore_sft.model import build
from mcore_sft.training.beside.guards import PATIENCE, Mean, Share, is_spike, means_of
from tests import runs

BUSY = [1.0, 1.1] * 8


@pytest.mark.parametrize(
    ("loss", "before", "spike"),
    [
        (1.30, BUSY, False),
        (1.40, BUSY, True),
        (0.10, BUSY, False),  # only upwards
        (9.00, BUSY[:7], False),  # fewer than half the window
        (9.00, BUSY[:8], True),
        (9.00, [], False),
    ],
)
def test_a_spike(loss: float, before: list[float], spike: bool) -> None:
    assert is_spike(loss, before, 6.0, 16) is spike


def test_a_micro_batch_of_two_context_ranks_is_named_once() -> None:
    shares = [
        Share(6.0, 2, (7, 8)),
        Share(1.0, 1, (9,)),
        Share(3.0, 1, (7, 8)),
        Share(0.0, 0, (9,)),
    ]
    assert means_of(shares) == [Mean(3.0, (7, 8)), Mean(1.0, (9,))]


@pytest.mark.parametrize(("rank", "size", "micro_batch"), [(0, 1, 1), (1, 2, 1), (0, 2, 2)])
def test_the_packs_of_a_step_are_those_of_its_batches(
    model: Path, rank: int, size: int, micro_batch: int
) -> None:
    loader = _loader(model, rank, size, micro_batch)
    dataset = PackedDataset(model / "packed")
    for step in (0, loader.steps_per_epoch - 1, loader.steps_per_epoch + 2):
        named, read = loader.packs(step), loader.batches(step)
        for packs, batch in zip(named, read, strict=True):
            tokens = [x for p in packs for e in dataset.pack(p).examples for x in e.tokens.tolist()]
            useful = batch.tokens[batch.tokens != 0].tolist()
            assert useful == [token for token in tokens if token != 0]


def _loader(model: Path, rank: int = 0, size: int = 1, micro_batch: int = 1) -> Loader:
    dataset = PackedDataset(model / "packed")
    return Loader(
        dataset,
        packs_per_step=packs_of_a_step(
            TrainConfig(global_batch=10), dataset.num_examples / len(dataset)
        ),
        micro_batch=micro_batch,
        seed=42,
        last_step="drop",
        rank=rank,
        size=size,
        pad_id=0,
    )


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Multiplies the last hidden states, or their gradient, where a micro-batch holds one pack."""

    def plant(model: Path, pack: int, *, hidden: float = 1.0, gradient: float = 1.0) -> None:
        supervised = int(PackedDataset(model / "packed").supervised[pack])
        head = build.linear_cross_entropy

        def poisoned(states: Any, *arguments: Any, **keywords: Any) -> Any:
            if len(keywords["rows"]) == supervised:
                states = _Scaled.apply(states, hidden, gradient)
            return head(states, *arguments, **keywords)

        monkeypatch.setattr(build, "linear_cross_entropy", poisoned)

    return plant


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Any, forward: float, backward: float) -> Any:
        ctx.factor = backward
        return states * forward

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * ctx.factor, None, None


def _alone(model: Path, step: int) -> int:
    """A pack of `step` that has a number of supervised tokens of its own."""
    counts = PackedDataset(model / "packed").supervised.tolist()
    packs = [pack for packs in _loader(model).packs(step) for pack in packs]
    return next(pack for pack in packs if counts.count(counts[pack]) == 1)


@pytest.mark.parametrize("layout", ["one", "dp2", "pp2", "tp2_sp"])
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_pack(
    model: Path, tmp_path: Path, poison: Callable[..., None], layout: str
) -> None:
    pack = _alone(model, 2)
    poison(model, pack, hidden=math.nan)
    config = runs.experiment(tmp_path / "run", model, train__steps=4, checkpoint__every=2)
    with pytest.raises(AssertionError) as ended:
        runs.train(config, layout)
    said = str(ended.value)
    assert f"TrainingError: step 3: the loss is nan in packs {pack} and examples " in said
    assert "the weights were left as they were. Look at them with tools/inspect_data.py" in said
    assert (config.folder / "latest").read_text() == "step_2\n"  # its writer was not cut off
    assert _events(config) == [{"step": 3, "event": "nonfinite", **_samples(model, pack)}]


def test_a_gradient_that_is_no_number_names_the_packs_of_the_step(
    model: Path, tmp_path: Path, poison: Callable[..., None]
) -> None:
    pack = _alone(model, 1)
    poison(model, pack, gradient=math.inf)
    config = runs.experiment(tmp_path / "run", model, train__steps=4)
    with pytest.raises(AssertionError, match="though every loss is finite, in a step of packs"):
        runs.train(config)
    (event,) = _events(config)
    assert sorted(event["packs"]) == sorted(p for packs in _loader(model).packs(1) for p in packs)


def test_such_a_step_is_skipped_where_that_is_asked(
    model: Path, tmp_path: Path, poison: Callable[..., None]
) -> None:
    """The step after starts from the same weights, without a trace of the other in the moments."""
    poison(model, _alone(model, 2), hidden=math.nan)
    changes: dict[str, Any] = {"train__steps": 4, "train__on_nonfinite": "skip"}
    skipped = runs.train(runs.experiment(tmp_path / "skipped", model, **changes))
    steps = [line for line in skipped if "event" not in line]
    assert [line["loss"] is None for line in steps] == [False, False, True, False]
    assert [line["skipped_steps"] for line in steps] == [0, 0, 1, 1]


def test_damaged_weights_end_the_run_though_steps_are_skipped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = build.linear_cross_entropy
    monkeypatch.setattr(
        build,
        "linear_cross_entropy",
        lambda states, *rest, **kw: head(states * math.nan, *rest, **kw),
    )
    config = runs.experiment(tmp_path / "run", model, train__on_nonfinite="skip")
    with pytest.raises(AssertionError, match=f"{PATIENCE} steps in a row"):
        runs.train(config)
    assert len(_events(config)) == PATIENCE


@pytest.mark.parametrize("on_spike", ["warn", "skip"])
@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_a_spike_is_named_and_skipped_where_that_is_asked(
    model: Path, tmp_path: Path, poison: Callable[..., None], layout: str, on_spike: str
) -> None:
    pack = _alone(model, 4)
    poison(model, pack, hidden=30.0)
    changes: dict[str, Any] = {
        "train__steps": 6,
        "train__spike_window": 6,
        "train__on_spike": on_spike,
        "optimizer__lr": 1e-4,
        "checkpoint__every": 3,
    }
    config = runs.experiment(tmp_path / "whole", model, **changes)
    lines = runs.train(config, layout)
    assert {"step": 5, "event": "spike", **_samples(model, pack)} in lines
    last = next(line for line in lines if line["step"] == 6 and "loss" in line)
    assert last["skipped_steps"] == (1 if on_spike == "skip" else 0)
    again = runs.experiment(tmp_path / "resumed", model, **changes)
    again.folder.mkdir()
    (config.folder / "step_3").rename(again.folder / "step_3")
    resumed = runs.train(again, layout)
    keys = ("step", "loss", "grad_norm", "event", "skipped_steps")
    told = [[line.get(key) for key in keys] for line in lines if line["step"] > 3]
    assert [[line.get(key) for key in keys] for line in resumed] == told


def _events(config: RunConfig) -> list[dict[str, Any]]:
    return [line for line in runs.metrics(config) if "event" in line]


def _samples(model: Path, pack: int) -> dict[str, list[int]]:
    return {"packs": [pack], "examples": PackedDataset(model / "packed").examples_of(pack)}
