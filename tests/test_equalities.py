"""The equalities that always hold: the specification of the product, in the order of the README.

Each `check_` raises AssertionError where its equality fails. `test_planted.py` breaks the code on
purpose and requires that they do.
"""

import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mcore_sft.checkpoint import weights
from mcore_sft.checkpoint.describe import Description
from mcore_sft.checkpoint.export import export
from mcore_sft.checkpoint.optimizer_state import MOMENTS
from mcore_sft.checkpoint.sharded import Checkpoints, Progress
from mcore_sft.config import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from mcore_sft.data.packs.batch import Batch, _share, collate
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.packs.loader import Loader
from mcore_sft.data.packs.pack import Pack
from mcore_sft.data.sources.conversation import Conversation, Message
from mcore_sft.data.text.prompt import Example, Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.evaluation.engines.engine import Request
from mcore_sft.evaluation.engines.open import open_engine
from mcore_sft.evaluation.engines.transformers_engine import TransformersEngine
from mcore_sft.evaluation.trained_prompt import Asked, choose
from mcore_sft.model import families
from mcore_sft.model.build import whole_weights
from mcore_sft.runtime.launch import Launch
from mcore_sft.runtime.mesh import join
from mcore_sft.runtime.peers import Peers
from mcore_sft.training import loop
from mcore_sft.training.beside.watchdog import Watchdog
from mcore_sft.training.packs import row_unit
from mcore_sft.training.step import StepResult, packed, same_scales, train_step
from mcore_sft.training.stop import Stop
from tests import oracle, runs, tiny
from tests.distributed import run_ranks
from tests.runs import LAYOUTS, loaded, on_layout, relative
from tests.tensors import Difference, assert_close, assert_within, differences

EPS = 1e-3
"""As large as clipped gradients are: with less, the update of a weight with hardly any gradient is
the sign of it, which rounding decides."""

# 1: packed = unpacked


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("one", "fp32"), ("one", "bf16"), ("tp2_sp", "fp32"), ("pp4", "fp32"), ("cp2", "fp32")],
)
def test_1_documents_of_a_pack_do_not_touch(model: Path, layout: str, precision: str) -> None:
    check_1(model, layout, precision)


def check_1(model: Path, layout: str, precision: str = "fp32", fp8: str = "none") -> None:
    """Another second document: all else of the pack is bit-identical, on every pipeline stage.

    Tensorwise, where documents share a scale: no further apart than twice what 8 bits cost.
    """
    lengths = [20, 32, 52] if layout == "cp2" else [20, 31, 50]  # which no rank fills up
    pack = tiny.make_pack(lengths, seed=1)
    changed = Pack(examples=(pack.examples[0], _other_tokens(pack.examples[1]), pack.examples[2]))
    inside = slice(lengths[0], lengths[0] + lengths[1])
    traces = on_layout(layout, _traces, model, [pack, changed], precision, fp8)
    shared = fp8 == "tensorwise"
    exact = on_layout(layout, _traces, model, [pack], precision, "none") if shared else traces
    kept = torch.ones(128, dtype=torch.bool)
    kept[inside] = False
    for rank, ((first, second), (wide, *_)) in enumerate(zip(traces, exact, strict=True)):
        here = f"{layout}, rank {rank}"
        assert first
        for name in first:
            assert not torch.equal(first[name][~kept], second[name][~kept]), f"{name}: no change"
        one, other, real = (
            {f"{name} beside another document": rows[kept] for name, rows in found.items()}
            for found in (first, second, wide)
        )
        if not shared:
            assert_close(other, one, here)
        for name in one if shared else ():
            cost = (one[name].double() - real[name]).norm()
            assert (one[name].double() - other[name]).norm() <= 2 * cost, f"layout {here}: {name}"


def _other_tokens(example: Example) -> Example:
    return Example(tokens=(example.tokens + 1) % tiny.VOCAB, spans=example.spans)


def _traces(
    parallel: ParallelConfig, model: Path, packs: list[Pack], precision: str, fp8: str
) -> list[dict[str, Tensor]]:
    """Each pack's activations and gradients [T, ...] on this stage, and logits or embeddings."""
    with loaded(model, parallel, precision, fp8=fp8) as here:
        if fp8 == "delayed":  # scales of their own, which are then frozen
            runs.run(here.model, [runs.batch_of(here, [packs[0]])], here.mesh, forward_only=False)
        return [_trace(here, pack) for pack in packs]


