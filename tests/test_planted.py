"""The equalities fail when what they guard is broken: each defect is planted and must be caught."""

import contextlib
import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_sft.checkpoint import optimizer_state, sharded
from mcore_sft.data import batch as batches
from mcore_sft.model import build, layers
from mcore_sft.training import optimizer as optim
from mcore_sft.training import step
from tests import test_equalities as equalities


def plant(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrap: Callable[..., Any]
) -> None:
    """Replace `module.name` by `wrap(original)`; forked ranks inherit it."""
    monkeypatch.setattr(module, name, wrap(getattr(module, name)))


@pytest.fixture
def shifted_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each supervised run of tokens one too far to the right."""

    def wrap(label: Any) -> Any:
        return lambda labels, tokens, spans: label(
            labels, tokens, (spans + 1).clip(max=len(tokens))
        )

    plant(monkeypatch, batches, "_label", wrap)


@pytest.mark.usefixtures("shifted_mask")
def test_a_shifted_mask_is_caught_by_the_ids(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        equalities.check_9(model, tmp_path)


@pytest.mark.usefixtures("shifted_mask")
def test_a_shifted_mask_is_caught_by_the_plain_loop(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        equalities.check_10(model, tmp_path, steps=6)


def test_mean_of_means_is_caught(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap_head(head: Any) -> Any:
        def mean(*args: Any, **kwargs: Any) -> Any:
            labels = args[2]
            return head(*args, weights=torch.ones(len(labels)) / len(labels), **kwargs)

        return mean

    def wrap_loss(token_loss: Any) -> Any:
        def one(batch: Any, loss: Any) -> Any:
            total, tokens, logged = token_loss(batch, loss)
            return total, tokens * 0 + 1, logged

        return one

    plant(monkeypatch, build, "linear_cross_entropy", wrap_head)
    plant(monkeypatch, step, "token_loss", wrap_loss)
    with pytest.raises(AssertionError):
        equalities.check_2(model, "one row")


def test_a_pack_without_boundaries_is_caught(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap(packed: Any) -> Any:
        def one_document(batch: Any) -> Any:
            found = packed(batch)
            found.cu_seqlens_q = found.cu_seqlens_kv = batch.starts[[0, -1]]
            found.max_seqlen_q = found.max_seqlen_kv = batch.length
            return found

        return one_document

    plant(monkeypatch, step, "packed", wrap)
    with pytest.raises(AssertionError, match="documents touch"):
        equalities.check_1(model, "one")


def test_a_leak_on_a_middle_pipeline_stage_is_caught(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = layers.PackedAttention.forward

    def leaking(self: Any, query: Any, key: Any, value: Any, mask: Any, /, **kwargs: Any) -> Any:
        output = plain(self, query, key, value, mask, **kwargs)
        return output + 1e-6 * output.mean(dim=0) if self.layer_number == 3 else output

    monkeypatch.setattr(layers.PackedAttention, "forward", leaking)
    with pytest.raises(AssertionError, match="documents touch"):
        equalities.check_1(model, "pp4")


def test_a_context_rank_with_the_wrong_part_is_caught(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrap(share: Any) -> Any:
        return lambda ends, context, rank: share(ends, context, (rank + 1) % context)

    alone = equalities.steps_alone(model)
    plant(monkeypatch, batches, "_share", wrap)
    with pytest.raises(AssertionError):
        equalities.check_3_layout(model, alone, 2, {"context": 2})


def test_activations_taken_for_gradients_are_caught(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrap(transformer_config: Any) -> Any:
        def batched(*args: Any) -> Any:
            config = transformer_config(*args)
            config.overlap_p2p_comm, config.batch_p2p_comm = False, True
            return config

        return batched

    alone = equalities.steps_alone(model)
    plant(monkeypatch, build, "transformer_config", wrap)
    with pytest.raises(AssertionError):
        equalities.check_3_layout(model, alone, 2, {"pipeline": 2, "virtual": 2})


def test_weights_saved_before_they_are_gathered_are_caught(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, "whole_weights", lambda chunks: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        equalities.check_6(model, tmp_path, "dp2_do_overlap", "bf16")


def test_a_lost_count_of_updates_is_caught(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_state, "_step", lambda optimizer: 1)
    with pytest.raises(AssertionError):
        equalities.check_6(model, tmp_path, "dp2_do", "fp32")


def test_a_wrong_rope_scaling_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap(frequencies: Any) -> Any:
        return lambda a: frequencies(a) * 1.01

    plant(monkeypatch, build, "rope_frequencies", wrap)
    with pytest.raises(AssertionError):
        equalities.check_4(tmp_path)


def test_a_dropped_micro_batch_is_caught(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrap(run: Any) -> Any:
        return lambda gpt, batches, mesh, **kwargs: run(gpt, batches[:-1], mesh, **kwargs)

    plant(monkeypatch, step, "run", wrap)
    with pytest.raises(AssertionError):
        equalities.check_10(model, tmp_path, steps=6)


@pytest.mark.parametrize("decay_1d", [True, False])
def test_decay_on_the_wrong_parameters_is_caught(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay_1d: bool
) -> None:
    def wrap(build_optimizer: Any) -> Any:
        def swapped(settings: Any, *args: Any) -> Any:
            other = settings.model_copy(update={"decay_1d": not settings.decay_1d})
            return build_optimizer(other, *args)

        return swapped

    plant(monkeypatch, optim, "build", wrap)
    with pytest.raises(AssertionError):
        equalities.check_10(model, tmp_path, decay_1d, steps=6)


def test_a_learning_rate_off_by_one_step_is_caught(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrap(learning_rate: Any) -> Any:
        return lambda settings, step, steps: learning_rate(settings, step + 1, steps)

    plant(monkeypatch, optim, "learning_rate", wrap)
    with pytest.raises(AssertionError):
        equalities.check_10(model, tmp_path, steps=6)


def test_norms_of_heads_that_are_not_summed_over_tensor_ranks_are_caught(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrap(reduce: Any) -> Any:
        def without(chunks: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
            other = copy.copy(config)
            other.qk_layernorm = False
            return reduce(chunks, other, *args, **kwargs)

        return without

    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    plant(monkeypatch, finalize, "_allreduce_non_tensor_model_parallel_grads", wrap)
    with pytest.raises(AssertionError, match="relative"):
        equalities.check_3(model, tmp_path, "qwen3", "tp2")
