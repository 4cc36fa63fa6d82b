"""What must hold on one GPU, link by link: CPU local = GPU local = GPU Transformer Engine.

`make test-gpu` runs it, with the operators' own tests of tests/ops. None of it has run yet. `make
test-te` runs it on the CPU, where tests/te stands for the kernels of Transformer Engine.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mcore_sft.config import OptimizerConfig, ParallelConfig
from mcore_sft.data.packs.batch import collate
from mcore_sft.model import build
from mcore_sft.runtime import mesh
from mcore_sft.runtime.hardware import chosen_layers
from mcore_sft.training.step import StepResult, train_step
from tests import distributed, tiny
from tests import test_equalities as equalities
from tests.distributed import run_ranks
from tests.runs import loaded, relative

EMULATED = "tests.te.plugin" in sys.modules
pytestmark = pytest.mark.te if EMULATED else pytest.mark.gpu
ALONE = ParallelConfig()
GPU = "cpu" if EMULATED else "cuda"


@pytest.fixture(autouse=True)
def _all_run_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of all layers, one after another, though Megatron-core notes the attention of one in
    the environment and refuses another; over the emulation too."""
    if EMULATED:
        monkeypatch.setattr(
            build, "layer_implementation", lambda *asked: chosen_layers(*asked[:2], gpu=True)
        )
        monkeypatch.setattr(build, "attention_backend", lambda device: "fused")
    monkeypatch.setattr(distributed, "METHOD", "spawn")
    # What `be_deterministic` asks of the libraries: bits are compared.
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _steps(
    device: str,
    layers: str,
    model: Path,
    train: dict[str, Any],
    parallel: ParallelConfig = ALONE,
) -> list[StepResult]:
    """Three steps on one rank of a device."""
    packs = [tiny.make_pack([20, 31, 50], seed=1), tiny.make_pack([60, 64], seed=2)]
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    with (
        mock.patch.object(mesh, "this_device", return_value=place),
        loaded(model, parallel, layers=layers, **train) as here,
    ):
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


@pytest.mark.skipif(EMULATED, reason="the two are one")
def test_local_layers_on_a_gpu_are_those_of_the_cpu(model: Path) -> None:
    compare(model, [(GPU, "local"), ("cpu", "local")], {"precision": "fp32"}, 1e-5)


def test_transformer_engine_is_the_local_layers_on_the_same_gpu(model: Path) -> None:
    places = [(GPU, "transformer_engine"), (GPU, "local")]
    compare(model, places, {"precision": "bf16"}, 2e-3)


@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_eight_bits_are_near_sixteen(model: Path, fp8: str) -> None:
    precision = {"precision": "bf16"}
    engine = (GPU, "transformer_engine", model)
    (eight,) = run_ranks(1, _steps, *engine, precision | {"fp8": fp8})
    (sixteen,) = run_ranks(1, _steps, *engine, precision)
    for ours, theirs in zip(eight, sixteen, strict=True):
        assert relative(ours.loss, theirs.loss) < 2e-2


@pytest.mark.parametrize("fp8", ["none", "delayed", "tensorwise", "blockwise"])
def test_documents_of_a_pack_do_not_touch(model: Path, fp8: str) -> None:
    equalities.check_1(model, "one", "bf16", fp8=fp8)


def test_documents_of_a_pack_do_not_touch_in_fp32(model: Path) -> None:
    equalities.check_1(model, "one")


@pytest.mark.parametrize("fp8", ["none", "delayed", "tensorwise", "blockwise"])
def test_resume_is_bitwise(model: Path, tmp_path: Path, fp8: str) -> None:
    train = {"train__fp8": fp8, "train__deterministic": True}
    equalities.check_6(model, tmp_path, "one", "bf16", **train)


def test_the_distributed_optimizer_of_one_rank_is_the_plain_one(model: Path) -> None:
    train = {"precision": "bf16"}
    parallel = ParallelConfig(distributed_optimizer=True, overlap=True)
    (shared,) = run_ranks(1, _steps, GPU, "transformer_engine", model, train, parallel)
    (plain,) = run_ranks(1, _steps, GPU, "transformer_engine", model, train)
    for ours, theirs in zip(shared, plain, strict=True):
        assert relative(ours.loss, theirs.loss) < 1e-5


def test_masked_packs_change_nothing(model: Path) -> None:
    equalities.test_8_masked_packs_change_nothing(model, "one")


def test_a_step_without_supervised_tokens_is_skipped(model: Path) -> None:
    equalities.test_8_a_step_without_supervised_tokens_is_skipped(model, "one")
