"""What a run will need, by arithmetic: memory of a rank by part, and seconds of a step.

Architecture + RunConfig + Layout + Gpu -> Memory, Estimate

Nothing here is measured on a GPU: speeds are data sheets times the assumed shares below, and good
for comparing layouts. `train.py --dry-run` counts weights, gradients and optimizer from the real
objects instead.

T = rows of a micro-batch on one rank, t, p, v, c, d = sizes of the tensor, pipeline, virtual,
context and data axes, m = micro-batches of a step
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from mcore_sft.config import ConfigError, ParallelConfig, RunConfig, Section, TrainConfig
from mcore_sft.errors import UserError
from mcore_sft.model.architecture import Architecture
from mcore_sft.training.flops import step_flops

GIB = 2**30
GPUS_PER_MACHINE = 8
RESERVE = 4 * GIB
"""Assumed for the CUDA context, NCCL's buffers and fragmentation."""
EFFICIENCY = 0.45
"""Assumed share of the peak in matrix products and attention."""
LINK_SHARE = 0.7
"""Assumed share of a link's bandwidth that a collective reaches."""
MEAN_EXAMPLE = 512
"""Assumed tokens of an example, about OpenMathInstruct-2's, while no dataset is packed."""
SUPERVISED = 2 / 3
"""Assumed share of tokens that are trained, while no dataset is packed."""
LOSS_CHUNK_BYTES = 2**30
"""Logits that the loss holds on a GPU at a time: mcore_sft/ops/devices.py, _chunk_rows_cuda."""


class PlanError(UserError):
    """Nothing can be planned; the message is meant for the user."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a machine of eight; bandwidths are bytes a second in one direction."""

    memory: float
    peak_flops: float
    nvlink: float
    network: float


