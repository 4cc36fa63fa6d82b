import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from mcore_sft import config as configuration
from mcore_sft.config import ConfigError, ParallelConfig, RunConfig
from mcore_sft.data.packs.batch import Batch, collate
from mcore_sft.model.architecture import Architecture
from mcore_sft.model.families.llama import Llama
from mcore_sft.plan import memory, ranking
from mcore_sft.plan.layout import Layout, PlanError, Workload, configured, workload
from mcore_sft.plan.memory import stage_memory
from mcore_sft.plan.speed import EFFICIENCY, GPUS
from mcore_sft.training.dry_run import Held, dry_run, held
from mcore_sft.training.step import run
from tests.distributed import run_ranks
from tests.runs import loaded
from tests.tiny import make_model, make_pack

SHAPE_8B = Llama(
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
        assert sum(memory.parameters(shape, layout, stage) for stage in range(pipeline)) == count


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("shape", "gpus", "parallel"),
    [
        (SHAPE_8B, 8, {"tensor": 4, "sequence": True}),
        (SHAPE_8B, 4, {"tensor": 2, "pipeline": 2}),
        (SHAPE_70B, 64, {"tensor": 8, "sequence": True, "pipeline": 2}),
        (SHAPE_70B, 32, {"tensor": 8, "pipeline": 2, "virtual": 4, "context": 2}),
        (SHAPE_8B, 8, {"tensor": 2, "context": 2, "distributed_optimizer": True, "overlap": True}),
        (replace(SHAPE_8B, layers=4, tied=True, qk_norm=True), 2, {"pipeline": 2}),
        (replace(SHAPE_8B, layers=4, qkv_bias=True, tied=True), 2, {"tensor": 2}),
    ],
)
def test_plan_and_dry_run_agree(shape, gpus, parallel, precision):
    config = run_config(f"train.precision={precision}").model_copy(
        update={"parallel": ParallelConfig(**parallel)}
    )
    (real,) = run_ranks(1, dry_run, config, shape, gpus)
    planned = stage_memory(shape, config, configured(config, gpus), LOAD)
    assert len(real) == parallel.get("pipeline", 1)
    for stage, found in zip(planned, real, strict=True):
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(stage, part) == pytest.approx(getattr(found, part), rel=1e-3), part