def _trace(here: Any, pack: Pack) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    context = here.mesh.context
    batch = runs.batch_of(here, [pack])
    # Where in the row the rows of each rank lie, one rank after another.
    starts = batch.starts.numpy()
    shares = [_share(starts, context.size, rank) for rank in range(context.size)]
    places = torch.from_numpy(np.argsort(np.concatenate(shares)))
    gpt = here.gpt
    core = gpt.module.module if hasattr(gpt.module, "module") else gpt.module

    def keep(name: str, tensor: Tensor) -> None:
        rows = tensor.detach()
        if here.mesh.parallel.sequence:
            parts = [torch.empty_like(rows) for _ in range(here.mesh.tensor.size)]
            torch.distributed.all_gather(parts, rows.contiguous(), group=here.mesh.tensor.group)
            rows = torch.cat(parts)
        if context.size > 1:
            parts = [torch.empty_like(rows) for _ in range(context.size)]
            torch.distributed.all_gather(parts, rows.contiguous(), group=context.group)
            rows = torch.cat(parts)[places]
        found[name] = rows.reshape(rows.shape[0], -1).clone().cpu()

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            keep(f"{name} output", tensor)
            tensor.register_hook(lambda gradient: keep(f"{name} gradient", gradient))

        return hook

    hooks = [
        layer.register_forward_hook(watch(f"layer {layer.layer_number}"))
        for layer in core.decoder.layers
    ]
    if here.mesh.is_first_stage:
        hooks.append(core.embedding.register_forward_hook(watch("embedding")))
    gpt.zero_grad_buffer()
    gpt.train()
    with same_scales(here.model):
        runs.run(here.model, [batch], here.mesh, forward_only=False)
    for hook in hooks:
        hook.remove()
    if here.mesh.pipeline.size == 1:
        with torch.no_grad(), same_scales(here.model):
            there = batch.to(here.mesh.device)
            logits = gpt(there.tokens, there.positions, None, packed_seq_params=packed(there))
        if context.size == 1:
            found["logits"] = logits[0].cpu()
    return found


# 2: how a global batch is split changes nothing


@pytest.mark.parametrize("split", ["one row", "two ranks", "two rows of two"])
def test_2_splits_of_a_global_batch(model: Path, split: str) -> None:
    check_2(model, split)


def check_2(model: Path, split: str) -> None:
    """Four packs of uneven masks, a micro-batch each, against another split of the same four."""
    packs = [
        tiny.make_pack([20, 31, 50], seed=1),
        tiny.make_pack([60, 64], seed=2, prompts=[55, 60]),
        tiny.make_pack([100], seed=3, prompts=[5]),
        tiny.make_pack([10, 10, 10], seed=4),
    ]
    expected_loss, expected = on_layout("one", _gradients, model, packs, 1)[0]
    if split == "two ranks":
        loss, found = on_layout("dp2", _gradients, model, packs, 1)[1]
    else:
        micro_batch = 4 if split == "one row" else 2
        loss, found = on_layout("one", _gradients, model, packs, micro_batch)[0]
    assert relative(loss, expected_loss) < 1e-6
    assert_close(found, expected, split, share=1e-5)


def _gradients(
    parallel: ParallelConfig, model: Path, packs: list[Pack], micro_batch: int
) -> tuple[float, dict[str, Tensor]]:
    with loaded(model, parallel) as here:
        rows = [packs[i : i + micro_batch] for i in range(0, len(packs), micro_batch)]
        batches = [runs.batch_of(here, row) for row in rows]
        return runs.gradients(here, batches[here.mesh.data.rank :: here.mesh.data.size])


# 3: layouts agree with one process


# Twenty steps of what is more than one axis; those of one axis are in these, and in the matrix.
# Several packs in a row, and what is computed again, change nothing on any of them.
_OFTEN: dict[str, dict[str, Any]] = {
    "tp2_sp_pp2": {"train__micro_batch": 2},
    "pp2_cp2": {"train__micro_batch": 2, "train__recompute": "full"},
    "dp2_do_overlap": {"train__recompute": "selective"},
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in _OFTEN else [pytest.mark.slow])
        for name in LAYOUTS
        if name != "one"
    ],
)
def test_3_layouts(
    model: Path, reference_run: list[dict[str, float]], layout: str, tmp_path: Path
) -> None:
    found = runs.train(runs.experiment(tmp_path, model, **_OFTEN.get(layout, {})), layout)
    assert_same_curve(found, reference_run, layout)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A rank's part of a weight."""

    name: str
    shape: tuple[int, ...]
    """Of the whole weight."""
    place: tuple[slice, ...]
    """Of the part in the whole."""
    tensor: Tensor


Steps = tuple[list[StepResult], list[Shard]]
"""What steps gave, and a rank's shards of all weights after them."""
NEEDS = {"sequence": "tensor", "virtual": "pipeline"}


def _cases() -> Iterator[Any]:
    """The matrix; beyond two ranks, often is what has all that goes with an axis, up to four."""
    for size, section in runs.matrix():
        if any(axis in section and needs not in section for axis, needs in NEEDS.items()):
            continue
        name = f"{size}: {', '.join(f'{k}={v}' for k, v in section.items())}"
        both = ("overlap" in section) + ("distributed_optimizer" in section)
        often = (size <= 2 and both != 1) or (size == 4 and both == 2)
        yield pytest.param(size, section, id=name, marks=[] if often else [pytest.mark.slow])


@pytest.mark.parametrize(("size", "section"), list(_cases()))
def test_3_every_layout_agrees(
    model: Path, reference_steps: Steps, size: int, section: dict[str, Any]
) -> None:
    check_3_layout(model, reference_steps, size, section)


