"""Training with Transformer Engine's layers: its own Python over the extension of tests/te.

`make test-te` runs this file.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from mcore_sft.checkpoint.sharded import Checkpoints, Progress
from mcore_sft.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from mcore_sft.model import build
from mcore_sft.training.packs import row_unit
from mcore_sft.training.step import StepResult, train_step, validation_loss
from tests import test_equalities as equalities
from tests import tiny
from tests.runs import Loaded, batch_of, gradients, loaded, on_layout, relative_norm

pytestmark = pytest.mark.te
SLOW = pytest.mark.slow
ENGINE = "transformer_engine"
RECIPES = {
    "delayed": "TEDelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
}


@pytest.fixture(autouse=True)
def _layers_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever device there is; in fp32, which no fused attention takes, with another one."""

    def choose(settings: ModelConfig, train: TrainConfig, device: torch.device) -> str:
        build.attention_backend = lambda device: (  # of this rank alone
            "fused" if train.precision == "bf16" else "unfused"
        )
        return settings.layers

    monkeypatch.setattr(build, "layer_implementation", choose)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that 8-bit products take on two tensor ranks."""
    sizes = {"hidden_size": 128, "intermediate_size": 128}
    return tiny.make_model(tmp_path_factory.mktemp("model") / "tiny", **sizes)


def _packs(here: Loaded, length: int = 128) -> list[Any]:
    packs = [tiny.make_pack([20, 32, 52], seed=1), tiny.make_pack([60, 64], seed=2)]
    return [batch_of(here, [pack], length) for pack in packs]


def _step(here: Loaded, length: int = 128) -> StepResult:
    settings = OptimizerConfig(clip_grad=1.0)
    batches = _packs(here, length)
    return train_step(here.model, here.optimizer, batches, here.mesh, settings, 1e-3)


def _steps(
    parallel: ParallelConfig, model: Path, layers: str, train: dict[str, Any]
) -> tuple[dict[str, Tensor], list[StepResult], Any]:
    """The first gradients, three steps, and the weights of each group of the optimizer."""
    with loaded(model, parallel, layers=layers, **train) as here:
        loss, found = gradients(here, _packs(here))
        results = [_step(here) for _ in range(3)]
        names = {id(w): n for chunk in here.model for n, w in chunk.named_parameters()}
        (own,) = here.optimizer.chained_optimizers
        groups = [
            (group["wd_mult"], sorted(names[id(weight)] for weight in group["params"]))
            for group in own.optimizer.param_groups
            # Each rank has runs of weights, cut elsewhere, or copies in fp32.
            if not parallel.distributed_optimizer and "precision" not in train
        ]
        assert loss == pytest.approx(results[0].loss, rel=1e-6)
        return found, results, groups


def _needs_attention_in_fp32() -> None:
    """It is what bits are compared in; no run asks Transformer Engine for it."""
    found = version("transformer-engine")
    if Version(found) < Version("2.11"):
        pytest.skip(f"Transformer Engine {found} has no attention within documents in fp32")


def _is_local(model: Path, layout: str, **train: Any) -> None:
    _needs_attention_in_fp32()
    ours = on_layout(layout, _steps, model, ENGINE, train)
    theirs = on_layout(layout, _steps, model, "local", train)
    for (found, steps, groups), (reference, known, decays) in zip(ours, theirs, strict=True):
        renamed = {_local_name(name): value for name, value in found.items()}
        if groups:
            assert relative_norm(renamed, reference) < 1e-5
        for step, other in zip(steps, known, strict=True):
            assert step.loss == pytest.approx(other.loss, rel=1e-5)
            assert step.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert [
            (decay, sorted(_local_name(name) for name in names)) for decay, names in groups
        ] == decays


def _local_name(name: str) -> str:
    for fused, norm in (
        ("self_attention.linear_qkv", "input_layernorm"),
        ("mlp.linear_fc1", "pre_mlp_layernorm"),
    ):
        name = name.replace(f"{fused}.layer_norm_weight", f"{norm}.weight")
    return name


def test_three_steps_are_those_of_the_local_layers(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "tiny", family="qwen3", tie_word_embeddings=True)
    _is_local(model, "tp2_sp")


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_trains_as_with_local_layers(tmp_path: Path, family: str) -> None:
    _is_local(tiny.make_model(tmp_path / "tiny", family=family), "tp2_sp")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "pp2_vp2", "dp2_do_overlap"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_layout_trains_as_with_local_layers(model: Path, layout: str, recompute: str) -> None:
    _is_local(model, layout, recompute=recompute)


@contextmanager
def _with_engine(*args: Any, **kwargs: Any) -> Iterator[Loaded]:
    with loaded(*args, **kwargs, layers=ENGINE) as here:
        yield here


@pytest.mark.parametrize(
    "fp8",
    ["blockwise", *(pytest.param(x, marks=SLOW) for x in ("none", "delayed", "tensorwise"))],
)
def test_documents_of_a_pack_do_not_touch(
    model: Path, fp8: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equalities, "loaded", _with_engine)
    equalities.check_1(model, "one", "bf16", fp8=fp8)


@pytest.mark.parametrize(
    ("fp8", "ends", "layout", "recompute"),
    [
        pytest.param("delayed", 0, "tp2_sp", "none", marks=pytest.mark.slow),
        pytest.param("tensorwise", 1, "pp2", "none", marks=pytest.mark.slow),
        ("blockwise", 1, "tp2_sp", "full"),
    ],
)
def test_each_layer_runs_with_its_recipe(
    model: Path, fp8: str, ends: int, layout: str, recompute: str
) -> None:
    train = {"precision": "bf16", "fp8": fp8, "fp8_bf16_ends": ends, "recompute": recompute}
    for recipes, losses in on_layout(layout, _recipes, model, train):
        for layer, used in recipes.items():
            eight = ends < layer <= 4 - ends
            assert used == {RECIPES[fp8] if eight else None}, f"layer {layer}"
        assert losses[2] < losses[1] < losses[0]


def _recipes(
    parallel: ParallelConfig, model: Path, train: dict[str, Any]
) -> tuple[dict[int, set[str | None]], list[float]]:
    """The recipes of each layer's products, and the validation loss, after 0, 1 and 2 steps."""
    from megatron.core.extensions.transformer_engine import FP8GlobalStateManager

    with loaded(model, parallel, layers=ENGINE, **train) as here:
        length = -(-128 // (unit := row_unit(TrainConfig(**train), here.mesh))) * unit
        found: dict[int, set[str | None]] = {}
        for chunk in here.model:
            for module in chunk.modules():
                if hasattr(module, "layer_number") and hasattr(module, "self_attention"):
                    found[module.layer_number] = used = set()
                    parts = [part for part in module.modules() if hasattr(part, "in_features")]
                    assert len(parts) == 4
                    for part in parts:
                        part.register_forward_pre_hook(functools.partial(_note_recipe, used))
        losses = []
        for _ in range(3):
            losses.append(validation_loss(here.model, _packs(here, length), here.mesh))
            _step(here, length)
        assert not FP8GlobalStateManager.is_fp8_enabled()
        return found, losses


def _note_recipe(used: set[str | None], *_: Any) -> None:
    """Before a product: how it is scaled."""
    from megatron.core.extensions.transformer_engine import FP8GlobalStateManager as State

    used.add(type(State.get_fp8_recipe()).__name__ if State.is_fp8_enabled() else None)


def test_delayed_scaling_looks_back_as_far_as_is_usual(model: Path) -> None:
    (found,) = on_layout("one", _history, model, {"precision": "bf16", "fp8": "delayed"})
    assert found == (1024, "max")


def _history(parallel: ParallelConfig, model: Path, train: dict[str, Any]) -> tuple[int, str]:
    from transformer_engine.common.recipe import Format

    from megatron.core.extensions.transformer_engine import TEDelayedScaling

    with loaded(model, parallel, layers=ENGINE, **train) as here:
        made = TEDelayedScaling(here.gpt.config, Format.HYBRID)
        return made.amax_history_len, made.amax_compute_algo


@pytest.mark.parametrize("fp8", ["delayed", pytest.param("blockwise", marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_bit_for_bit(model: Path, tmp_path: Path, fp8: str) -> None:
    train = {"precision": "bf16", "fp8": fp8}
    args = (tmp_path, model, ENGINE, train)
    for straight, after in zip(
        on_layout("dp2_do", _saved, *args), on_layout("dp2_do", _resumed, *args), strict=True
    ):
        assert after == straight


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(ENGINE, "local", marks=pytest.mark.slow), ("local", ENGINE)]
)
def test_checkpoints_fit_the_other_layers(
    model: Path, tmp_path: Path, before: str, after: str
) -> None:
    _needs_attention_in_fp32()
    (saved,) = on_layout("one", _saved, tmp_path, model, before, {})
    (resumed,) = on_layout("one", _resumed, tmp_path, model, after, {})
    assert resumed[0] == pytest.approx(saved[0], rel=1e-5)


def _checkpoints(folder: Path, here: Loaded) -> Checkpoints:
    return Checkpoints(
        folder, CheckpointConfig(), model=here.model, optimizer=here.optimizer, mesh=here.mesh
    )


def _saved(
    parallel: ParallelConfig, folder: Path, model: Path, layers: str, train: dict[str, Any]
) -> tuple[float, float]:
    """Two steps, saved; then the loss and gradient norm of the third."""
    with loaded(model, parallel, layers=layers, **train) as here:
        for _ in range(2):
            _step(here)
        checkpoints = _checkpoints(folder, here)
        checkpoints.save(Progress(step=2), lambda folder: None)
        checkpoints.wait()
        other = [batch_of(here, [tiny.make_pack([90, 38], seed=3)])]
        validation_loss(here.model, other, here.mesh)  # of which the resumed run knows nothing
        third = _step(here)
        return third.loss, third.grad_norm


def _resumed(
    parallel: ParallelConfig, folder: Path, model: Path, layers: str, train: dict[str, Any]
) -> tuple[float, float]:
    """Loss and gradient norm of the step after the one that was saved."""
    with loaded(model, parallel, layers=layers, **train) as here:
        assert _checkpoints(folder, here).restore_latest({}) is not None
        third = _step(here)
        return third.loss, third.grad_norm


@pytest.mark.parametrize(
    "layout", ["cp2", *(pytest.param(name, marks=SLOW) for name in ("tp2_sp_cp2", "pp2_cp2"))]
)
@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=SLOW)])
def test_ranks_that_share_documents_train_as_with_local_layers(
    model: Path, layout: str, recompute: str
) -> None:
    train = {"precision": "bf16", "recompute": recompute}
    ours = on_layout(layout, _steps, model, ENGINE, train)
    theirs = on_layout(layout, _steps, model, "local", train)
    (alone,) = on_layout("one", _steps, model, ENGINE, train)
    for (found, steps, _), (reference, known, _) in zip(ours, theirs, strict=True):
        renamed = {_local_name(name): value for name, value in found.items()}
        assert relative_norm(renamed, reference) < 3e-2
        for step, *others in zip(steps, known, alone[1], strict=True):
            for other in others:
                assert step.loss == pytest.approx(other.loss, rel=2e-3)
                assert step.grad_norm == pytest.approx(other.grad_norm, rel=2e-2)


@pytest.mark.parametrize("fp8", ["none", pytest.param("blockwise", marks=SLOW)])
def test_documents_do_not_touch_where_ranks_share_them(
    model: Path, fp8: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equalities, "loaded", _with_engine)
    equalities.check_1(model, "cp2", "bf16", fp8=fp8)