def peak(here: Any, batches: list[Batch]) -> int:
    """Most bytes that a forward and backward pass holds beyond what is there before it.

    The least of three, since what gloo's own threads free is not seen.
    """
    found = []
    for _ in range(3):
        for chunk in here.model:
            chunk.zero_grad_buffer()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run(here.model, batches, here.mesh, forward_only=False)
        events = profiled.profiler.kineto_results.events()
        changes = [event for event in events if event.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        found.append(max(itertools.accumulate(event.nbytes() for event in changes)))
    return min(found)


def live(
    folder: Path, parallel: ParallelConfig, train: dict[str, Any], micro_batches: int
) -> tuple[Architecture, int, Held, int]:
    """Shape and stage of a rank, what it holds and what a step needs beside that."""
    with loaded(folder, parallel, **train) as here:
        for chunk in here.model:
            chunk.train()
        packs = [make_pack([100, 200, 84, 128], seed=seed) for seed in range(train["micro_batch"])]
        batches = [collate(packs, 512, pad_id=0) for _ in range(micro_batches)]
        run(here.model, batches, here.mesh, forward_only=False)
        stage = here.mesh.pipeline.rank
        return here.architecture, stage, held(here.model, here.optimizer), peak(here, batches)


@pytest.mark.parametrize(
    ("precision", "recompute"),
    [
        pytest.param("fp32", "none", marks=pytest.mark.slow),
        ("bf16", "none"),
        pytest.param("bf16", "selective", marks=pytest.mark.slow),
        ("fp32", "full"),
    ],
)
@pytest.mark.parametrize(
    ("family", "parallel", "micro_batch", "micro_batches"),
    [
        ("llama-3.1", {}, 2, 1),
        ("llama-3.2", {"tensor": 2}, 1, 1),
        ("qwen3", {"tensor": 2, "sequence": True}, 2, 1),
        ("llama-3.2", {"pipeline": 2}, 1, 3),
        ("llama-3.1", {"pipeline": 2, "virtual": 2}, 1, 5),
        ("llama-3.1", {"data": 2, "distributed_optimizer": True}, 1, 1),
    ],
    ids=["one", "tied_tp2", "qk_norm_tp2_sp", "tied_pp2", "pp2_vp2", "dp2_do"],
)
def test_plan_and_the_live_bytes_of_a_run_agree(
    tmp_path, family, parallel, micro_batch, micro_batches, precision, recompute
):
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 8,
        "head_dim": 16,
    }
    folder = make_model(tmp_path / "model", family=family, **sizes)
    train = {"precision": precision, "recompute": recompute, "micro_batch": micro_batch}
    layout = Layout(recompute=recompute, micro_batch=micro_batch, **parallel)
    asked = ParallelConfig(**{name: x for name, x in parallel.items() if name != "data"})
    ranks = run_ranks(layout.gpus, live, folder, asked, train, micro_batches)
    for architecture, stage, real, most in ranks:
        planned = memory.memory(
            architecture,
            layout,
            stage,
            precision=precision,
            sequence_length=512,
            supervised=2 / 3,
            micro_batches=micro_batches,
            layers="local",
        )
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(planned, part) == pytest.approx(getattr(real, part), rel=1e-3), part
        assert planned.activations + planned.workspace == pytest.approx(most, rel=0.15)
        total = real.weights + real.gradients + real.optimizer + most
        assert planned.total == pytest.approx(total, rel=0.1)


