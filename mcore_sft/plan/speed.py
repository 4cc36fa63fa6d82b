"""Seconds of a step: what it computes and what it exchanges, by data sheets and assumed shares.

Architecture + Layout + Gpu + Workload -> seconds

Good for comparing layouts. Letters as in memory.py.
"""

from dataclasses import dataclass, replace

from mcore_sft.model.architecture import Architecture
from mcore_sft.plan.layout import Layout, Workload
from mcore_sft.plan.memory import GIB, parameters
from mcore_sft.runtime.hardware import PEAK_TFLOPS
from mcore_sft.training.flops import step_flops

GPUS_PER_MACHINE = 8
EFFICIENCY = 0.45
"""Assumed share of the peak in matrix products and attention."""
LINK_SHARE = 0.7
"""Assumed share of a link's bandwidth that a collective reaches."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a machine of eight; bandwidths are bytes a second in one direction."""

    capability: tuple[int, int]
    memory: float
    peak_flops: float
    nvlink: float
    network: float


_PEAKS = {name: 1e12 * peak for name, peak in PEAK_TFLOPS.items()}

# NVIDIA's data sheets of the SXM modules: half of the NVLink bandwidth, which they state for both
# directions. Memory: what torch calls the total capacity in its out-of-memory error, rounded down.
# Network: one port a GPU as in DGX A100 (HDR, 200 Gb/s), DGX H100, H200 and B200 (NDR, 400 Gb/s).
GPUS = {
    "a100-40": Gpu(
        capability=(8, 0), memory=39 * GIB, peak_flops=_PEAKS["A100"], nvlink=300e9, network=25e9
    ),
    "a100-80": Gpu(
        capability=(8, 0), memory=79 * GIB, peak_flops=_PEAKS["A100"], nvlink=300e9, network=25e9
    ),
    "h100": Gpu(
        capability=(9, 0), memory=79 * GIB, peak_flops=_PEAKS["H100"], nvlink=450e9, network=50e9
    ),
    "h200": Gpu(
        capability=(9, 0), memory=139 * GIB, peak_flops=_PEAKS["H200"], nvlink=450e9, network=50e9
    ),
    "b200": Gpu(
        capability=(10, 0), memory=178 * GIB, peak_flops=_PEAKS["B200"], nvlink=900e9, network=50e9
    ),
}


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
    """Seconds of a step: the slowest stage's computation and exchanges.

    The pipeline is idle (p - 1) / (m v) of the time it works (Narayanan et al. 2021, section
    2.2.2). With overlap, gradients travel beside the backward pass of the last micro-batch, and new
    weights beside the forward pass of the first; nothing else is overlapped. The update of the
    weights, bound by the memory's bandwidth, is left out.
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
    gradients = _gradients(a, layout, gpu, precision)
    if layout.overlap:
        gradients = max(0.0, gradients - micro)
    return micro_batches * micro * (1 + (p - 1) / (micro_batches * v)) + gradients


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
