"""The equalities fail when what they guard is broken: each defect is planted and must be caught."""

import contextlib
import copy
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_sft.checkpoint import optimizer_state, replicas, sharded
from mcore_sft.config import OptimizerConfig
from mcore_sft.data.packs import batch as batches
from mcore_sft.model import build, layers
from mcore_sft.training import loop, step
from mcore_sft.training import optimizer as optim
from mcore_sft.training.beside import guards
from tests import runs
from tests import test_equalities as equalities
from tests.tensors import Difference


def plant(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrap: Callable[..., Any]
) -> None:
    """Replace `module.name` by `wrap(original)`; forked ranks inherit it."""
    monkeypatch.setattr(module, name, wrap(getattr(module, name)))


def scaled(
    head: Any, factor: float, hidden: Tensor, *args: Any, main_grad: Tensor | None, **kwargs: Any
) -> Any:
    """What the head gives, the loss and its gradients times `factor`."""
    hidden = hidden.detach() + factor * (hidden - hidden.detach())
    share = None if main_grad is None else torch.zeros_like(main_grad)
    found = head(hidden, *args, main_grad=share, **kwargs)
    if main_grad is not None and share is not None:
        main_grad.add_(share, alpha=factor)
    return found._replace(loss=found.loss + (factor - 1) * found.loss.detach())


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
        equalities.check_10(model, tmp_path)