def check_3_layout(model: Path, reference_steps: Steps, size: int, section: dict[str, Any]) -> None:
    """Three steps on the layout that a parallel section describes, and the weights after them."""
    layout = f"{size}: {', '.join(f'{k}={v}' for k, v in section.items())}"
    bounds = {"loss": 1e-6, "grad_norm": 1e-5}
    bounds |= dict.fromkeys(("supervised", "tokens", "examples", "lr"), 0.0)
    expected_results, alone = reference_steps
    whole = {shard.name: torch.empty(shard.shape) for shard in alone}
    for shard in alone:
        whole[shard.name][shard.place] = shard.tensor
    for results, shards in run_ranks(size, _steps, ParallelConfig(**section), model):
        for step, (result, expected) in enumerate(
            zip(results, expected_results, strict=True), start=1
        ):
            for name, bound in bounds.items():
                ours, theirs = getattr(result, name), getattr(expected, name)
                assert_same(layout, step, name, ours, theirs, bound)
        for shard in shards:
            there = whole[shard.name][shard.place]
            here = shard.tensor[tuple(slice(size) for size in there.shape)]  # no filled-up rows
            # A hundredth of what three updates at 1e-4 change.
            named = f"{shard.name} after step 3"
            assert_close({named: here}, {named: there}, layout, share=3e-6)


def _uneven_cases() -> Iterator[Any]:
    """The matrix; often are empty micro-batches on each chunk of a stage, or shared by ranks."""
    for size, section in runs.matrix():
        if any(axis in section and needs not in section for axis, needs in NEEDS.items()):
            continue
        often = size == 2 and section in ({"pipeline": 2, "virtual": 2}, {"context": 2})
        name = f"{size}: {', '.join(f'{k}={v}' for k, v in section.items())}"
        yield pytest.param(size, section, id=name, marks=[] if often else [pytest.mark.slow])


@pytest.mark.parametrize(("size", "section"), list(_uneven_cases()))
def test_3_layouts_agree_where_packs_do_not_fill_them(
    model: Path, uneven_steps: list[StepResult], size: int, section: dict[str, Any]
) -> None:
    """Micro-batches without a document take part in each step, and all is computed twice."""
    for found in run_ranks(size, _uneven_steps, ParallelConfig(**section), model):
        for result, expected in zip(found, uneven_steps, strict=True):
            assert relative(result.loss, expected.loss) < 1e-6
            assert relative(result.grad_norm, expected.grad_norm) < 1e-5
            for name in ("supervised", "tokens", "examples"):
                assert getattr(result, name) == getattr(expected, name)


@pytest.fixture(scope="module")
def uneven_steps(model: Path) -> list[StepResult]:
    """The same steps in a single process, where no pack is empty."""
    found: list[StepResult] = run_ranks(1, _uneven_steps, ParallelConfig(), model)[0]
    return found


def _uneven_steps(parallel: ParallelConfig, model: Path) -> list[StepResult]:
    """Steps of one, three and five packs."""
    torch.set_num_threads(1)
    settings = OptimizerConfig(clip_grad=1.0)
    with loaded(model, parallel, recompute="full") as here:
        loader = Loader(
            PackedDataset(model / "packed", verify=False),
            packs_per_step=1,
            micro_batch=1,
            seed=1,
            last_step="drop",
            rank=here.mesh.data.rank,
            size=here.mesh.data.size,
            pad_id=0,
            align=row_unit(TrainConfig(), here.mesh),
            fewest=parallel.fewest_micro_batches,
            context=here.mesh.context.size,
            context_rank=here.mesh.context.rank,
        )
        steps = [loader.taking(packs).batches(packs) for packs in (1, 3, 5)]
        return [
            train_step(here.model, here.optimizer, batches, here.mesh, settings, 1e-4)
            for batches in steps
        ]


@pytest.mark.parametrize(("axis", "needs"), NEEDS.items())
def test_3_layouts_without_sense_are_refused(axis: str, needs: str) -> None:
    sections = [section for _, section in runs.matrix() if axis in section]
    for section in sections:
        if needs not in section:
            with pytest.raises(ValidationError, match=r"needs (tensor|pipeline) of at least 2"):
                ParallelConfig(**section)
    with pytest.raises(ValidationError, match=f"{axis}: .* needs {needs} of at least 2"):
        ParallelConfig(**{axis: 2 if axis == "virtual" else True})


@pytest.fixture(scope="module")
def reference_steps(model: Path) -> Steps:
    """Three steps in a single process."""
    return steps_alone(model)


def steps_alone(model: Path) -> Steps:
    """Three steps in a single process."""
    found: Steps = run_ranks(1, _steps, ParallelConfig(), model)[0]
    return found


