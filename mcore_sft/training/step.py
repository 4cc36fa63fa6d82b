"""One optimizer step: micro-batches in, updated weights and a StepResult out.

The loss is a sum over supervised tokens, divided once by the number of supervised tokens of the
whole global batch: Megatron-core sums both over micro-batches and data-parallel ranks and divides
the gradients, so that how a batch is split changes nothing.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcore_sft.config import OptimizerConfig
from mcore_sft.data.packs.batch import Batch
from mcore_sft.model.build import Chunks, whole_weights
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training import optimizer as optim
from mcore_sft.training.interleaving import group_size

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, over the whole global batch."""

    loss: float
    """Mean cross entropy over the supervised tokens, in nats; NaN if there was none."""
    grad_norm: float
    lr: float
    supervised: int
    """Tokens with a label."""
    tokens: int
    """Tokens that are no padding."""
    examples: int
    withheld: bool = False
    """Whether the update was not made, for its gradients would do harm."""

    @property
    def skipped(self) -> bool:
        """Whether there was nothing to learn from, so that no weight was touched."""
        return self.supervised == 0


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What the forward and backward passes of a step found; their gradients wait in the model."""

    supervised: int
    """Tokens with a label, of the whole global batch; where there is none, nothing was computed."""
    tokens: int
    examples: int
    loss: float = math.nan
    """Mean over the supervised tokens of the whole global batch."""
    norm: float = math.nan
    is_finite: bool = False
    """Whether the loss and, on all ranks, the norm are numbers."""
    losses: Sequence[float] = ()
    """Summed loss of each micro-batch of this rank, where `Mesh.tells_loss`."""


def train_step(
    model: Chunks,
    optimizer: MegatronOptimizer,
    batches: Sequence[Batch],
    mesh: Mesh,
    settings: OptimizerConfig,
    lr: float,
) -> StepResult:
    """Accumulate the gradients of `batches`, then update the weights once."""
    return update(optimizer, gradients(model, optimizer, batches, mesh), settings, lr)


def gradients(
    model: Chunks,
    optimizer: MegatronOptimizer,
    batches: Sequence[Batch],
    mesh: Mesh,
    begins: Callable[[], None] = lambda: None,
) -> Gradients:
    """Accumulate the gradients of `batches`, reduce them, and judge them; collective.

    `begins` is called as each micro-batch begins.
    """
    supervised, tokens, examples = count(batches, mesh)
    if not supervised:
        return Gradients(supervised=0, tokens=tokens, examples=examples)
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = run(model, batches, mesh, forward_only=False, begins=begins)
    norm = optim.gradient_norm(optimizer)
    total, broken = mesh.sum_over_world([sum(losses), 0.0 if math.isfinite(norm) else 1.0])
    return Gradients(
        supervised=supervised,
        tokens=tokens,
        examples=examples,
        loss=total / supervised,
        norm=norm,
        is_finite=math.isfinite(total) and not broken,
        losses=losses,
    )


def update(
    optimizer: MegatronOptimizer,
    found: Gradients,
    settings: OptimizerConfig,
    lr: float,
    *,
    withheld: bool = False,
) -> StepResult:
    """Update the weights once, unless there is nothing to learn from or the update is withheld."""
    if found.supervised:
        optim.update(optimizer, settings, lr, found.norm, withheld)
    return StepResult(
        loss=found.loss,
        grad_norm=found.norm,
        lr=lr,
        supervised=found.supervised,
        tokens=found.tokens,
        examples=found.examples,
        withheld=withheld,
    )


def validation_loss(
    model: Chunks,
    batches: Sequence[Batch],
    mesh: Mesh,
    begins: Callable[[], None] = lambda: None,
) -> float:
    """Mean cross entropy over the supervised tokens of `batches` of all ranks, in nats."""
    supervised, _, _ = count(batches, mesh)
    for chunk in model:
        chunk.eval()
    with torch.no_grad(), whole_weights(model), same_scales(model):
        losses = run(model, batches, mesh, forward_only=True, begins=begins)
    (total,) = mesh.sum_over_world([sum(losses)])
    return total / supervised if supervised else math.nan


@contextlib.contextmanager
def same_scales(model: Chunks) -> Iterator[None]:
    """Put back what layers hold beside weights.

    A forward pass alone would add to the largest values that delayed 8-bit scaling goes by.
    """
    kept = [
        (module, module.get_extra_state())
        for chunk in model
        for module in chunk.modules()
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state
    ]
    yield
    for module, state in kept:
        module.set_extra_state(state)


def count(batches: Sequence[Batch], mesh: Mesh) -> tuple[int, int, int]:
    """Supervised tokens, tokens and examples of the global batch; `batches` are our share."""
    mine = [
        sum(batch.supervised for batch in batches),
        sum(batch.useful for batch in batches),
        sum(batch.examples for batch in batches),
    ]
    supervised, tokens, examples = mesh.sum_over_replicas([float(number) for number in mine])
    return int(supervised), int(tokens), int(examples)


def run(
    model: Chunks,
    batches: Sequence[Batch],
    mesh: Mesh,
    *,
    forward_only: bool,
    begins: Callable[[], None] = lambda: None,
) -> list[float]:
    """Pass `batches` through the model; with backward, the gradients are those of the mean.

    Returns the summed loss of each micro-batch on ranks for which `Mesh.tells_loss`, else nothing:
    summed over all ranks, it is the loss of the global batch.
    """
    schedule = get_forward_backward_func()
    iterators = [iter(batches) for _ in model]
    length = batches[0].length * mesh.context.size
    if mesh.parallel.virtual > 1:
        group = group_size(len(batches), mesh.pipeline.size)
        model[0].config.microbatch_group_size_per_vp_stage = group
    losses = schedule(
        forward_step_func=partial(forward_step, mesh=mesh, begins=begins),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=1,
        decoder_seq_length=length,
        forward_only=forward_only,
    )
    found: list[float] = torch.stack(losses).tolist() if mesh.tells_loss else []
    return found


def forward_step(
    batches: Iterator[Batch], model: Any, *, mesh: Mesh, begins: Callable[[], None]
) -> tuple[Tensor, Any]:
    """Megatron-core's contract: the output of this stage, and how the last stage scores it."""
    begins()
    batch = next(batches).to(mesh.device)
    output = model(
        batch.tokens,
        batch.positions,
        None,
        labels=batch.labels,
        loss_mask=batch.rows,
        packed_seq_params=packed(batch),
    )
    return output, partial(token_loss, batch)


def token_loss(batch: Batch, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, number of supervised tokens, and the sum once more for the log."""
    # Filled on the device: a copy of a host's number would wait for all that it computes.
    tokens = torch.full((), batch.supervised, dtype=torch.int, device=loss.device)
    return loss, tokens, loss.detach()


def packed(batch: Batch) -> PackedSeqParams:
    """Where documents begin and end, in Megatron-core's words; every pipeline stage needs it."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.starts,
        cu_seqlens_kv=batch.starts,
        max_seqlen_q=batch.longest,
        max_seqlen_kv=batch.longest,
    )