# NVIDIA's data sheets of the SXM modules: memory; bf16 matrix products without sparsity; half of
# the NVLink bandwidth, which they state for both directions. Network: one port a GPU as in DGX A100
# (HDR, 200 Gb/s) and DGX H100, H200 and B200 (NDR, 400 Gb/s). DGX B200 states 1,440 GB for eight.
GPUS = {
    "a100-40": Gpu(memory=40e9, peak_flops=312e12, nvlink=300e9, network=25e9),
    "a100-80": Gpu(memory=80e9, peak_flops=312e12, nvlink=300e9, network=25e9),
    "h100": Gpu(memory=80e9, peak_flops=989.4e12, nvlink=450e9, network=50e9),
    "h200": Gpu(memory=141e9, peak_flops=989.4e12, nvlink=450e9, network=50e9),
    "b200": Gpu(memory=180e9, peak_flops=2250e12, nvlink=900e9, network=50e9),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is split over GPUs; `data` is what is left of them."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    distributed_optimizer: bool = False
    recompute: str = "none"
    micro_batch: int = 1

    @property
    def gpus(self) -> int:
        """Processes that it takes."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def keys(self) -> dict[str, Any]:
        """What of it differs from the defaults, under the names that the configuration has."""
        default = Layout(data=self.data)
        section = {"recompute": "train", "micro_batch": "train"}
        return {
            f"{section.get(name, 'parallel')}.{name}": value
            for name, value in vars(self).items()
            if value != getattr(default, name)
        }

    @property
    def can_be_said(self) -> bool:
        """Whether this version's configuration has all of its keys."""
        sections: dict[str, type[Section]] = {"parallel": ParallelConfig, "train": TrainConfig}
        return all(
            name in sections[section].model_fields
            for section, name in (key.split(".") for key in self.keys)
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one pack holds on average."""

    examples: float
    tokens: float
    supervised: float
    measured: bool
    """Whether a packed dataset says so, or it is assumed."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank of the pipeline stage `stage`."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    """What comes and goes: that of the loss or of one layer's backward pass."""

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a layout needs, in the worst of its stages, and how long a step takes."""

    layout: Layout
    memory: Memory
    fits: bool
    packs: int
    """Packs of a step."""
    seconds: float
    """Of a step."""


def configured(config: RunConfig, gpus: int) -> Layout:
    """The layout that `config` asks for on so many GPUs."""
    parallel = config.parallel
    model = parallel.tensor * parallel.pipeline * parallel.context
    if gpus % model:
        raise ConfigError(
            f"{gpus} GPU(s) cannot be split into parallel.tensor {parallel.tensor} x "
            f"parallel.pipeline {parallel.pipeline} x parallel.context {parallel.context}: give a "
            f"multiple of {model}"
        )
    return Layout(
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual,
        context=parallel.context,
        data=gpus // model,
        distributed_optimizer=parallel.distributed_optimizer,
        recompute=config.train.recompute,
        micro_batch=config.train.micro_batch,
    )


def layouts(a: Architecture, sequence_length: int, gpus: int) -> Iterator[Layout]:
    """Every layout of so many GPUs that the model's sizes allow.

    Sequence parallelism costs nothing and goes with tensor; selective recomputation saves next to
    nothing where attention keeps no scores (`layer_activations`), and is left out.
    """
    for t, p, v, c in itertools.product((1, 2, 4, 8), _powers(gpus), (1, 2, 4), (1, 2, 4, 8)):
        d, rest = divmod(gpus, t * p * c)
        if rest or not d or a.heads % t or a.kv_heads % t or a.intermediate % t:
            continue
        if a.layers % (p * v) or (v > 1 and p == 1) or sequence_length % (2 * c * t):
            continue
        for sharded, recompute, micro in itertools.product(
            (False, True) if d * c > 1 else (False,), ("none", "full"), (1, 2, 4, 8)
        ):
            yield Layout(
                tensor=t,
                sequence=t > 1,
                pipeline=p,
                virtual=v,
                context=c,
                data=d,
                distributed_optimizer=sharded,
                recompute=recompute,
                micro_batch=micro,
            )


def _powers(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length())]


def workload(config: RunConfig) -> Workload:
    """What the manifest of the packed dataset says, or what is assumed where there is none."""
    length = config.data.sequence_length
    path = config.packed / "manifest.json"
    if not path.exists():
        return Workload(
            examples=length / MEAN_EXAMPLE,
            tokens=length,
            supervised=SUPERVISED * length,
            measured=False,
        )
    try:
        train = json.loads(path.read_text(encoding="utf-8"))["splits"]["train"]
        packs = train["packs"]
        return Workload(
            examples=train["examples_per_pack"],
            tokens=train["tokens"] / packs,
            supervised=train["supervised_tokens"] / packs,
            measured=True,
        )
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise PlanError(
            f"{path}: not the manifest of a packed dataset ({error!r}); run tools/preprocess.py "
            "again, or name another with data.packed"
        ) from None


def parameters(a: Architecture, layout: Layout, stage: int) -> int:
    """Weights of one rank of `stage`, counted from the shapes.

    Matrices are split over the tensor axis, norms are on all of its ranks; the last stage holds a
    copy of a tied embedding (Narayanan et al. 2021, arXiv 2104.04473, section 2).
    """
    t = layout.tensor
    qkv = (a.heads + 2 * a.kv_heads) * a.head_dim
    layer = (a.hidden * (qkv + a.heads * a.head_dim + 3 * a.intermediate)) // t + 2 * a.hidden
    layer += qkv // t * a.qkv_bias + 2 * a.head_dim * a.qk_norm
    table = a.padded_vocab(t) // t * a.hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    tables = first + last - (first and last and a.tied)
    return a.layers // layout.pipeline * layer + tables * table + last * a.hidden


def memory(
    a: Architecture,
    layout: Layout,
    stage: int,
    *,
    precision: str,
    sequence_length: int,
    supervised: float,
    micro_batches: int,
    layers: str = "transformer_engine",
) -> Memory:
    """Bytes on one rank of `stage`, by part.

    Weights in the run's precision, gradients in fp32, two fp32 moments and, under bf16, fp32 main
    weights; the distributed optimizer keeps 1/(c d) of the latter on each rank (ZeRO stage 1,
    Rajbhandari et al. 2020, arXiv 1910.02054, section 5).
    """
    count = parameters(a, layout, stage)
    wide = 2 if precision == "bf16" else 4
    states = 12 if precision == "bf16" else 8
    owners = layout.data * layout.context if layout.distributed_optimizer else 1
    rows = sequence_length * layout.micro_batch / layout.context
    kept = layer_activations(a, layout, rows, wide, layers)
    chunks = chunks_in_flight(layout, stage, micro_batches)
    depth = a.layers / (layout.pipeline * layout.virtual)
    activations = chunks * depth * kept
    loss, backward = 0.0, backward_workspace(a, layout, rows, wide)
    if layout.recompute == "full":
        backward += layer_activations(a, replace(layout, recompute="none"), rows, wide, layers)
    if stage == layout.pipeline - 1:
        hidden_rows = rows / (layout.tensor if layout.sequence else 1)
        activations += norm_activations(a.hidden * hidden_rows, wide, layers)
        loss = loss_workspace(a, layout, rows, supervised * rows, wide)
    return Memory(
        stage=stage,
        weights=wide * count,
        gradients=4 * count,
        optimizer=states * count / owners,
        activations=activations,
        workspace=max(loss, backward),
    )


def norm_activations(elements: float, wide: int, layers: str) -> float:
    """Bytes that a norm of so many elements keeps: its input and output.

    Ours, of the local layers, normalizes in fp32: input, result in fp32 and in `wide`, output.
    """
    if layers == "transformer_engine":
        return 2 * wide * elements
    return (4 + wide + wide) * elements


def layer_activations(
    a: Architecture, layout: Layout, rows: float, wide: int, layers: str
) -> float:
    """Bytes that one layer keeps of `rows` tokens for its backward pass.

    Korthikanti et al. 2022 (arXiv 2205.05198), sections 4.1 to 4.3 and 5, counted anew for what
    differs here: no dropout and no masks; grouped queries, kept before and after queries and keys
    are turned, with the sines and cosines of each token; attention that keeps no scores but the
    logarithms of their sums (Dao et al. 2022, arXiv 2205.14135); SwiGLU, of which Megatron-core
    0.16.1 keeps both projections, the gate's activation, a copy of the other and the product. What
    lies between the split regions is divided by t under sequence parallelism only. The local
    layers keep the documents' outputs twice, apart and joined. `selective` repeats attention
    alone, and so saves those sums and what is apart; `full` keeps the layer's input.
    """
    t = layout.tensor
    stream = rows * a.hidden / (t if layout.sequence else 1)
    if layout.recompute == "full":
        return wide * stream
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    inside = wide * (3 * queries + 3 * keys + 5 * a.intermediate)
    if layout.recompute == "none":
        inside += 4 * a.heads + wide * queries * (layers == "local")
    turning = wide * 4 * a.head_dim * rows
    return rows * inside / t + turning + 2 * norm_activations(stream, wide, layers)


def chunks_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Model chunks of micro-batches whose activations `stage` holds at the same time.

    p - stage micro-batches under 1F1B (Narayanan et al. 2021, section 2.2.1). Interleaved,
    2 (p - stage - 1) + (v - 1) p + 1 chunks, of which the first stage's are the
    L (1 + (p - 1) / (p v)) layers of Korthikanti et al. 2022, section 4.2.3.
    """
    p, v = layout.pipeline, layout.virtual
    chunks = p - stage if v == 1 else 2 * (p - stage - 1) + (v - 1) * p + 1
    return min(chunks, micro_batches * v)


def loss_workspace(
    a: Architecture, layout: Layout, rows: float, supervised: float, wide: int
) -> float:
    """Bytes of our fused loss (mcore_sft/ops/head.py): no logits but those of a chunk of rows.

    Supervised rows and their gradients, two chunks of logits where ranks share the vocabulary, so
    that one's statistics travel beside the other's product, else one, and the gradient of all rows.
    The weight's gradient is added where it belongs.
    """
    vocab = a.padded_vocab(layout.tensor) / layout.tensor
    chunk = min(supervised * vocab * wide, LOSS_CHUNK_BYTES)
    buffers = 1 if layout.tensor == 1 or chunk == supervised * vocab * wide else 2
    share = layout.tensor if layout.sequence else 1
    return buffers * chunk + wide * a.hidden * (2 * supervised + rows / share)


def backward_workspace(a: Architecture, layout: Layout, rows: float, wide: int) -> float:
    """Bytes of the gradients within one SwiGLU: of the product, of both factors and of the input,
    and of the input itself where sequence parallelism gathers it again (Korthikanti et al. 2022,
    section 4.2.2)."""
    inside = 4 * a.intermediate / layout.tensor
    return wide * rows * (inside + a.hidden * (2 if layout.sequence else 1))


def step_seconds(
    a: Architecture,
    layout: Layout,
    gpu: Gpu,
    load: Workload,
    *,
    precision: str,
    sequence_length: int,
    micro_batches: int,
    efficiency: float,
) -> float:
    """Seconds of a step: the slowest stage's computation and exchanges, nothing overlapped.

    The pipeline is idle (p - 1) / (m v) of the time it works (Narayanan et al. 2021, section
    2.2.2). The update of the weights, bound by the memory's bandwidth, is left out.
    """
    p, v = layout.pipeline, layout.virtual
    stage = replace(a, layers=a.layers // p)
    packs = layout.micro_batch
    squares = load.tokens * load.tokens / load.examples
    layers = step_flops(
        stage, tokens=int(load.tokens * packs), supervised=0, squares=squares * packs
    )
    head = 6.0 * a.hidden * a.vocab * load.supervised * packs
    again = 4 / 3 if layout.recompute == "full" else 1.0
    compute = (layers * again + head) / (layout.tensor * layout.context)
    micro = compute / (gpu.peak_flops * efficiency)
    micro += _exchanges(a, layout, gpu, precision, sequence_length)
    return micro_batches * micro * (1 + (p - 1) / (micro_batches * v)) + _gradients(
        a, layout, gpu, precision
    )


def _exchanges(
    a: Architecture, layout: Layout, gpu: Gpu, precision: str, sequence_length: int
) -> float:
    """Seconds in which one stage exchanges activations of one micro-batch, both ways.

    Tensor: four all-reduces of [T, hidden] a layer (Shoeybi et al. 2019, arXiv 1909.08053, section
    3), as many bytes with sequence parallelism (Korthikanti et al. 2022, section 4.2.2); two more
    where layers are computed again. A ring's all-reduce sends 2 (n - 1) / n of its bytes (Patarasuk
    and Yuan 2009). Context: keys and values go once around forward, and with their gradients
    backward (Liu et al. 2023, arXiv 2310.01889). Pipeline: [T, hidden] to and fro for each chunk.
    """
    wide = 2 if precision == "bf16" else 4
    t, c, p = layout.tensor, layout.context, layout.pipeline
    rows = sequence_length * layout.micro_batch / c
    stream = wide * rows * a.hidden
    reduces = 6 if layout.recompute == "full" else 4
    tensor = a.layers / p * reduces * 2 * (t - 1) / t * stream
    around = a.layers / p * 3 * (c - 1) * wide * rows * 2 * a.kv_heads * a.head_dim / t
    ends = 2 * layout.virtual * stream / (t if layout.sequence else 1) if p > 1 else 0.0
    return (
        tensor / _bandwidth(gpu, t)
        + around / _bandwidth(gpu, t * c)
        + ends / _bandwidth(gpu, layout.gpus)
    )


def _gradients(a: Architecture, layout: Layout, gpu: Gpu, precision: str) -> float:
    """Seconds of the ring all-reduce of fp32 gradients over the data and context axes.

    With the distributed optimizer it is a reduce-scatter, and an all-gather of the new weights.
    """
    n = layout.data * layout.context
    sent = 4 + (2 if precision == "bf16" else 4) if layout.distributed_optimizer else 8
    count = max(parameters(a, layout, stage) for stage in range(layout.pipeline))
    return sent * count * (n - 1) / n / _bandwidth(gpu, n * layout.tensor)


def _bandwidth(gpu: Gpu, span: int) -> float:
    """Bytes a second among `span` neighbouring ranks; Megatron-core lays tensor, context, data and
    pipeline out in this order."""
    return LINK_SHARE * (gpu.nvlink if span <= GPUS_PER_MACHINE else gpu.network)


def estimate(
    a: Architecture,
    config: RunConfig,
    layout: Layout,
    gpu: Gpu,
    load: Workload,
    efficiency: float = EFFICIENCY,
) -> Estimate:
    """Memory of the fullest stage, and the seconds of a step, of `layout`."""
    unit = layout.data * layout.micro_batch
    # as mcore_sft/data/loader.py counts
    packs = max(1, round(config.train.global_batch / load.examples / unit)) * unit
    micro_batches = packs // unit
    length, precision = config.data.sequence_length, config.train.precision
    stages = stage_memory(a, config, layout, load)
    fullest = max(stages, key=lambda found: found.total)
    return Estimate(
        layout=layout,
        memory=fullest,
        fits=fullest.total + RESERVE <= gpu.memory,
        packs=packs,
        seconds=step_seconds(
            a,
            layout,
            gpu,
            load,
            precision=precision,
            sequence_length=length,
            micro_batches=micro_batches,
            efficiency=efficiency,
        ),
    )


def stage_memory(
    a: Architecture, config: RunConfig, layout: Layout, load: Workload
) -> list[Memory]:
    """Memory of a rank of each pipeline stage of `layout`."""
    unit = layout.data * layout.micro_batch
    micro_batches = max(1, round(config.train.global_batch / load.examples / unit))
    return [
        memory(
            a,
            layout,
            stage,
            precision=config.train.precision,
            sequence_length=config.data.sequence_length,
            supervised=load.supervised / config.data.sequence_length,
            micro_batches=micro_batches,
            layers="local" if config.model.layers == "local" else "transformer_engine",
        )
        for stage in range(layout.pipeline)
    ]


def rank(
    a: Architecture,
    config: RunConfig,
    gpus: int,
    gpu: Gpu,
    load: Workload,
    efficiency: float = EFFICIENCY,
) -> list[Estimate]:
    """The layouts that this version's configuration can say, those that fit and are fast first.

    Those whose smallest step holds more than a global batch are left out.
    """
    wanted = config.train.global_batch / load.examples
    found = [
        estimate(a, config, layout, gpu, load, efficiency)
        for layout in layouts(a, config.data.sequence_length, gpus)
        if layout.can_be_said and layout.data * layout.micro_batch <= max(1, wanted)
    ]
    return sorted(found, key=lambda one: (not one.fits, one.seconds / one.packs, one.memory.total))


def memory_table(stages: list[Memory], title: str) -> Table:
    """A row for each pipeline stage, in GiB."""
    table = Table(title=title, title_justify="left")
    parts = ("weights", "gradients", "optimizer", "activations", "workspace", "total")
    for name in ("stage", *parts):
        table.add_column(name, justify="right")
    for one in stages:
        table.add_row(str(one.stage), *(f"{getattr(one, part) / GIB:.2f}" for part in parts))
    return table
