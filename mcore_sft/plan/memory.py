"""Bytes of a rank by part: weights, gradients, optimizer, activations, and what comes and goes.

Architecture + RunConfig + Layout + Workload -> Memory of each pipeline stage

Nothing here is measured; `train.py --dry-run` counts the first three from the real objects instead.
rows = tokens of a micro-batch on one rank; t, p, v, c, d = sizes of the tensor, pipeline, virtual,
context and data axes; wide = bytes of a number in the run's precision
"""

from dataclasses import dataclass, replace

from rich.table import Table

from mcore_sft.config import RunConfig, TrainConfig
from mcore_sft.model.architecture import Architecture
from mcore_sft.plan.layout import Layout, Workload
from mcore_sft.runtime.hardware import chosen_layers
from mcore_sft.training.interleaving import group_size

GIB = 2**30
LOSS_CHUNK_BYTES = 2**30
"""Logits that the loss holds on a GPU at a time: mcore_sft/ops/devices.py, _chunk_rows_cuda."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank of the pipeline stage `stage`."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    copies: float
    """Of weights in 8 bits, along rows and along columns, which the products read."""
    activations: float
    workspace: float
    """What comes and goes: that of the loss or of one layer's backward pass."""

    @property
    def total(self) -> float:
        """All parts together."""
        held = self.weights + self.gradients + self.optimizer + self.copies
        return held + self.activations + self.workspace


def stage_memory(
    a: Architecture, config: RunConfig, layout: Layout, load: Workload
) -> list[Memory]:
    """Memory of a rank of each pipeline stage of `layout`."""
    filling = layout.filling(load.packs(config))
    chosen = chosen_layers(config.model, config.train, gpu=True)
    return [
        memory(
            a,
            layout,
            stage,
            precision=config.train.precision,
            sequence_length=config.data.sequence_length,
            supervised=load.supervised / config.data.sequence_length,
            micro_batches=filling.micro_batches,
            layers="local" if chosen == "apex" else chosen,
            eight_bits=_eight_bit_layers(a, config.train, layout, stage),
        )
        for stage in range(layout.pipeline)
    ]


def _eight_bit_layers(a: Architecture, train: TrainConfig, layout: Layout, stage: int) -> int:
    """Layers of `stage` whose products are of 8 bits."""
    if train.fp8 == "none":
        return 0
    ends = (stage == 0) + (stage == layout.pipeline - 1)
    return a.layers // layout.pipeline - ends * train.fp8_bf16_ends


def parameters(a: Architecture, layout: Layout, stage: int) -> int:
    """Weights of one rank of `stage`, counted from the shapes.

    Matrices are split over the tensor axis, norms are on all of its ranks; the last stage holds a
    copy of a tied embedding (Narayanan et al. 2021, arXiv 2104.04473, section 2).
    """
    t = layout.tensor
    qkv = (a.heads + 2 * a.kv_heads) * a.head_dim
    layer = layer_matrices(a, t) + 2 * a.hidden
    layer += qkv // t * a.qkv_bias + 2 * a.head_dim * a.qk_norm
    table = a.padded_vocab(t) // t * a.hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    tables = first + last - (first and last and a.tied)
    return a.layers // layout.pipeline * layer + tables * table + last * a.hidden