def _steps(parallel: ParallelConfig, model: Path) -> Steps:
    torch.set_num_threads(1)
    packs = [
        tiny.make_pack([20, 31, 50], seed=1),
        tiny.make_pack([60, 61], seed=2, prompts=[55, 60]),
        tiny.make_pack([100], seed=3, prompts=[5]),
        tiny.make_pack([10, 10, 10], seed=4),
    ]
    with loaded(model, parallel, optimizer=OptimizerConfig(eps=EPS)) as here:
        batches = [
            runs.batch_of(here, [pack])
            for pack in packs[here.mesh.data.rank :: here.mesh.data.size]
        ]
        settings = OptimizerConfig(clip_grad=1.0, eps=EPS)
        results = [
            train_step(here.model, here.optimizer, batches, here.mesh, settings, 1e-4)
            for _ in range(3)
        ]
        with whole_weights(here.model):
            parts = [part for chunk in here.model for part in weights.shards(chunk.module)]
            return results, [_shard(part) for part in parts]


def _shard(part: Any) -> Shard:
    ends = zip(part.global_offset, part.data.shape, strict=True)
    return Shard(
        name=part.key,
        shape=part.global_shape,
        place=tuple(slice(first, first + size) for first, size in ends),
        tensor=part.data.detach().clone(),
    )


@pytest.mark.parametrize("layout", ["pp2_vp2", "tp2_sp_pp2"])
def test_3_layouts_of_tied_embeddings(model: Path, tmp_path: Path, layout: str) -> None:
    tied = tiny.make_model(tmp_path / "tied", vocab_size=703, tie_word_embeddings=True)
    shutil.copytree(model / "packed", tied / "packed")
    reference = runs.train(runs.experiment(tmp_path / "one", tied, train__steps=5))
    found = runs.train(runs.experiment(tmp_path / "split", tied, train__steps=5), layout)
    assert_same_curve(found, reference, layout)


@pytest.mark.parametrize(("family", "layout"), [("qwen2.5", "tp2_sp_pp2"), ("qwen3", "tp2")])
def test_3_layouts_of_biases_and_head_norms(
    model: Path, tmp_path: Path, family: str, layout: str
) -> None:
    check_3(model, tmp_path, family, layout)


def check_3(model: Path, scratch: Path, family: str, layout: str) -> None:
    """Three steps of another family, whose norms of heads are shared by the tensor ranks."""
    other = tiny.make_model(scratch / family, family=family, vocab_size=703)
    shutil.copytree(model / "packed", other / "packed")
    reference = runs.train(runs.experiment(scratch / "one", other, train__steps=3))
    found = runs.train(runs.experiment(scratch / "split", other, train__steps=3), layout)
    assert_same_curve(found, reference, layout)


def assert_same_curve(
    found: list[dict[str, Any]], reference: list[dict[str, Any]], layout: str
) -> None:
    """First step to 1e-6 (loss) and 1e-5 (gradient norm); every loss to 1e-4."""
    assert [line["step"] for line in found] == [line["step"] for line in reference]
    for ours, theirs in zip(found, reference, strict=True):
        first = ours["step"] == 1
        bounds = {"loss": 1e-6, "grad_norm": 1e-5} if first else {"loss": 1e-4}
        counts = dict.fromkeys(("supervised_tokens", "tokens", "examples"), 0)
        for name, bound in (counts | bounds).items():
            assert_same(layout, ours["step"], name, ours[name], theirs[name], bound)


def assert_same(
    layout: str, step: int, name: str, found: float, expected: float, share: float
) -> None:
    """What was measured of a step is within `share` of what was expected."""
    assert found == expected or abs(found - expected) <= share * abs(expected), (
        f"layout {layout}: {name} of step {step} differs first: {found!r} (expected {expected!r}, "
        f"relative bound {share:.3g})"
    )


# 4: our logits are those of transformers


@pytest.mark.parametrize(
    ("layout", "family"),
    [("one", "llama-3.1"), ("one", "llama-3.2"), *(("tp2_sp", name) for name in tiny.FAMILIES)],
)
def test_4_logits(tmp_path: Path, layout: str, family: str) -> None:
    check_4(tmp_path, layout, family)


def check_4(folder: Path, layout: str = "one", family: str = "llama-3.1") -> None:
    """Documents far beyond the original context of 32, in one pack."""
    tiny.make_model(folder, family=family)
    batch = tiny.make_batch([200, 24], length=256)
    ours = torch.cat(on_layout(layout, _logits, folder, batch), dim=-1)[:, : tiny.VOCAB]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    starts = batch.starts.tolist()
    with torch.no_grad():
        for start, end in itertools.pairwise(starts):
            expected = theirs(batch.tokens[:, start:end]).logits[0]
            name = f"{family}'s logits from position {start}"
            assert_close({name: ours[start:end]}, {name: expected}, layout, bound=1e-4)


def _logits(parallel: ParallelConfig, folder: Path, batch: Batch) -> Tensor:
    with loaded(folder, parallel) as here, torch.no_grad():
        here.gpt.eval()
        return here.gpt(batch.tokens, batch.positions, None, packed_seq_params=packed(batch))[0]


