"""What is told of a run: numbers that add up, asked-for trackers, ranks that are slow."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mcore_sft.base.errors import UserError
from mcore_sft.checkpoint.sharded import Progress
from mcore_sft.config import LogConfig, RunConfig
from mcore_sft.model import families
from mcore_sft.training import loop
from mcore_sft.training.beside import trackers, validation
from mcore_sft.training.beside.metrics import Metrics, _open
from mcore_sft.training.beside.profiling import Profile
from mcore_sft.training.beside.stragglers import slow_ranks
from mcore_sft.training.flops import step_flops
from tests import runs
from tests.distributed import run_ranks


def test_lines_after_the_step_that_is_resumed_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    file.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    _open(file, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_flops_are_six_for_each_weight_and_token(model: Path) -> None:
    """Weights without embedding and norms as transformers counts them, scores by hand."""
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    sizes = {name: tensor.numel() for name, tensor in tensors.items() if tensor.dim() == 2}
    head = sizes.pop("lm_head.weight")
    del sizes["model.embed_tokens.weight"]
    shape = families.read(model)
    weights = step_flops(shape, tokens=10, supervised=0, squares=0)
    assert weights == 6 * 10 * sum(sizes.values())
    assert step_flops(shape, tokens=0, supervised=3, squares=0) == 6 * 3 * head
    # One document of 10: 45 + 10 pairs, about half of 100, for each of 4 layers and 4 heads of 32:
    # a product for the score and one for the value, each 2 operations, once forward, twice back.
    pairs = 10 * 10 / 2
    assert step_flops(shape, tokens=0, supervised=0, squares=100) == 3 * 4 * 4 * 32 * 2 * 2 * pairs


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0], []),
        ([1.0, 1.2], []),
        ([1.0, 1.3], [1]),
        ([1.0, 1.4, 1.0, 2.0], [3, 1]),
        ([2.0, 2.0, 2.0, 0.1], []),
    ],
)
def test_slow_ranks(seconds: list[float], slow: list[int]) -> None:
    assert slow_ranks(seconds) == slow


def _slow_on_rank_1(config: RunConfig) -> None:
    batches = loop.Loader.batches

    def slow(self: Any, step: int) -> Any:
        time.sleep(0.5 if os.environ["RANK"] == "1" else 0.0)
        return batches(self, step)

    loop.Loader.batches = slow  # type: ignore[method-assign]
    loop.train(config)


def test_the_slow_rank_is_named_though_all_take_as_long(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = runs.experiment(
        tmp_path / "run", model, train__steps=4, log__stragglers_every=2, log__peak_tflops=1.0
    )
    run_ranks(2, _slow_on_rank_1, config)
    lines = runs.metrics(config)
    told = [line for line in lines if line.get("event") == "ranks"]
    assert [line["step"] for line in told] == [2, 4]
    assert [line["slow"] for line in told] == [[1], [1]]
    assert "step 4: the others wait for rank 1 (" in capfd.readouterr().err
    for line in lines:
        if "loss" in line:
            assert line["step_seconds"] > 0.5
            parts = ("data", "forward_backward", "optimizer")
            assert sum(line[f"{part}_seconds"] for part in parts) == line["step_seconds"]
            assert line["data_seconds"] < line["forward_backward_seconds"]  # it is rank 0's
            weights = step_flops(
                families.read(model), tokens=line["tokens"], supervised=0, squares=0
            ) / (line["step_seconds"] * 1e12 * 2)
            assert weights < line["mfu"] < 3 * weights
            assert line["peak_memory_bytes"] > 2**26


def test_saving_and_validating_are_told_apart_from_the_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, validate = loop.Checkpoints.save, validation.validation_loss

    def slow_save(*arguments: Any) -> None:
        time.sleep(0.6)
        save(*arguments)

    def slow_validation(*arguments: Any) -> float:
        time.sleep(0.3)
        return validate(*arguments)

    monkeypatch.setattr(loop.Checkpoints, "save", slow_save)
    monkeypatch.setattr(validation, "validation_loss", slow_validation)
    config = runs.experiment(
        tmp_path / "run",
        model,
        data__validation=[{"path": "rows.jsonl", "limit": 5}],
        data__packed=str(tmp_path / "packed"),
        train__steps=3,
        train__validate_every=2,
        checkpoint__every=2,
    )
    runs.pack_rows(config)
    lines = [line for line in runs.train(config) if "loss" in line]
    assert [line["mfu"] for line in lines] == [None] * 3
    assert [line["checkpoint_seconds"] > 0.6 for line in lines] == [False, False, True]
    assert [line["validation_seconds"] > 0.3 for line in lines] == [False, False, True]
    parts = [lines[2][f"{part}_seconds"] for part in ("data", "forward_backward", "optimizer")]
    assert lines[2]["step_seconds"] == sum(parts)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wandb": "x"}, "log.wandb needs the package wandb, which is not installed"),
        ({"tensorboard": True}, "log.tensorboard needs the package tensorboard"),
        ({"curve": True}, "log.curve needs the package matplotlib"),
    ],
)
def test_a_package_that_is_asked_for_and_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check(LogConfig())
    with pytest.raises(trackers.ConfigError, match=said):
        trackers.check(LogConfig(**settings))


def test_tensorboard_and_the_curve(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = {"train__steps": 2, "log__tensorboard": True, "log__curve": True}
    config = runs.experiment(tmp_path / "run", model, **changes)
    lines = runs.train(config)
    found = accumulator.EventAccumulator(str(config.folder / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in found.Scalars("loss")]
    assert shown == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert (config.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(**settings: Any) -> Any:
        calls.append(settings)
        return SimpleNamespace(
            id="abc",
            define_metric=lambda *names, **settings: None,
            log=lambda numbers, **settings: calls.append((settings, numbers)),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Exception))

    class Refused(Exception):
        pass

    def refuse(**settings: Any) -> Any:
        raise Refused("no API key")

    refusing = SimpleNamespace(init=refuse, Error=Refused)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", refusing)
        with pytest.raises(UserError, match=r"does not begin \(no API key\); run `wandb login`"):
            trackers.open_trackers(LogConfig(wandb="mine"), tmp_path, "name", 0)
    for known, resumed_at in ((None, 0), ("abc", 2), (None, 0)):
        (track,) = trackers.open_trackers(LogConfig(wandb="mine"), tmp_path, "name", resumed_at)
        track(3, {"loss": 1.0})
        track(2, {"step": 2, "accuracy": 50.0})
        settings, line, late = calls[-3:]
        assert (settings["project"], settings["name"], settings["id"]) == ("mine", "name", known)
        assert line == ({"step": 3}, {"loss": 1.0})
        assert late == ({"commit": False}, {"accuracy": 50.0, "evaluated_step": 2})


def test_a_log_that_cannot_be_written_is_named(model: Path, tmp_path: Path) -> None:
    mesh: Any = SimpleNamespace(is_main=True, device=torch.device("cpu"))
    made = Metrics(tmp_path, "name", LogConfig(), 1, families.read(model), mesh)
    made.path = Path("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full could not be written \(No space left"):
        made.validation(Progress(step=1), 1.0)


def test_a_run_that_is_resumed_among_the_profiled_steps(tmp_path: Path) -> None:
    mesh: Any = SimpleNamespace(world=SimpleNamespace(rank=0), device=torch.device("cpu"))
    with Profile(LogConfig(profile=(2, 4)), tmp_path, mesh) as profile:
        for step in (3, 4, 5):
            profile.before_step(step)
            taken: Any = SimpleNamespace(progress=Progress(step=step))
            profile.after_step(taken)
            assert (tmp_path / "profile" / "rank_0.json").exists() == (step > 3)


def test_profiled_steps(model: Path, tmp_path: Path) -> None:
    changes = {"train__steps": 3, "log__profile": [2, 9]}
    config = runs.experiment(tmp_path / "run", model, **changes)
    runs.train(config, "dp2")
    traces = sorted((config.folder / "profile").glob("*"))
    assert [trace.name for trace in traces] == ["rank_0.json", "rank_1.json"]
    for trace in traces:
        assert "aten::" in trace.read_text()
