"""A GPT of Megatron-core, as much of it as lies on this rank.

Architecture + Mesh -> chunks: Gpts in the order of their layers, each wrapped for data parallelism
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mcore_sft.config import ConfigError, ModelConfig, TrainConfig
from mcore_sft.model.architecture import Architecture, rope_frequencies
from mcore_sft.model.layers import ApexRMSNorm, FusedSwiGLU, PackedAttention, RMSNorm
from mcore_sft.ops.linear_cross_entropy import linear_cross_entropy
from mcore_sft.runtime.device import torch_dtype
from mcore_sft.runtime.hardware import (
    attention_backend,
    layer_implementation,
    prepare_transformer_engine,
)
from mcore_sft.runtime.megatron_core import GPTModel
from mcore_sft.runtime.mesh import Mesh

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

Chunks = list[DistributedDataParallel]


class Gpt(GPTModel):
    """Megatron-core's GPT with the output layer and the loss as one operator."""

    real_vocab: int

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Hidden states [T, 1, D] before the last stage; there the loss or logits [1, T, V].

        Where labels are given, `loss_mask` carries the supervised rows [R], on the CPU: it is the
        one tensor that Megatron-core hands through to the loss untouched.
        """
        head = None if labels is None else self._loss
        output: Tensor = super().forward(*args, labels=labels, output_processor=head, **kwargs)
        return output

    def _loss(
        self, *, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor, **_: Any
    ) -> Tensor:
        """The summed cross entropy of the rows that `loss_mask` names."""
        # The layer is never called: DDP waits here for a weight that is still being gathered.
        for wait in self.output_layer._forward_pre_hooks.values():
            wait(self.output_layer, ())
        weight = self.output_weight()
        main_grad = getattr(weight, "main_grad", None) if weight.requires_grad else None
        if self.share_embeddings_and_output_weights and self.pre_process:
            weight = weight.detach()  # autograd brings the gradient of the embedding alone
        elif main_grad is not None and torch.is_grad_enabled():
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return linear_cross_entropy(
            hidden_states.squeeze(1),
            weight,
            labels[0].index_select(0, loss_mask.to(labels.device, non_blocking=True)),
            rows=loss_mask,
            vocab_size=self.real_vocab,
            group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            main_grad=main_grad,
        ).loss

    def output_weight(self) -> Tensor:
        """Vocabulary rows [V, D] of the output layer, which may be those of the embedding."""
        if self.share_embeddings_and_output_weights:
            shared: Tensor = self.shared_embedding_or_output_weight()
            return shared
        own: Tensor = self.output_layer.weight
        return own


def build(
    architecture: Architecture,
    settings: ModelConfig,
    train: TrainConfig,
    mesh: Mesh,
    computed: Callable[[], None] = lambda: None,
) -> Chunks:
    """This rank's part of the model, its weights not yet loaded, in DDP.

    `computed` is called when the gradients of a step are there and wait to be exchanged.
    """

    def exchange(*arguments: Any, **keywords: Any) -> None:
        computed()
        finalize_model_grads(*arguments, **keywords)

    layers = layer_implementation(settings, train, mesh.device)
    if layers == "transformer_engine":
        prepare_transformer_engine()
    config = transformer_config(architecture, train, mesh, layers)
    config.finalize_model_grads_func = exchange
    spec = block_spec(layers, architecture, mesh)
    parallel = mesh.parallel
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        average_in_collective=False,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
    )
    chunks = []
    for number in range(parallel.virtual):
        model = Gpt(
            config,
            spec,
            vocab_size=architecture.padded_vocab(mesh.tensor.size),
            max_sequence_length=architecture.max_positions,
            pre_process=mesh.is_first_stage and number == 0,
            post_process=mesh.is_last_stage and number == parallel.virtual - 1,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=architecture.tied,
            pg_collection=mesh.groups,
            vp_stage=number if parallel.virtual > 1 else None,
        )
        model.real_vocab = architecture.vocab
        # Megatron-core hard-wires three of the numbers of Llama 3 scaling: ours take their place.
        model.rotary_pos_emb.inv_freq = rope_frequencies(architecture).to(mesh.device)
        model.to(mesh.device)
        _add_gradients_in_place(model)
        if layers == "transformer_engine":
            _fuse_swiglu(model)
        chunks.append(
            DistributedDataParallel(
                config,
                reduction,
                Float16Module(config, model) if config.bf16 else model,
                # The first chunk's backward pass is the last: those of the others hide theirs.
                disable_bucketing=number > 0,
                pg_collection=mesh.groups,
            )
        )
    if parallel.overlap:
        waiting = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = waiting if parallel.virtual > 1 else waiting[0]
    return chunks


def _add_gradients_in_place(model: Gpt) -> None:
    """Let Transformer Engine's products add the weights' gradients to fp32 main_grad as they go.

    Megatron-core's gradient_accumulation_fusion would do so too, but its output layer, in whose
    place ours computes, cannot be made with it where Apex is absent. It is on for Apex alone.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _fuse_swiglu(model: Gpt) -> None:
    """Let one kernel of Transformer Engine compute each SwiGLU.

    Megatron-core would put the operation itself there, which its checkpoints do not know.
    """
    for module in model.modules():
        if isinstance(module, MLP):
            module.activation_func = FusedSwiGLU()