def test_chunks_in_flight_are_those_of_the_papers():
    layout = Layout(pipeline=4)
    assert [memory.chunks_in_flight(layout, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert memory.chunks_in_flight(layout, 0, 2) == 2
    # L (1 + (p - 1) / (p v)) layers on the first of p = 4 stages with v = 2 chunks each.
    chunks = memory.chunks_in_flight(Layout(pipeline=4, virtual=2), 0, 16)
    assert chunks / (4 * 2) == 1 + 3 / (4 * 2)
    # Seven micro-batches are one group: groups of four to six leave a last one that is too small.
    assert memory.chunks_in_flight(Layout(pipeline=4, virtual=2), 0, 7) == 2 * 3 + 7 + 1


def test_the_bubble_and_the_exchanges_cost_time():
    config = run_config()

    def seconds(**layout: Any) -> float:
        return ranking.estimate(SHAPE_8B, config, Layout(**layout), GPUS["h100"], LOAD).seconds

    one = seconds()
    assert one == pytest.approx(64 * 4096 * 6 * 8.0e9 / (989.4e12 * EFFICIENCY), rel=0.1)
    assert seconds(recompute="full") == pytest.approx(one * 4 / 3, rel=0.03)
    assert one / 2 < seconds(tensor=2, sequence=True) < one / 1.5
    assert one / 2 < seconds(data=2) < one / 1.5
    # Gradients of one micro-batch a rank take longer than it does, and what is left is seen.
    apart, beside = seconds(data=64), seconds(data=64, overlap=True)
    assert beside == pytest.approx(apart - one / 64)
    # 64 micro-batches: the bubble is 3 / 64 of the time without chunks, 3 / 128 with two.
    assert seconds(pipeline=4, virtual=2) < seconds(pipeline=4)
    assert seconds(tensor=8, data=2) < seconds(tensor=16)  # which would leave the machine


def test_the_distributed_optimizer_divides_the_states_alone():
    config = run_config()
    plain, shared = (
        stage_memory(SHAPE_8B, config, Layout(data=4, context=2, **more), LOAD)[0]
        for more in ({}, {"distributed_optimizer": True})
    )
    assert shared == replace(plain, optimizer=plain.optimizer / 8)
    # 12 bytes a weight: an fp32 copy and two moments.
    assert plain.optimizer == 12 * 8_030_261_248


def test_weights_in_8_bits_are_kept_twice_beside_those_in_16():
    layout = Layout(pipeline=2, tensor=2)
    plain, eight, ends = (
        stage_memory(SHAPE_8B, run_config(*keys), layout, LOAD)
        for keys in ((), ("train.fp8=blockwise",), ("train.fp8=blockwise", "train.fp8_bf16_ends=3"))
    )
    # The matrices of a layer: 4,096 x (4,096 + 2 x 1,024), 4,096 x 4,096, 3 x 4,096 x 14,336.
    layer = (41_943_040 + 176_160_768) // 2
    assert [one.copies for one in plain] == [0, 0]
    assert [one.copies for one in eight] == [2 * 16 * layer] * 2
    assert [one.copies for one in ends] == [2 * 13 * layer] * 2
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight[0], part) == getattr(plain[0], part)
    whole = stage_memory(SHAPE_8B, run_config("train.fp8=delayed"), Layout(), LOAD)[0]
    assert whole.copies == pytest.approx(14e9, rel=0.01)


@pytest.mark.parametrize(
    ("fp8", "scales", "again"), [("tensorwise", 0, 0), ("blockwise", 4 / 128, 0), ("delayed", 0, 1)]
)
def test_what_products_of_8_bits_read_is_kept_in_them(fp8: str, scales: float, again: int):
    layout = Layout(pipeline=2, tensor=2)
    plain, eight = (
        stage_memory(SHAPE_8B, run_config(*keys), layout, LOAD)
        for keys in ((), (f"train.fp8={fp8}",))
    )
    # Of each token two norms' outputs, and half of SwiGLU's product and of attention's output.
    saved = (1 - scales) * (2 * 4096 + 14_336 / 2) - again * 4096 / 2
    for stage, (wide, narrow) in enumerate(zip(plain, eight, strict=True)):
        in_flight = 2 - stage
        assert wide.activations - narrow.activations == in_flight * 16 * 4096 * saved


def test_layers_that_stay_in_bf16_keep_what_bf16_keeps():
    keys = ("train.fp8=tensorwise", "train.fp8_bf16_ends=3")
    plain, eight, ends = (
        stage_memory(SHAPE_8B, run_config(*some), Layout(), LOAD)[0]
        for some in ((), keys[:1], keys)
    )
    kept = (plain.activations - ends.activations) / (plain.activations - eight.activations)
    assert kept == pytest.approx((32 - 2 * 3) / 32)


def test_what_a_run_refuses_is_not_planned():
    fp8 = run_config("train.fp8=delayed", "train.global_batch=512")
    found = {one.layout.recompute for one in ranking.rank(SHAPE_8B, fp8, 8, GPUS["h100"], LOAD)}
    assert found == {"none"}
    with pytest.raises(ConfigError, match="selective saves nothing"):
        stage_memory(SHAPE_8B, run_config("train.recompute=selective"), Layout(), LOAD)
    exact = run_config("train.recompute=selective", "train.precision=fp32")  # in local layers
    (stage,) = stage_memory(SHAPE_8B, exact, Layout(recompute="selective"), LOAD)
    assert stage.copies == 0


def test_context_divides_what_belongs_to_tokens():
    config = run_config("data.sequence_length=8192")
    plain, shared = (
        stage_memory(SHAPE_8B, config, Layout(context=context), LOAD)[0] for context in (1, 4)
    )
    assert shared.activations == plain.activations / 4
    assert shared.workspace == plain.workspace / 4
    assert (shared.weights, shared.gradients) == (plain.weights, plain.gradients)


def test_interleaved_stages_hold_more_chunks_of_fewer_layers():
    config = run_config()
    # A layer keeps of each token, in numbers of 2 bytes: 4 x 4,096 around its norms, 2 x (4,096 +
    # 1,024) around attention, 3 x 14,336 of SwiGLU, and 32 sums in fp32.
    layer = 4096 * (2 * (16_384 + 10_240 + 43_008) + 4 * 32)
    sent = 2 * 4096 * 4096
    plain = stage_memory(SHAPE_8B, config, Layout(pipeline=4), LOAD)
    assert [stage.activations for stage in plain[:3]] == [n * (8 * layer + sent) for n in (4, 3, 2)]
    assert plain[3].activations == 8 * layer + 2 * sent
    chunks = [2 * 3 + 4 + 1, 2 * 2 + 4 + 1, 2 * 1 + 4 + 1]
    interleaved = stage_memory(SHAPE_8B, config, Layout(pipeline=4, virtual=2), LOAD)
    assert [stage.activations for stage in interleaved[:3]] == [
        n * (4 * layer + sent) for n in chunks
    ]
    assert interleaved[3].activations == 5 * 4 * layer + 4 * sent + 2 * sent
    assert [stage.weights for stage in interleaved] == [stage.weights for stage in plain]


def test_a_step_takes_the_packs_that_are_asked_for():
    """However many empty ones the layout's last round needs."""
    assert LOAD.packs(run_config("train.global_batch=490")) == 61
    assert LOAD.packs(run_config("train.packs=59")) == 59
    assert Layout(data=4, micro_batch=2).filling(61).micro_batches == 8
    assert Layout(data=4, pipeline=3).filling(1).micro_batches == 1
    assert Layout(data=4, pipeline=3, virtual=2).filling(1).micro_batches == 3


def test_the_layout_of_a_configuration_is_its_own():
    keys = ["tensor=2", "sequence=true", "pipeline=2", "virtual=2", "context=2", "overlap=true"]
    config = run_config(
        *(f"parallel.{key}" for key in keys),
        "parallel.distributed_optimizer=true",
        "train.recompute=full",
        "train.micro_batch=4",
    )
    assert configured(config, 32) == Layout(
        tensor=2,
        sequence=True,
        pipeline=2,
        virtual=2,
        context=2,
        data=4,
        distributed_optimizer=True,
        overlap=True,
        recompute="full",
        micro_batch=4,
    )


def test_layouts_that_fit_come_first_and_can_be_said():
    config = run_config("train.global_batch=512")
    found = ranking.rank(SHAPE_8B, config, 8, GPUS["h100"], LOAD)
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    assert {one.packs for one in found} == {64}
    fitting = [one.seconds for one in found if one.fits]
    assert fitting == sorted(fitting)
    assert fitting
    for one in found:
        assert one.layout.gpus == 8
        again = run_config(
            *(f"{key}={str(value).lower()}" for key, value in one.layout.keys.items())
        )
        assert configured(again, 8) == one.layout
    assert not any(one.fits for one in ranking.rank(SHAPE_70B, config, 8, GPUS["h100"], LOAD))


def test_a_layout_that_gpus_cannot_be_split_into_is_refused():
    with pytest.raises(ConfigError, match=r"6 GPU.* give a multiple of 4"):
        configured(run_config("parallel.tensor=4"), 6)


def test_what_a_packed_dataset_says_takes_the_place_of_what_is_assumed(tmp_path):
    config = run_config(f"data.packed={tmp_path}")
    assert not workload(config).measured
    manifest = tmp_path / "manifest.json"
    manifest.write_text(
        '{"splits": {"train": {"packs": 10, "examples_per_pack": 9.5, "tokens": 40000, '
        '"supervised_tokens": 30000}}}'
    )
    assert workload(config) == Workload(examples=9.5, tokens=4000, supervised=3000, measured=True)
    manifest.write_text("{}")
    with pytest.raises(PlanError, match="not the manifest of a packed dataset"):
        workload(config)
