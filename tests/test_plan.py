from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_sft import config as configuration
from mcore_sft import plan
from mcore_sft.config import ConfigError, ParallelConfig, RunConfig
from mcore_sft.model.architecture import Architecture
from mcore_sft.plan import GPUS, Layout, Workload
from mcore_sft.training.dry_run import dry_run, held
from mcore_sft.training.step import forward_step
from tests.distributed import run_ranks
from tests.runs import loaded
from tests.tiny import make_batch, make_model

SHAPE_8B = Architecture(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14_336,
    vocab=128_256,
    norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=None,
    tied=False,
    max_positions=131_072,
)
SHAPE_70B = replace(SHAPE_8B, layers=80, hidden=8192, heads=64, intermediate=28_672)
LOAD = Workload(examples=8.0, tokens=4096.0, supervised=2730.0, measured=False)


def run_config(*overrides: str) -> RunConfig:
    return configuration.parse({"name": "x", "model": {"path": "none"}}, overrides)


@pytest.mark.parametrize(
    ("shape", "count"), [(SHAPE_8B, 8_030_261_248), (SHAPE_70B, 70_553_706_496)]
)
def test_the_weights_of_all_stages_are_those_of_the_published_models(shape, count):
    for pipeline in (1, 2, 4):
        layout = Layout(pipeline=pipeline)
        assert sum(plan.parameters(shape, layout, stage) for stage in range(pipeline)) == count


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("shape", "gpus", "parallel"),
    [
        (SHAPE_8B, 8, {"tensor": 4, "sequence": True}),
        (SHAPE_8B, 4, {"tensor": 2, "pipeline": 2}),
        (SHAPE_70B, 64, {"tensor": 8, "sequence": True, "pipeline": 2}),
        (replace(SHAPE_8B, layers=4, tied=True, qk_norm=True), 2, {"pipeline": 2}),
        (replace(SHAPE_8B, layers=4, qkv_bias=True, tied=True), 2, {"tensor": 2}),
    ],
)
def test_plan_and_dry_run_agree(shape, gpus, parallel, precision):
    config = run_config(f"train.precision={precision}").model_copy(
        update={"parallel": ParallelConfig(**parallel)}
    )
    (real,) = run_ranks(1, dry_run, config, shape, gpus)
    planned = plan.stage_memory(shape, config, plan.configured(config, gpus), LOAD)
    assert len(real) == parallel.get("pipeline", 1)
    for stage, found in zip(planned, real, strict=True):
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(stage, part) == pytest.approx(getattr(found, part), rel=1e-3), part


def live(
    folder: Path, parallel: ParallelConfig, precision: str, recompute: str
) -> tuple[Architecture, Any, int]:
    """What a rank really holds, and the bytes that its forward pass leaves for the backward."""
    kept: dict[int, torch.Tensor] = {}
    with loaded(folder, parallel, precision, recompute=recompute) as here:
        own = [*here.gpt.parameters(), *(buffer.grad_data for buffer in here.gpt.buffers)]
        addresses = {tensor.untyped_storage().data_ptr() for tensor in own}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in addresses:
                kept[address] = tensor
            return tensor

        here.gpt.train()
        batch = make_batch([100, 200, 84, 128], length=512)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward_step(iter([batch]), here.gpt, mesh=here.mesh)
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return here.architecture, held(here.model, here.optimizer), saved


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence": True}], ids=["one", "tp2", "tp2_sp"]
)
def test_plan_and_the_tensors_of_a_run_agree(tmp_path, parallel, precision, recompute):
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 8,
        "head_dim": 16,
    }
    folder = make_model(tmp_path / "model", **sizes)
    layout = Layout(recompute=recompute, **parallel)
    ranks = run_ranks(layout.gpus, live, folder, ParallelConfig(**parallel), precision, recompute)
    for architecture, real, saved in ranks:
        planned = plan.memory(
            architecture,
            layout,
            0,
            precision=precision,
            sequence_length=512,
            supervised=2 / 3,
            micro_batches=1,
            layers="local",
        )
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(planned, part) == pytest.approx(getattr(real, part), rel=1e-3), part
        assert planned.activations == pytest.approx(saved, rel=0.1)


def test_chunks_in_flight_are_those_of_the_papers():
    layout = Layout(pipeline=4)
    assert [plan.chunks_in_flight(layout, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert plan.chunks_in_flight(layout, 0, 2) == 2
    # L (1 + (p - 1) / (p v)) layers on the first of p = 4 stages with v = 2 chunks each.
    chunks = plan.chunks_in_flight(Layout(pipeline=4, virtual=2), 0, 16)
    assert chunks / (4 * 2) == 1 + 3 / (4 * 2)


def test_the_bubble_and_the_exchanges_cost_time():
    config = run_config()

    def seconds(**layout: Any) -> float:
        return plan.estimate(SHAPE_8B, config, Layout(**layout), GPUS["h100"], LOAD).seconds

    one = seconds()
    assert one == pytest.approx(64 * 4096 * 6 * 8.0e9 / (989.4e12 * plan.EFFICIENCY), rel=0.1)
    assert seconds(recompute="full") == pytest.approx(one * 4 / 3, rel=0.03)
    assert one / 2 < seconds(tensor=2, sequence=True) < one / 1.5
    assert one / 2 < seconds(data=2) < one / 1.5
    # 64 micro-batches: the bubble is 3 / 64 of the time without chunks, 3 / 128 with two.
    assert seconds(pipeline=4, virtual=2) < seconds(pipeline=4)
    assert seconds(tensor=8, data=2) < seconds(tensor=16)  # which would leave the machine


def test_the_distributed_optimizer_divides_the_states_alone():
    config = run_config()
    plain, shared = (
        plan.stage_memory(SHAPE_8B, config, Layout(data=8, distributed_optimizer=flag), LOAD)[0]
        for flag in (False, True)
    )
    assert shared == replace(plain, optimizer=plain.optimizer / 8)


def test_layouts_that_fit_come_first_and_can_be_said():
    config = run_config("train.global_batch=512")
    found = plan.rank(SHAPE_8B, config, 8, GPUS["h100"], LOAD)
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    fitting = [one.seconds / one.packs for one in found if one.fits]
    assert fitting == sorted(fitting)
    assert fitting
    for one in found:
        assert one.layout.gpus == 8
        again = run_config(
            *(f"{key}={str(value).lower()}" for key, value in one.layout.keys.items())
        )
        assert plan.configured(again, 8) == one.layout
    assert not any(one.fits for one in plan.rank(SHAPE_70B, config, 8, GPUS["h100"], LOAD))


def test_a_layout_that_gpus_cannot_be_split_into_is_refused():
    with pytest.raises(ConfigError, match=r"6 GPU.* give a multiple of 4"):
        plan.configured(run_config("parallel.tensor=4"), 6)


def test_what_a_packed_dataset_says_takes_the_place_of_what_is_assumed(tmp_path):
    config = run_config(f"data.packed={tmp_path}")
    assert not plan.workload(config).measured
    manifest = tmp_path / "manifest.json"
    manifest.write_text(
        '{"splits": {"train": {"packs": 10, "examples_per_pack": 9.5, "tokens": 40000, '
        '"supervised_tokens": 30000}}}'
    )
    assert plan.workload(config) == Workload(
        examples=9.5, tokens=4000, supervised=3000, measured=True
    )
    manifest.write_text("{}")
    with pytest.raises(plan.PlanError, match="not the manifest of a packed dataset"):
        plan.workload(config)
