from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from mcore_sft.config import ConfigError, ModelConfig, ParallelConfig, TrainConfig
from mcore_sft.model import build
from mcore_sft.model.families import read
from mcore_sft.model.layers import PackedAttention
from mcore_sft.runtime.hardware import layer_implementation
from mcore_sft.runtime.mesh import connect
from mcore_sft.training.packs import row_unit
from tests import runs, tiny
from tests.distributed import run_ranks
from tests.runs import batch_of, gradients, loaded, on_layout


@pytest.mark.parametrize(
    ("train", "fp8", "refusal"),
    [
        ({}, None, ""),
        ({"fp8": "delayed"}, "hybrid", "delayed needs Transformer Engine's layers"),
        ({"fp8": "tensorwise", "fp8_bf16_ends": 1}, "hybrid", "model.layers is local here"),
        ({"fp8": "blockwise", "fp8_bf16_ends": 2}, "e4m3", "use train.fp8=none"),
        ({"fp8": "blockwise", "fp8_bf16_ends": 3}, None, "more than the 2 layers of a pipeline"),
    ],
)
def test_eight_bits_are_configured_and_refused_without_a_gpu(
    model: Path, train: dict[str, Any], fp8: str | None, refusal: str
) -> None:
    for found, refused in run_ranks(2, _eight_bits, ParallelConfig(pipeline=2), model, train):
        assert found == fp8
        assert refusal in refused
        assert bool(refused) == bool(refusal)


@pytest.mark.parametrize(
    ("fp8", "parallel", "sizes", "refusal"),
    [
        ("blockwise", {"tensor": 2}, {}, ""),
        ("tensorwise", {"tensor": 2, "sequence": True}, {}, ""),
        ("blockwise", {"tensor": 2, "sequence": True}, {}, "a hidden size that is a multiple of 1"),
        ("delayed", {}, {"hidden_size": 72}, "a multiple of 16, but this model has 72"),
        ("delayed", {"tensor": 2}, {"intermediate_size": 112}, "multiple of 16, but this model"),
        ("tensorwise", {}, {"head_dim": 4}, "width of the key heads"),
    ],
)
def test_sizes_that_eight_bits_refuse(
    tmp_path: Path, fp8: str, parallel: dict[str, Any], sizes: dict[str, int], refusal: str
) -> None:
    model = tiny.make_model(tmp_path, num_hidden_layers=1, **sizes)
    asked = ParallelConfig(**parallel)
    for _, refused in run_ranks(asked.tensor, _eight_bits, asked, model, {"fp8": fp8}):
        assert (refusal or "model.layers is local here") in refused


@pytest.mark.parametrize(
    ("fp8", "sequence", "unit"),
    [
        ("none", False, 1),
        ("none", True, 4),
        ("delayed", False, 16),
        ("tensorwise", True, 64),
        ("blockwise", False, 16),
        ("blockwise", True, 512),
    ],
)
def test_rows_of_each_rank_fit_eight_bits(fp8: str, sequence: bool, unit: int) -> None:
    parallel = ParallelConfig(tensor=4, sequence=sequence)
    mesh = Mock(spec=["parallel", "tensor"], parallel=parallel, tensor=Mock(size=4))
    assert row_unit(TrainConfig.model_validate({"fp8": fp8}), mesh) == unit


def _eight_bits(
    parallel: ParallelConfig, model: Path, train: dict[str, Any]
) -> tuple[str | None, str]:
    """Megatron-core's number format, and why there is no such model here."""
    settings, fp8 = TrainConfig(**train), None
    with connect(parallel) as mesh:
        try:
            config = build.transformer_config(read(model), settings, mesh, "local")
            fp8 = config.fp8
            assert config.first_last_layers_bf16 == bool(settings.fp8_bf16_ends)
            layer_implementation(ModelConfig(path=model), settings, mesh.device)
        except ConfigError as error:
            return fp8, str(error)
    return fp8, ""


def test_layers_that_can_add_their_gradients_in_place(model: Path) -> None:
    """As Transformer Engine's do; Megatron-core's own need Apex for it, and are never asked to."""
    ((fusion, asked),) = on_layout("one", _asked_to_add_gradients, model)
    assert not fusion
    assert asked == [True] * read(model).layers


def _asked_to_add_gradients(parallel: ParallelConfig, model: Path) -> tuple[bool, list[bool]]:
    """Megatron-core's switch for all layers, and those of the layers that have one."""
    PackedAttention.fuse_wgrad_accumulation = False  # type: ignore[attr-defined]
    with loaded(model, parallel) as here:
        name, modules = "fuse_wgrad_accumulation", here.gpt.modules()
        asked = [getattr(module, name) for module in modules if hasattr(module, name)]
        return here.gpt.config.gradient_accumulation_fusion, asked


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2_vp2", "cp2"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_changes_no_bit(model: Path, layout: str, recompute: str) -> None:
    kept = on_layout(layout, _gradients, model, "none")
    made = on_layout(layout, _gradients, model, recompute)
    for (loss, found, calls), (other_loss, other_found, other_calls) in zip(
        kept, made, strict=True
    ):
        assert other_calls == 2 * calls > 0
        assert other_loss == loss
        assert found.keys() == other_found.keys()
        assert all(torch.equal(found[name], other_found[name]) for name in found)


def _gradients(
    parallel: ParallelConfig, model: Path, recompute: str
) -> tuple[float, dict[str, Tensor], int]:
    """Loss and gradients of two packs, and how often attention was computed."""
    calls = 0
    forward = PackedAttention.forward

    def counted(self: PackedAttention, *args: object, **kwargs: object) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(self, *args, **kwargs)

    PackedAttention.forward = counted
    packs = [tiny.make_pack([20, 31, 50], seed=1), tiny.make_pack([60, 64], seed=2)]
    with loaded(model, parallel, recompute=recompute) as here:
        return *gradients(here, [batch_of(here, [pack]) for pack in packs]), calls


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_waits_for_a_weight_that_is_still_being_gathered(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """A large output layer has a bucket of its own, which only its own forward pass waits for."""
    small = partial(build.DistributedDataParallelConfig, bucket_size=1000)
    monkeypatch.setattr(build, "DistributedDataParallelConfig", small)
    made = tiny.make_model(tmp_path / "model", vocab_size=703, tie_word_embeddings=tied)
    packed = str(model / "packed")

    def losses(layout: str) -> list[float]:
        config = runs.experiment(tmp_path / layout, made, train__steps=4, data__packed=packed)
        return [step["loss"] for step in runs.train(config, layout)]

    assert losses("dp2_do_overlap") == pytest.approx(losses("dp2_do"), rel=1e-6)