# 5: Hugging Face -> Megatron-core -> Hugging Face is the identity


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("one", marks=pytest.mark.slow),
        pytest.param("tp2_sp", marks=pytest.mark.slow),
        "pp2_vp2",
        "tp2_sp_pp2",
    ],
)
@pytest.mark.parametrize("family", ["llama-3.1", "llama-3.2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_5_round_trip(tmp_path: Path, layout: str, family: str, precision: str) -> None:
    check_5(tmp_path, layout, family, precision)


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if "llama-3." not in name])
def test_5_round_trip_of_other_families(tmp_path: Path, family: str) -> None:
    check_5(tmp_path, "tp2_sp_pp2", family, "bf16")


def check_5(tmp_path: Path, layout: str, family: str, precision: str) -> None:
    """Every tensor bit for bit, and the configuration byte for byte."""
    base = tiny.make_model(tmp_path / "base", family=family)
    if precision == "bf16":
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    on_layout(layout, _save, base, tmp_path / "run", precision)
    export(tmp_path / "run" / "step_0", tmp_path / "back", shard_bytes=50_000)
    before, after = load_file(base / "model.safetensors"), {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert_close(after, before, layout)
    assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("base", "back")]
    assert configs[0] == configs[1]
    loaded_again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert loaded_again.dtype == before["model.norm.weight"].dtype


def _save(parallel: ParallelConfig, base: Path, folder: Path, precision: str) -> None:
    def describe(path: Path) -> None:
        shutil.copytree(base, path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        (path / "model" / "mcore_sft.json").write_text("{}")

    with loaded(base, parallel, precision) as here:
        checkpoints = Checkpoints(
            folder,
            CheckpointConfig(),
            model=here.model,
            optimizer=here.optimizer,
            mesh=here.mesh,
        )
        checkpoints.save(Progress(), describe)
        checkpoints.wait()


# 6: stopped and resumed = never stopped


@pytest.mark.parametrize(
    ("layout", "precision"),
    [("tp2_sp_pp2", "fp32"), ("dp2_do_overlap", "bf16")],
)
def test_6_resume_is_bitwise(model: Path, tmp_path: Path, layout: str, precision: str) -> None:
    check_6(model, tmp_path, layout, precision)


def check_6(model: Path, tmp_path: Path, layout: str, precision: str, **train: Any) -> None:
    """Stopped after the first and the third of four steps."""
    changes = {"train__steps": 4, "train__precision": precision, "checkpoint__every": 1} | train
    whole = runs.experiment(tmp_path / "whole", model, **changes)
    uninterrupted = runs.train(whole, layout)
    for stopped_after in (1, 3):
        config = runs.experiment(tmp_path / f"stopped_{stopped_after}", model, **changes)
        _copy_until(whole.folder, config.folder, stopped_after)
        resumed = runs.train(config, layout)
        assert_bitwise(resumed, uninterrupted, layout)
        exported = (_weights(run.folder, tmp_path) for run in (config, whole))
        assert_close(*exported, f"{layout} after a stop at {stopped_after}")


def assert_bitwise(resumed: list[dict[str, Any]], whole: list[dict[str, Any]], layout: str) -> None:
    """What was measured of each step is the same to the last digit."""
    for ours, theirs in zip(resumed, whole, strict=True):
        for key in ("step", "loss", "grad_norm", "lr", "examples", "supervised_tokens"):
            assert_same(layout, theirs["step"], key, ours[key], theirs[key], 0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2", "pp2_vp2", "cp2", "dp2", "dp2_do"])
def test_6_resume_is_bitwise_at_every_step(
    model: Path, tmp_path: Path, layout: str, precision: str
) -> None:
    changes = {"train__precision": precision, "checkpoint__every": 1}
    whole = runs.experiment(tmp_path / "whole", model, **changes)
    size, parallel = LAYOUTS[layout]
    again = [
        runs.experiment(tmp_path / f"after_{step}", model, **changes, train__steps=step + 1)
        for step in range(1, 20)
    ]
    placed = [
        c.model_copy(update={"parallel": ParallelConfig(**parallel)}) for c in (whole, *again)
    ]
    run_ranks(size, _in_one_process_group, placed)
    uninterrupted = runs.metrics(whole)
    for step, config in enumerate(again, start=1):
        assert_bitwise(runs.metrics(config), uninterrupted[: step + 1], layout)
        assert_same_states(config, whole, step + 1, layout)


def assert_same_states(resumed: RunConfig, whole: RunConfig, step: int, layout: str) -> None:
    """What two checkpoints hold of weights and optimizer is the same, byte for byte."""
    ours, theirs = (runs.state(config, step) for config in (resumed, whole))
    for kind in theirs:
        assert_close(ours[kind], theirs[kind], f"{layout}, {kind} after step {step}")
    folders = (config.folder / f"step_{step}" for config in (resumed, whole))
    files = [json.loads((folder / "manifest.json").read_text())["files"] for folder in folders]
    states = [{k: v for k, v in f.items() if k.endswith(".distcp")} for f in files]
    assert states[0] == states[1]
    assert states[0]


def _in_one_process_group(configs: list[RunConfig]) -> None:
    """The first run, and then a step after each of its checkpoints."""
    torch.set_num_threads(1)
    whole, *again = configs
    whole.folder.mkdir(parents=True, exist_ok=True)
    architecture = families.read(whole.model.path)
    with (
        Peers(Launch.read(), 60.0) as peers,
        Watchdog(whole.folder, None, peers) as watchdog,
        join(whole.parallel, peers) as mesh,
    ):
        loop.train_on(mesh, whole, architecture, Stop(None), watchdog)
        for step, config in enumerate(again, start=1):
            if mesh.is_main:
                _copy_until(whole.folder, config.folder, step)
            mesh.barrier()
            loop.train_on(mesh, config, architecture, Stop(None), watchdog)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "precision", "killed_before"),
    [("tp2", "fp32", 3), ("pp2", "bf16", 11), ("dp2", "bf16", 19), ("dp2_do", "bf16", 19)],
)
def test_6_resume_after_a_kill_is_bitwise(
    model: Path, tmp_path: Path, layout: str, precision: str, killed_before: int
) -> None:
    """The nineteenth step is the last of an epoch."""
    changes = {"train__precision": precision, "checkpoint__every": 2}
    whole = runs.experiment(tmp_path / "whole", model, **changes)
    uninterrupted = runs.train(whole, layout)
    config = runs.experiment(tmp_path / "killed", model, **changes)
    size, parallel = LAYOUTS[layout]
    placed = config.model_copy(update={"parallel": ParallelConfig(**parallel)})
    with pytest.raises(AssertionError, match="died, exit code -9"):
        run_ranks(size, _killed, placed, killed_before)
    assert len(runs.metrics(config)) == killed_before
    assert_bitwise(runs.train(config, layout), uninterrupted, layout)
    assert_same_states(config, whole, 20, layout)