def layer_matrices(a: Architecture, tensor: int) -> int:
    """Numbers in the matrices of a layer on one of so many tensor ranks."""
    widths = 2 * (a.heads + a.kv_heads) * a.head_dim + 3 * a.intermediate
    return a.hidden * widths // tensor


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
    eight_bits: int = 0,
) -> Memory:
    """Bytes on one rank of `stage`, by part.

    Weights in the run's precision, gradients in fp32, two fp32 moments and, under bf16, fp32 main
    weights; the distributed optimizer keeps 1/(c d) of the latter on each rank (ZeRO stage 1,
    Rajbhandari et al. 2020, arXiv 1910.02054, section 5). Of `eight_bits` layers, Transformer
    Engine keeps the weights in 8 bits too, twice: Hopper multiplies along rows alone.
    """
    count = parameters(a, layout, stage)
    wide = 2 if precision == "bf16" else 4
    states = 12 if precision == "bf16" else 8
    owners = layout.data * layout.context if layout.distributed_optimizer else 1
    rows = sequence_length * layout.micro_batch / layout.context
    kept = layer_activations(a, layout, rows, wide, layers)
    chunks = chunks_in_flight(layout, stage, micro_batches)
    depth = a.layers / (layout.pipeline * layout.virtual)
    last = stage == layout.pipeline - 1
    stream = rows * a.hidden / (layout.tensor if layout.sequence else 1)
    # What is sent on stays until its gradient has come back; the last chunk sends nothing on.
    activations = chunks * depth * kept + (chunks - last) * wide * stream
    workspace = backward_workspace(a, layout, rows, wide)
    if layout.recompute == "full":
        workspace += layer_activations(a, replace(layout, recompute="none"), rows, wide, layers)
    if last:
        norm = norm_activations(stream, wide, layers)
        activations += norm
        # The last norm's backward pass is over when that of the layers begins.
        workspace = max(workspace - norm, loss_workspace(a, layout, rows, supervised * rows, wide))
    return Memory(
        stage=stage,
        weights=wide * count,
        gradients=4 * count,
        optimizer=states * count / owners,
        copies=2 * eight_bits * layer_matrices(a, layout.tensor),
        activations=activations,
        workspace=workspace,
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
    differs here: no dropout and no masks; grouped queries; attention that keeps no scores but the
    logarithms of their sums (Dao et al. 2022, arXiv 2205.14135). What lies between the split
    regions is divided by t under sequence parallelism only.

    Transformer Engine keeps queries and keys as they are turned, values, attention's output, and of
    SwiGLU both projections and the product. The local layers keep queries and keys before that too,
    with the sines and cosines of each token, the gate's activation, a copy of the other projection,
    and the documents' outputs twice, apart and joined. Norms of queries and keys keep one more of
    each, ours in fp32 too. `selective` repeats attention alone, and so saves those sums and what is
    apart; `full` keeps the layer's input.
    """
    t = layout.tensor
    stream = rows * a.hidden / (t if layout.sequence else 1)
    if layout.recompute == "full":
        return wide * stream
    queries, keys, local = a.heads * a.head_dim, a.kv_heads * a.head_dim, layers == "local"
    inside = wide * ((2 + local) * (queries + keys) + (3 + 2 * local) * a.intermediate)
    if layout.recompute == "none":
        inside += 4 * a.heads + wide * queries * local
    if a.qk_norm:
        inside += (wide + 4 * local) * (queries + keys)
    turning = wide * 4 * a.head_dim * rows * local
    return rows * inside / t + turning + 2 * norm_activations(stream, wide, layers)


def chunks_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Model chunks of micro-batches whose activations `stage` holds at the same time.

    p - stage micro-batches under 1F1B (Narayanan et al. 2021, section 2.2.1). Interleaved in groups
    of g micro-batches, 2 (p - stage - 1) + (v - 1) g + 1 chunks, of which the first stage's are the
    L (1 + (p - 1) / (p v)) layers of Korthikanti et al. 2022, section 4.2.3, where g = p.
    """
    p, v = layout.pipeline, layout.virtual
    if v == 1:
        return min(p - stage, micro_batches)
    chunks = 2 * (p - stage - 1) + (v - 1) * group_size(micro_batches, p) + 1
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
    """Bytes where a layer's backward pass holds most: the gradients of one SwiGLU.

    Those of both its factors, that of its product in the place of the product, and that of the
    layer's output. Sequence parallelism gathers the last (Korthikanti et al. 2022, section 4.2.2),
    and has done with it before there are those of the factors.
    """
    inside = a.intermediate / layout.tensor
    if layout.sequence:
        return wide * rows * (inside + max(inside, a.hidden) + a.hidden / layout.tensor)
    return wide * rows * (2 * inside + a.hidden)


def table(stages: list[Memory], title: str) -> Table:
    """A row for each pipeline stage, in GiB."""
    made = Table(title=title, title_justify="left")
    parts = ("weights", "gradients", "optimizer", "copies", "activations", "workspace", "total")
    for name in ("stage", *parts):
        made.add_column(name, justify="right")
    for one in stages:
        made.add_row(str(one.stage), *(f"{getattr(one, part) / GIB:.2f}" for part in parts))
    return made