@contextlib.contextmanager
def whole_weights(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Gather what the distributed optimizer has updated, which overlapping leaves to the next step.

    For all that reads weights between two steps.
    """
    pending = [chunk for chunk in chunks if chunk.use_forward_hook]
    for chunk in pending:
        chunk.disable_forward_pre_hook(param_sync=True)
    yield
    for chunk in pending:
        chunk.enable_forward_pre_hook()


# Megatron-core's words for how products are scaled to 8 bits. The long history is NVIDIA's own.
_FP8: dict[str, dict[str, Any]] = {
    "none": {},
    "delayed": {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    },
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}

# Megatron-core's words for what is computed again in the backward pass.
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def transformer_config(
    architecture: Architecture, train: TrainConfig, mesh: Mesh, layers: str
) -> TransformerConfig:
    """Megatron-core's configuration of `architecture` in such `layers`, split as `mesh` is."""
    fused = layers == "transformer_engine"
    stage_layers = architecture.layers // mesh.pipeline.size
    if train.fp8_bf16_ends > stage_layers:
        raise ConfigError(
            f"train.fp8_bf16_ends {train.fp8_bf16_ends} is more than the {stage_layers} layers of "
            "a pipeline stage"
        )
    _require_eight_bit_sizes(architecture, train, mesh)
    dtype = torch_dtype(train.precision)
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.intermediate,
        **architecture.layer_settings(),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=mesh.tensor.size,
        pipeline_model_parallel_size=mesh.pipeline.size,
        virtual_pipeline_model_parallel_size=(
            mesh.parallel.virtual if mesh.parallel.virtual > 1 else None
        ),
        # Batched, two stages of several chunks take each other's activations for gradients.
        overlap_p2p_comm=mesh.parallel.virtual > 1,
        batch_p2p_comm=mesh.parallel.virtual == 1,
        context_parallel_size=mesh.context.size,
        sequence_parallel=mesh.parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        # The weights are always loaded; a method is still needed, since it is on its way that
        # Megatron-core marks which parameters are split over the tensor axis.
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        # Each layer under its own key, so that a checkpoint can be read one tensor at a time.
        hetereogenous_dist_checkpoint=True,
        **_RECOMPUTE[train.recompute],
        **_FP8[train.fp8],
        first_last_layers_bf16=train.fp8_bf16_ends > 0,
        num_layers_at_start_in_bf16=train.fp8_bf16_ends,
        num_layers_at_end_in_bf16=train.fp8_bf16_ends,
        attention_backend=AttnBackend[attention_backend(mesh.device) if fused else "auto"],
        apply_rope_fusion=fused,
        use_te_activation_func=fused,
        gradient_accumulation_fusion=layers == "apex",
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )


def eight_bit_unit(train: TrainConfig, *, gathered: bool) -> int:
    """What rows and columns of 8-bit products are a multiple of, on each rank.

    Blocks of 128 stay whole where tensor ranks gather each other's rows.
    """
    if train.fp8 == "none":
        return 1
    return 128 if train.fp8 == "blockwise" and gathered else 16


def _require_eight_bit_sizes(a: Architecture, train: TrainConfig, mesh: Mesh) -> None:
    """Raise `ConfigError` where a weight of a layer is of a size that 8-bit products refuse."""
    ranks = mesh.tensor.size
    unit = eight_bit_unit(train, gathered=False)
    for what, size, needed in (
        ("hidden size", a.hidden, eight_bit_unit(train, gathered=mesh.parallel.sequence)),
        ("width of the query heads of a tensor rank", a.heads * a.head_dim // ranks, unit),
        ("width of the key heads of a tensor rank", a.kv_heads * a.head_dim // ranks, unit),
        ("intermediate size of a tensor rank", a.intermediate // ranks, unit),
    ):
        if size % needed:
            raise ConfigError(
                f"train.fp8: {train.fp8} needs a {what} that is a multiple of {needed}, but this "
                f"model has {size}; use train.fp8=none, another recipe or another parallel section"
            )


def block_spec(layers: str, architecture: Architecture, mesh: Mesh) -> TransformerBlockSubmodules:
    """What each layer of a chunk is made of."""
    if layers == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        normed = architecture.layer_settings()["qk_layernorm"]
        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=normed), TENorm
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        norm = ApexRMSNorm if layers == "apex" else RMSNorm
        layer.submodules.self_attention.submodules.core_attention = PackedAttention
        architecture.set_norms(layer, norm)
    chunk_layers = architecture.layers // (mesh.pipeline.size * mesh.parallel.virtual)
    return TransformerBlockSubmodules(layer_specs=[layer] * chunk_layers, layer_norm=norm)


def _leave_empty(weight: Tensor) -> Tensor:
    return weight
