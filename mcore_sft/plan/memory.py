"""Bytes of a rank by part: weights, gradients, optimizer, activations, and what comes and goes.

Architecture + RunConfig + Layout + Workload -> Memory of each pipeline stage

Nothing here is measured; `train.py --dry-run` counts the first three from the real objects instead.
rows = tokens of a micro-batch on one rank; t, p, v, c, d = sizes of the tensor, pipeline, virtual,
context and data axes; wide = bytes of a number in the run's precision; fp8 = `train.fp8`
"""

from dataclasses import dataclass, replace

from rich.table import Table

from mcore_sft.config import RunConfig
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
            fp8=config.train.fp8,
            bf16_ends=config.train.fp8_bf16_ends,
        )
        for stage in range(layout.pipeline)
    ]


def parameters(a: Architecture, layout: Layout, stage: int) -> int:
    """Weights of one rank of `stage`, counted from the family's table.

    The last stage holds a copy of a tied embedding (Narayanan et al. 2021, arXiv 2104.04473,
    section 2).
    """
    t = layout.tensor
    table = a.padded_vocab(t) // t * a.hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    tables = first + last - (first and last and a.tied)
    return a.layers // layout.pipeline * a.layer_size(t) + tables * table + last * a.hidden


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
    fp8: str = "none",
    bf16_ends: int = 0,
) -> Memory:
    """Bytes on one rank of `stage`, by part.

    Weights in the run's precision, gradients in fp32, two fp32 moments and, under bf16, fp32 main
    weights; the distributed optimizer keeps 1/(c d) of the latter on each rank (ZeRO stage 1,
    Rajbhandari et al. 2020, arXiv 1910.02054, section 5). Under `fp8`, Transformer Engine keeps
    the weights in 8 bits too, twice: Hopper multiplies along rows alone. The `bf16_ends` layers at
    either end of the model stay in bf16; those of a stage count evenly in its chunks.
    """
    count = parameters(a, layout, stage)
    wide = 2 if precision == "bf16" else 4
    states = 12 if precision == "bf16" else 8
    owners = layout.data * layout.context if layout.distributed_optimizer else 1
    rows = sequence_length * layout.micro_batch / layout.context
    chunks = chunks_in_flight(layout, stage, micro_batches)
    last = stage == layout.pipeline - 1
    depth = a.layers // layout.pipeline
    eight = 0 if fp8 == "none" else depth - ((stage == 0) + last) * bf16_ends

    def kept(layers_of_stage: int, fp8: str, at: Layout) -> float:
        return layers_of_stage * layer_activations(a, at, rows, wide, layers, fp8)

    of_all = kept(depth - eight, "none", layout) + kept(eight, fp8, layout)
    stream = rows * a.hidden / (layout.tensor if layout.sequence else 1)
    # What is sent on stays until its gradient has come back; the last chunk sends nothing on.
    activations = chunks * of_all / layout.virtual + (chunks - last) * wide * stream
    workspace = backward_workspace(a, layout, rows, wide, fp8 if eight else "none")
    if layout.recompute == "full":
        one = replace(layout, recompute="none")
        workspace += kept(1, fp8 if eight == depth else "none", one)
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
        copies=2 * eight * a.layer_size(layout.tensor, matrices=True),
        activations=activations,
        workspace=workspace,
    )


def norm_activations(elements: float, wide: int, layers: str, fp8: str = "none") -> float:
    """Bytes that a norm of so many elements keeps: its input, and its output for a product.

    Ours, of the local layers, normalizes in fp32: input, result in fp32 and in `wide`, output.
    """
    if layers == "transformer_engine":
        return (wide + operand_bytes(fp8, wide)) * elements
    return (4 + wide + wide) * elements


def operand_bytes(fp8: str, wide: int) -> float:
    """Bytes of a number that a product of the backward pass reads, with its share of a scale.

    The one along the rows alone is kept; blockwise scaling has a scale in fp32 for 128 rows.
    """
    return {"none": wide, "blockwise": 1 + 4 / 128}.get(fp8, 1)


def layer_activations(
    a: Architecture, layout: Layout, rows: float, wide: int, layers: str, fp8: str = "none"
) -> float:
    """Bytes that one layer keeps of `rows` tokens for its backward pass.

    Korthikanti et al. 2022 (arXiv 2205.05198), sections 4.1 to 4.3 and 5, counted anew for what
    differs here: no dropout and no masks; grouped queries; attention that keeps no scores but the
    logarithms of their sums (Dao et al. 2022, arXiv 2205.14135). What lies between the split
    regions is divided by t under sequence parallelism only.

    Transformer Engine keeps queries and keys as they are turned, values, attention's output, and of
    SwiGLU both projections and the product. Under `fp8`, what products read is kept in 8 bits: the
    norms' outputs and SwiGLU's product. Attention reads its output in `wide`, and the product after
    it reads the same, but that delayed scaling, whose scale would be another the second time, keeps
    it in 8 bits besides. The local layers keep queries and keys before they are turned too, with
    the sines and cosines of each token, the gate's activation, a copy of the other projection, and
    the documents' outputs twice, apart and joined. Norms of queries and keys keep one more of each,
    ours in fp32 too. `selective` repeats attention alone, and so saves those sums and what is
    apart; `full` keeps the layer's input.
    """
    t = layout.tensor
    stream = rows * a.hidden / (t if layout.sequence else 1)
    if layout.recompute == "full":
        return wide * stream
    queries, keys, local = a.heads * a.head_dim, a.kv_heads * a.head_dim, layers == "local"
    inside: float = wide * ((2 + local) * (queries + keys) + (2 + 2 * local) * a.intermediate)
    inside += operand_bytes(fp8, wide) * a.intermediate + (fp8 == "delayed") * queries
    if layout.recompute == "none":
        inside += 4 * a.heads + wide * queries * local
    if a.qk_norm:
        inside += (wide + 4 * local) * (queries + keys)
    turning = wide * 4 * a.head_dim * rows * local
    return rows * inside / t + turning + 2 * norm_activations(stream, wide, layers, fp8)


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


def backward_workspace(
    a: Architecture, layout: Layout, rows: float, wide: int, fp8: str = "none"
) -> float:
    """Bytes where a layer's backward pass holds most: the gradients of one SwiGLU.

    Those of both its factors, that of its product in the place of the product, which is smaller
    where it is kept in 8 bits, and that of the layer's output. The last is there twice, gathered by
    sequence parallelism (Korthikanti et al. 2022, section 4.2.2) or in 8 bits along both ways,
    until there are those of the factors.
    """
    inside = a.intermediate / layout.tensor
    factors = 2 * wide * inside + (wide - operand_bytes(fp8, wide)) * inside
    twice = wide * a.hidden if layout.sequence or fp8 != "none" else 0.0
    output = wide * a.hidden / (layout.tensor if layout.sequence else 1)
    return rows * (max(factors, wide * inside + twice) + output)


def table(stages: list[Memory], title: str) -> Table:
    """A row for each pipeline stage, in GiB."""
    made = Table(title=title, title_justify="left")
    parts = ("weights", "gradients", "optimizer", "copies", "activations", "workspace", "total")
    for name in ("stage", *parts):
        made.add_column(name, justify="right")
    for one in stages:
        made.add_row(str(one.stage), *(f"{getattr(one, part) / GIB:.2f}" for part in parts))
    return made