def test_mean_of_means_is_caught(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap_head(head: Any) -> Any:
        def mean(*args: Any, **kwargs: Any) -> Any:
            return scaled(head, 1 / len(args[2]), *args, **kwargs)

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


def as_one_document(packed: Any) -> Any:
    """A `step.packed` that knows nothing of the documents in a pack: they see each other."""

    def one_document(batch: Any) -> Any:
        found = packed(batch)
        found.cu_seqlens_q = found.cu_seqlens_kv = batch.starts[[0, -1]]
        found.max_seqlen_q = found.max_seqlen_kv = batch.length
        return found

    return one_document


def test_a_pack_without_boundaries_is_caught(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, step, "packed", as_one_document)
    with pytest.raises(AssertionError, match="beside another document differs first"):
        equalities.check_1(model, "one")


def test_a_leak_on_a_middle_pipeline_stage_is_caught(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = layers.PackedAttention.forward

    def leaking(self: Any, query: Any, key: Any, value: Any, mask: Any, /, **kwargs: Any) -> Any:
        output = plain(self, query, key, value, mask, **kwargs)
        return output + 1e-6 * output.mean(dim=0) if self.layer_number == 3 else output

    monkeypatch.setattr(layers.PackedAttention, "forward", leaking)
    with pytest.raises(AssertionError, match="beside another document differs first"):
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
    """By the save, and without what it compares by the equality too."""
    monkeypatch.setattr(sharded, "whole_weights", lambda chunks: contextlib.nullcontext())
    with pytest.raises(AssertionError, match="ranks that hold the same weights differ"):
        equalities.check_6(model, tmp_path / "compared", "dp2_do_overlap", "bf16")
    monkeypatch.setattr(replicas, "differing", lambda model, mesh: [])
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
        equalities.check_10(model, tmp_path)


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
        equalities.check_10(model, tmp_path, optimizer__decay_1d=decay_1d)


def test_a_learning_rate_off_by_one_step_is_caught(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrap(learning_rate: Any) -> Any:
        return lambda settings, step, steps: learning_rate(settings, step + 1, steps)

    plant(monkeypatch, optim, "learning_rate", wrap)
    with pytest.raises(AssertionError):
        equalities.check_10(model, tmp_path)


def test_norms_of_heads_that_are_not_summed_over_tensor_ranks_are_caught(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the save, and without what it compares by the equality too."""

    def wrap(reduce: Any) -> Any:
        def without(chunks: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
            other = copy.copy(config)
            other.qk_layernorm = False
            return reduce(chunks, other, *args, **kwargs)

        return without

    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    plant(monkeypatch, finalize, "_allreduce_non_tensor_model_parallel_grads", wrap)
    with pytest.raises(AssertionError, match="ranks that hold the same weights differ"):
        equalities.check_3(model, tmp_path / "compared", "qwen3", "tp2")
    monkeypatch.setattr(replicas, "differing", lambda model, mesh: [])
    with pytest.raises(AssertionError, match="relative"):
        equalities.check_3(model, tmp_path, "qwen3", "tp2")


Fault = Callable[[pytest.MonkeyPatch], None]


def setting(name: str, factor: float = 1.5) -> Fault:
    """A number of the optimizer's settings is used as 1.5 times itself, wherever it is used."""

    def other(settings: OptimizerConfig) -> OptimizerConfig:
        return settings.model_copy(update={name: factor * getattr(settings, name)})

    return used(other)


def decay_of_moment(place: int) -> Fault:
    """1.5 times as much of a moment is forgotten in an update."""

    def other(settings: OptimizerConfig) -> OptimizerConfig:
        betas = list(settings.betas)
        betas[place] = 1 - 1.5 * (1 - betas[place])
        return settings.model_copy(update={"betas": tuple(betas)})

    return used(other)


def used(other: Callable[[OptimizerConfig], OptimizerConfig]) -> Fault:
    """The optimizer is built, asked for its rate and updates by `other` settings."""

    def fault(monkeypatch: pytest.MonkeyPatch) -> None:
        plant(monkeypatch, optim, "build", lambda f: lambda s, *rest: f(other(s), *rest))
        plant(monkeypatch, optim, "learning_rate", lambda f: lambda s, *rest: f(other(s), *rest))
        plant(monkeypatch, optim, "update", lambda f: lambda o, s, *a, **k: f(o, other(s), *a, **k))

    return fault


def built(change: Callable[[Any], None]) -> Fault:
    """The optimizer is changed as soon as it is built."""

    def wrap(build_optimizer: Any) -> Any:
        def changed(*args: Any) -> Any:
            optimizer = build_optimizer(*args)
            change(optimizer)
            return optimizer

        return changed

    return lambda monkeypatch: plant(monkeypatch, optim, "build", wrap)


def decay_multiplier(times: Callable[[float], float]) -> Fault:
    def change(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["wd_mult"] = times(group["wd_mult"])

    return built(change)


def rate_multiplier(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr_mult"] *= 1.5


def first_update_counts(count: float) -> Fault:
    """The correction of the moments' bias takes the first update for the one numbered `count`."""

    def change(optimizer: Any) -> None:
        (own,) = optimizer.chained_optimizers
        for state in own.optimizer.state.values():
            state["step"].fill_(count - 1)

    return built(change)


def schedule_end(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, optim, "learning_rate", lambda f: lambda s, at, n: f(s, at, 1.5 * n))


def clipped_to(times: float) -> Fault:
    def wrap(clip: Any) -> Any:
        return lambda weights, bound, norm: clip(weights, times * bound, norm)

    return lambda monkeypatch: plant(monkeypatch, optim, "clip_grad_by_total_norm_fp32", wrap)


def divisor_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap(token_loss: Any) -> Any:
        def other(batch: Any, loss: Any) -> Any:
            total, tokens, logged = token_loss(batch, loss)
            return total, (tokens * 1.5).int(), logged

        return other

    plant(monkeypatch, step, "token_loss", wrap)


def divisor_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap(count: Any) -> Any:
        def other(*args: Any) -> Any:
            supervised, *rest = count(*args)
            return int(1.5 * supervised), *rest

        return other

    plant(monkeypatch, step, "count", wrap)


def summed_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap(head: Any) -> Any:
        def weighted(*args: Any, **kwargs: Any) -> Any:
            return scaled(head, 1.5, *args, **kwargs)

        return weighted

    plant(monkeypatch, build, "linear_cross_entropy", wrap)


SPARED = {"optimizer__decay_1d": False}
"""Norms are left out of the decay."""
BY_SHARE = {"optimizer__warmup_steps": 0, "optimizer__warmup_ratio": 0.4}
STABLE = {"optimizer__schedule": "wsd", "optimizer__decay_ratio": 0.4}


FAULTS: dict[str, tuple[Fault, str, dict[str, Any]]] = {
    "clip_grad": (setting("clip_grad"), "exp_avg", {}),
    "norm clipped to": (clipped_to(1.5), "exp_avg_sq", {}),
    "clipping deleted": (clipped_to(1e9), "exp_avg", {}),
    "lr": (setting("lr"), "update", {}),
    "multiplier of lr": (built(rate_multiplier), "update", {}),
    "min_lr": (setting("min_lr"), "update", {}),
    "warmup_steps": (setting("warmup_steps"), "update", {}),
    "warmup_ratio": (setting("warmup_ratio"), "update", BY_SHARE),
    "decay_ratio": (setting("decay_ratio"), "update", STABLE),
    "end of cosine": (schedule_end, "update", {}),
    "end of linear": (schedule_end, "update", {"optimizer__schedule": "linear"}),
    "beta of exp_avg": (decay_of_moment(0), "exp_avg", {}),
    "beta of exp_avg_sq": (decay_of_moment(1), "exp_avg_sq", {}),
    "bias correction": (first_update_counts(1.5), "update", {}),
    "eps": (setting("eps"), "update", {}),
    "weight_decay": (setting("weight_decay"), "update", {}),
    "multiplier of decay": (decay_multiplier(lambda x: 1.5 * x), "update", SPARED),
    "multiplier of decay dropped": (decay_multiplier(lambda x: 1.0), "update", SPARED),
    "divisor of gradients": (divisor_of_gradients, "grad_norm", {}),
    "divisor of the loss": (divisor_of_the_loss, "loss", {}),
    "summed loss": (summed_loss, "loss", {}),
}
"""Name -> the fault, what must notice it, and the settings that it matters under."""


@pytest.mark.parametrize(("fault", "kind", "changes"), FAULTS.values(), ids=FAULTS)
def test_a_number_that_is_wrong_by_half_is_noticed(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    kind: str,
    changes: dict[str, Any],
) -> None:
    """By the plain loop, at ten times its bound at least; the next test has the other margin."""
    fault(monkeypatch)
    apart = farthest(model, tmp_path, **changes)
    assert apart[kind].times >= 10, str(apart[kind])


@pytest.mark.parametrize("changes", [{}, SPARED, {"optimizer__schedule": "linear"}])
def test_a_true_run_is_a_tenth_of_each_bound_apart(
    model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = farthest(model, tmp_path, **changes)
    assert found.pop("first").times <= 1  # a unit in the last place is 0.07
    for difference in found.values():
        assert difference.times <= 0.1, str(difference)


def farthest(model: Path, scratch: Path, **changes: Any) -> dict[str, Difference]:
    """The largest difference of each kind, of a run of few steps from the plain loop."""
    few = {"train__global_batch": 3, "checkpoint__every": 0} | changes
    found: dict[str, Difference] = {}
    for difference in equalities.differences_10(model, scratch, (5,), **few):
        kind = difference.name.split()[0]
        found[kind] = max(found.get(kind, difference), difference, key=lambda x: x.times)
    return found


# Numbers of the guards: losses of steps are made up, one a step


LOSSES = [0.5, 1.6, 0.5, 1.6, 1.0, 1.1, 1.0, 1.1, 1.45]
"""The last is 6.9 standard deviations above the four before it, and 1.1 above the six before it."""


def check_spikes(model: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"train__spike_window": 4, "train__spike_sigmas": 6.0}
    events = _guarded(model, scratch, monkeypatch, LOSSES, **changes)
    assert [event["step"] for event in events] == [len(LOSSES)]


def check_patience(model: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [math.nan] * 12
    events = _guarded(model, scratch, monkeypatch, losses, train__on_nonfinite="skip")
    assert len(events) == 10


def _guarded(
    model: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: Sequence[float],
    **changes: Any,
) -> list[dict[str, Any]]:
    """What a run reports, to its end or not, whose steps have the mean `losses`."""
    script = iter(losses)

    def wrap(head: Any) -> Any:
        def scripted(*args: Any, rows: Any, **kwargs: Any) -> Any:
            found = head(*args, rows=rows, **kwargs)
            # The head wants its gradient to be 1.
            apart = next(script) * len(rows) - found.loss.detach()
            return found._replace(loss=found.loss + apart)

        return scripted

    plant(monkeypatch, build, "linear_cross_entropy", wrap)
    changes |= {"train__global_batch": 3, "train__steps": len(losses)}
    config = runs.experiment(scratch, model, **changes)
    with contextlib.suppress(AssertionError):  # how it ends is not asked here
        runs.train(config)
    return [line for line in runs.metrics(config) if "event" in line]


@pytest.mark.parametrize("check", [check_spikes, check_patience])
def test_guards(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[..., None]
) -> None:
    check(model, tmp_path, monkeypatch)


GUARDED = ["spike_sigmas", "spike_window"]


@pytest.mark.parametrize("name", GUARDED)
def test_a_spike_measured_by_a_wrong_number_is_noticed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def wrap(guard: Any) -> Any:
        def other(settings: Any, *rest: Any) -> Any:
            number = getattr(settings, name)
            wrong = type(number)(1.5 * number)
            return guard(settings.model_copy(update={name: wrong}), *rest)

        return other

    plant(monkeypatch, loop, "Guard", wrap)
    with pytest.raises(AssertionError):
        check_spikes(model, tmp_path, monkeypatch)


def test_another_patience_is_noticed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "PATIENCE", int(1.5 * guards.PATIENCE))
    with pytest.raises(AssertionError):
        check_patience(model, tmp_path, monkeypatch)