def _killed(config: RunConfig, before: int) -> None:
    """Train, and end all ranks at once when step `before` is to follow."""
    batches = Loader.batches

    def dies(self: Loader, step: int) -> list[Batch]:
        if step == before:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches(self, step)

    Loader.batches = dies  # type: ignore[method-assign]
    torch.set_num_threads(1)
    loop.train(config)


@pytest.mark.parametrize(("before", "layout"), [("tp2_sp", "dp2_do"), ("dp2_do", "pp2_vp2")])
def test_6_resume_on_another_layout(
    model: Path, reference_run: list[dict[str, float]], tmp_path: Path, before: str, layout: str
) -> None:
    first = runs.experiment(tmp_path / "first", model, train__steps=3)
    runs.train(first, before)
    config = runs.experiment(tmp_path / "second", model)
    _copy_until(first.folder, config.folder, 3)
    found = runs.train(config, layout)
    assert [line["examples"] for line in found] == [line["examples"] for line in reference_run]
    for ours, theirs in zip(found, reference_run, strict=True):
        assert_same(layout, theirs["step"], "loss", ours["loss"], theirs["loss"], 1e-4)


def _copy_until(whole: Path, stopped: Path, step: int) -> None:
    """What a run leaves that was killed some time after its checkpoint of `step`."""
    stopped.mkdir()
    shutil.copytree(whole / f"step_{step}", stopped / f"step_{step}")
    shutil.copyfile(whole / "metrics.jsonl", stopped / "metrics.jsonl")


def _weights(run: Path, scratch: Path) -> dict[str, Tensor]:
    """The exported tensors."""
    output = scratch / f"hf_{run.name}"
    if not output.exists():
        export(run / "step_4", output)
    return dict(load_file(output / "model.safetensors"))


# 7 (operator on CPU = on CUDA = reference) is tested with each operator, in tests/ops.

# 8: what is masked changes nothing


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2_vp2", "cp2"])
def test_8_masked_packs_change_nothing(model: Path, layout: str) -> None:
    packs = [tiny.make_pack([20, 31, 50], seed=1), tiny.make_pack([60, 64], seed=2)]
    masked = [Pack.empty(), tiny.make_pack([30, 90], seed=3, prompts=[30, 90])]
    plain = on_layout(layout, _gradients, model, packs, 1)
    padded = on_layout(layout, _gradients, model, packs + masked, 1)
    for (loss, found), (expected_loss, expected) in zip(padded, plain, strict=True):
        assert loss == expected_loss
        assert_close(found, expected, layout)


def test_8_a_masked_document_changes_nothing(model: Path) -> None:
    alone = tiny.make_pack([20, 31], seed=1)
    masked = tiny.make_pack([40], seed=9, prompts=[40])
    beside = Pack(examples=(*alone.examples, *masked.examples))
    loss, found = on_layout("one", _gradients, model, [beside], 1)[0]
    expected_loss, expected = on_layout("one", _gradients, model, [alone], 1)[0]
    assert relative(loss, expected_loss) < 1e-6
    assert_close(found, expected, "one", share=1e-5)


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2", "dp2"])
def test_8_a_step_without_supervised_tokens_is_skipped(model: Path, layout: str) -> None:
    for before, result, after in on_layout(layout, _empty_step, model):
        assert result.skipped
        assert math.isnan(result.loss)
        assert_close(after, before, layout)


