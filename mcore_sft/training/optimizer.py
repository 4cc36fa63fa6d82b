"""AdamW over this rank's weights, and the learning rate as a function of the step.

OptimizerConfig + model -> Megatron-core's optimizer
"""

import math
from typing import Any

import torch

from mcore_sft.config import OptimizerConfig, TrainConfig
from mcore_sft.model.build import Chunks
from mcore_sft.runtime import megatron_core
from mcore_sft.runtime.device import torch_dtype
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.errors import TrainingError
from mcore_sft.training.schedules import SCHEDULES

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


def build(
    settings: OptimizerConfig, train: TrainConfig, model: Chunks, mesh: Mesh
) -> ChainedOptimizer:
    """AdamW (Loshchilov and Hutter, 2019) with fp32 moments, and fp32 main weights under bf16.

    It is torch's on every device, its states made at once: what fits at the start fits at the end.
    """
    config = MegatronConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        bf16=train.precision == "bf16",
        params_dtype=torch_dtype(train.precision),
        clip_grad=settings.clip_grad or 0.0,
        use_distributed_optimizer=mesh.parallel.distributed_optimizer,
    )
    # Megatron-core's default (None) leaves norms and biases out of the decay.
    overrides: dict[Any, Any] | None = {} if settings.decay_1d else None
    with megatron_core.torch_adamw():
        optimizer = get_megatron_optimizer(
            config,
            model,
            config_overrides=overrides,
            use_gloo_process_groups=False,
            pg_collection=mesh.groups,
        )
    for group in optimizer.param_groups:
        group["fused"] = True
    (own,) = optimizer.chained_optimizers
    for group in own.optimizer.param_groups:
        for weight in group["params"]:
            own.optimizer.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(weight, dtype=torch.float32),
            }
    return optimizer


def learning_rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of the update numbered `step` (from 0) of `steps`."""
    warmup = settings.warmup(steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    begin = settings.decay_begin(steps) if settings.schedule == "wsd" else warmup
    done = max(0.0, (step - begin) / max(1, steps - begin))
    return SCHEDULES[settings.schedule](settings.lr, settings.min_lr, done)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The norm of the gradients of all ranks, which are ready then."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(
    optimizer: MegatronOptimizer,
    settings: OptimizerConfig,
    lr: float,
    norm: float,
    withheld: bool,
) -> None:
    """Update the weights once from the gradients whose `norm` is known, unless `withheld`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    if withheld:
        return
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient norm is {norm}: the weights were left as they were; lower optimizer.lr, "
            "clip gradients with optimizer.clip_grad, or look for a damaged example"
        )
    if settings.clip_grad:
        clip_grad_by_total_norm_fp32(optimizer.get_parameters(), settings.clip_grad, norm)
    optimizer.step_with_ready_grads()
