"""What must hold on one GPU, link by link: CPU local = GPU local = GPU Transformer Engine.

`make gpu-report` runs it. Ranks are forked, and this process never touches the GPU.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_sft.config import OptimizerConfig, ParallelConfig
from mcore_sft.data.batch import collate
from mcore_sft.runtime import mesh
from mcore_sft.training.step import StepResult, train_step
from tests import test_equalities as equalities
from tests import tiny
from tests.distributed import run_ranks
from tests.runs import loaded, relative

pytestmark = pytest.mark.gpu


def _steps(device: str, layers: str, model: Path, train: dict[str, Any]) -> list[StepResult]:
    """Three steps on one rank of a device."""
    if device == "cpu":
        mesh.this_device = lambda: torch.device("cpu")
    packs = [tiny.make_pack([20, 31, 50], seed=1), tiny.make_pack([60, 64], seed=2)]
    with loaded(model, ParallelConfig(), layers=layers, **train) as here:
        assert here.mesh.device.type == device
        batches = [collate([pack], 128, pad_id=0) for pack in packs]
        settings = OptimizerConfig(clip_grad=1.0)
        return [
            train_step(here.model, here.optimizer, batches, here.mesh, settings, 1e-4)
            for _ in range(3)
        ]


def compare(
    model: Path, places: list[tuple[str, str]], train: dict[str, Any], share: float
) -> None:
    """Losses within `share` of each other, gradient norms within ten times as much."""
    results = [run_ranks(1, _steps, *place, model, train)[0] for place in places]
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours.loss, theirs.loss) < share
        assert relative(ours.grad_norm, theirs.grad_norm) < 10 * share


def test_local_layers_on_a_gpu_are_those_of_the_cpu(model: Path) -> None:
    compare(model, [("cuda", "local"), ("cpu", "local")], {"precision": "fp32"}, 1e-5)


def test_transformer_engine_is_the_local_layers_on_the_same_gpu(model: Path) -> None:
    places = [("cuda", "transformer_engine"), ("cuda", "local")]
    compare(model, places, {"precision": "bf16"}, 2e-3)


@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_eight_bits_are_near_sixteen(model: Path, fp8: str) -> None:
    precision = {"precision": "bf16"}
    engine = ("cuda", "transformer_engine", model)
    (eight,) = run_ranks(1, _steps, *engine, precision | {"fp8": fp8})
    (sixteen,) = run_ranks(1, _steps, *engine, precision)
    for ours, theirs in zip(eight, sixteen, strict=True):
        assert relative(ours.loss, theirs.loss) < 2e-2


@pytest.mark.parametrize("fp8", ["none", "blockwise"])
def test_documents_of_a_pack_do_not_touch(model: Path, fp8: str) -> None:
    equalities.check_1(model, "one", "bf16", fp8=fp8)