def _empty_step(parallel: ParallelConfig, model: Path) -> Any:
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    with loaded(model, parallel, optimizer=settings) as here:
        real = collate([tiny.make_pack([60, 64], seed=2)], 128, pad_id=0)
        empty = collate([Pack.empty()], 128, pad_id=0)
        train_step(here.model, here.optimizer, [real], here.mesh, settings, 1e-2)
        before = _state(here)
        result = train_step(here.model, here.optimizer, [empty, empty], here.mesh, settings, 1e-2)
        return before, result, _state(here)


def _state(here: Any) -> dict[str, Tensor]:
    """Every weight, and every moment and step count of the optimizer."""
    found = {name: weight.detach().clone() for name, weight in here.gpt.named_parameters()}
    states = here.optimizer.chained_optimizers[0].optimizer.state.values()
    for number, state in enumerate(states):
        found |= {f"{number} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


# 9: the ids that were trained on are those that the engine gets


@pytest.mark.parametrize("template", ["llama3-instruct", "chat"])
def test_9_ids(model: Path, tmp_path: Path, template: str) -> None:
    check_9(model, tmp_path, template)


@pytest.mark.parametrize("system", [None, "Count."])
@pytest.mark.parametrize("template", ["llama3-instruct", "chat"])
def test_9_ids_of_conversations(tmp_path: Path, template: str, system: str | None) -> None:
    """A dataset of `messages`, under a configuration that has an instruction, as it has by default.

    What evaluation would send for each problem is what a training example begins with.
    """
    rows = [_talk(row, system) for row in _rows()[:12]]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _prompt(tmp_path, template)
    config = runs.experiment(
        tmp_path / "run",
        tmp_path,
        model__tokenizer=str(tmp_path / "tokenizer"),
        prompt__template=template,
        data__root=str(tmp_path),
        data__train=[{"path": "talks.jsonl", "messages": "messages"}],
    )
    runs.pack_rows(config)
    dataset = PackedDataset(config.packed)
    (tmp_path / "config.json").write_text("{}")
    described = tmp_path / "step_1"
    described.mkdir()
    Description.read(config, dataset, None, None).write(described)
    hf = described / "model"
    prompt = choose(hf, load_tokenizer(hf), Asked()).prompt
    examples = [dataset.example(index) for index in range(dataset.num_distinct)]
    trained = [example.tokens[: example.spans[0, 0]].tolist() for example in examples]
    assert [prompt.prompt_ids(row["messages"][-2]["content"]) for row in rows] == trained


def _talk(row: dict[str, str], system: str | None) -> dict[str, Any]:
    said = [{"role": "system", "content": system}] if system else []
    said += [{"role": "user", "content": row["problem"]}]
    said += [{"role": "assistant", "content": row["generated_solution"]}]
    return {"messages": said}


def check_9(model: Path, scratch: Path, template: str = "llama3-instruct") -> None:
    """What training sees before each answer is what the engine sees; the stop is learned."""
    prompt, rows = _prompt(scratch, template), _rows()[:40]
    tokenizer = load_tokenizer(scratch / "tokenizer")
    config = EvaluationConfig(max_new_tokens=1, precision="fp32", batch_size=8)
    engine = open_engine(config, model, stop_ids=prompt.stop_ids, decode=tokenizer.decode)
    assert isinstance(engine, TransformersEngine)
    requests = [
        Request(index=index, prompt_ids=tuple(prompt.prompt_ids(row["problem"])))
        for index, row in enumerate(rows)
    ]
    asked = _ids_that_reach(engine, requests)
    for index, row in enumerate(rows):
        batch = collate([Pack(examples=(_example(prompt, row),))], 1024, pad_id=0)
        trained = batch.rows.tolist()
        before = batch.tokens[0, : trained[0] + 1].tolist()
        assert asked[index] == before
        assert before.count(tokenizer.token_id("<|begin_of_text|>")) == 1
        assert before[0] == tokenizer.token_id("<|begin_of_text|>")
        learned = batch.labels[0, trained].tolist()
        assert learned[-1] in prompt.stop_ids
        solution = tokenizer.decode(learned[:-1])
        assert solution == row["generated_solution"]


def _prompt(scratch: Path, template: str) -> Prompt:
    folder = scratch / "tokenizer"
    shutil.copytree(runs.FIXTURES / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    wanted = PromptConfig(template=template, instruction="generic/math")
    return Prompt.load(wanted, load_tokenizer(folder))


def _rows() -> list[dict[str, str]]:
    lines = (runs.FIXTURES / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _example(prompt: Prompt, row: dict[str, str]) -> Example:
    user = Message(role="user", content=row["problem"])
    assistant = Message(role="assistant", content=row["generated_solution"])
    return prompt.example(Conversation(messages=(user, assistant)))


def _ids_that_reach(engine: TransformersEngine, requests: list[Request]) -> dict[int, list[int]]:
    """The ids, padding left out, that the engine's model computes on for each request."""
    seen: list[list[int]] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(ids[mask.bool()[-ids.shape[0] :]].tolist())

    handle = engine._model.register_forward_pre_hook(hook, with_kwargs=True)
    for _ in engine.generate(requests):
        pass
    handle.remove()
    by_ids = {tuple(ids): ids for ids in seen}
    return {request.index: by_ids[request.prompt_ids] for request in requests}


# 10: our trainer = a plain transformers + AdamW loop


SETTINGS_10: dict[str, Any] = {
    "train__steps": 5,
    "train__global_batch": 6,  # two packs
    "checkpoint__every": 1,
    "optimizer__lr": 1e-4,
    "optimizer__min_lr": 5e-5,
    "optimizer__warmup_steps": 2,
    "optimizer__weight_decay": 1.0,
    "optimizer__clip_grad": 1.0,  # the gradients' norm is about 6
    "optimizer__eps": EPS,
}
SHARES_10 = {
    "lr": 1e-9,  # found: 0
    "first loss": 1e-6,  # 0; a unit in the last place is 7e-8
    "loss": 1e-5,  # 1.3e-7
    "grad_norm": 1e-5,  # 1.7e-7
    "update": 5e-3,  # 3.3e-4 of the first, whose weights are rounded to 1.5e-8 and change by 5e-5
    "exp_avg": 1e-4,  # 9e-7
    "exp_avg_sq": 1e-4,  # 1.6e-6
}
"""Of a number, or of the largest of a tensor, so much may be apart: at least ten times as much as
was found. `test_planted.py` shows that a wrong number costs at least ten times more."""


@pytest.mark.parametrize(
    ("schedule", "decay_1d"), [("constant", True), ("linear", False), ("cosine", True)]
)
def test_10_plain_loop(model: Path, tmp_path: Path, schedule: str, decay_1d: bool) -> None:
    """Each step's numbers, and every weight and moment after one update and after some."""
    changes = {"optimizer__schedule": schedule, "optimizer__decay_1d": decay_1d}
    if schedule == "constant":
        changes |= {"optimizer__min_lr": 0}
    check_10(model, tmp_path, **changes)


def test_10_plain_loop_of_twenty_steps(model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train__steps": 20, "optimizer__warmup_steps": 5}
    check_10(model, tmp_path, updates=(20,), checkpoint__every=0, **changes)


def check_10(
    model: Path, scratch: Path, updates: Sequence[int] = (1, 2, 5), **changes: Any
) -> None:
    """Each step's numbers, and every weight and moment after `updates`."""
    assert_within(differences_10(model, scratch, updates, **changes))


def differences_10(
    model: Path, scratch: Path, updates: Sequence[int] = (1, 2, 5), **changes: Any
) -> Iterator[Difference]:
    """Those of a run from the plain loop, which shares nothing with it but the packs."""
    changes = {"optimizer__schedule": "cosine"} | changes
    config = runs.experiment(scratch / "ours", model, **SETTINGS_10 | changes)
    lines = runs.train(config)
    steps, states = _plain_loop(model, tuple(sorted(changes.items())))
    base = load_file(model / "model.safetensors")
    for line, step in zip(lines, steps, strict=True):
        update = line["step"]
        for measured, expected in step.items():
            name = "first loss" if (measured, update) == ("loss", 1) else measured
            ours, theirs = (
                {f"{name} of step {update}": torch.tensor(x, dtype=torch.float64)}
                for x in (line[measured], expected)
            )
            yield from differences(ours, theirs, "one", share=SHARES_10[name])
        found = runs.state(config, update) if update in updates else {}
        for kind in ("update", *MOMENTS) if found else ():
            ours, theirs = (_named(kind, update, one, base) for one in (found, states[update]))
            yield from differences(ours, theirs, "one", share=SHARES_10[kind])


def _named(
    kind: str, update: int, state: dict[str, dict[str, Tensor]], base: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Moments, or how far the weights are from the base."""
    if kind == "update":
        tensors = {name: weight - base[name] for name, weight in state["weights"].items()}
    else:
        tensors = state[kind]
    return {f"{kind} {update} of {name}": tensor for name, tensor in tensors.items()}


@cache
def _plain_loop(
    model: Path, changes: tuple[tuple[str, Any], ...]
) -> tuple[list[dict[str, float]], dict[int, dict[str, dict[str, Tensor]]]]:
    """What the plain loop measured of each step, and its state after each update."""
    config = runs.experiment(model / "plain", model, **SETTINGS_10 | dict(changes))
    states: dict[int, dict[str, dict[str, Tensor]]] = {}
    rates: list[float] = []

    def keep(update: int, trained: Any, adamw: Any) -> None:
        named = dict(trained.named_parameters())
        rates.append(adamw.param_groups[0]["lr"])
        states[update] = {"weights": {name: x.detach().clone() for name, x in named.items()}} | {
            kind: {name: adamw.state[x][kind].clone() for name, x in named.items()}
            for kind in MOMENTS
        }

    curve = oracle.run(config, after_update=keep)
    measured = zip(curve.loss, curve.grad_norm, rates, strict=True)
    return [dict(zip(("loss", "grad_norm", "lr"), step, strict=True)) for step in measured], states
