"""Defects that trainers have had: each is planted, and the gates of the short runs name its step.

The gates are those of `cpu.yaml`; the reference is the plain loop on the same packs.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.config import RunConfig
from mcore_sft.data.packs import batch as batches
from mcore_sft.model import build
from mcore_sft.training import optimizer as optim
from mcore_sft.training import step
from nightly import tier
from nightly.curve import Curve
from nightly.judge import judge
from tests import oracle, runs
from tests.test_planted import as_one_document, plant, scaled

STEPS = 4
SHORT = tier.named("cpu").benchmark("short_dp2").gates
GATES = tier.Gates(loss=SHORT.loss, grad_norm=SHORT.grad_norm, area=SHORT.area)


def experiment(folder: Path, model: Path) -> RunConfig:
    """A short run in which everything that can be wrong has an effect."""
    return runs.experiment(
        folder,
        model,
        train__steps=STEPS,
        optimizer__lr=1e-3,
        optimizer__decay_1d=False,
        optimizer__weight_decay=2.0,
        optimizer__warmup_steps=2,
        optimizer__schedule="cosine",
        optimizer__clip_grad=1.0,
    )


def trained(folder: Path, model: Path) -> Curve:
    """What our trainer measures, as it is patched now."""
    config = experiment(folder, model)
    runs.train(config)
    return Curve.of_run(config.folder)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """What the plain loop measures."""
    return oracle.run(experiment(tmp_path_factory.mktemp("plain"), model))


def departures(measured: Curve, reference: Curve) -> list[int | None]:
    """The first departing step of each gate that does not pass."""
    return [x.step for x in judge(measured, reference, GATES) if not x.passed]


def test_without_a_defect_every_gate_passes(model: Path, tmp_path: Path, reference: Curve) -> None:
    measured = trained(tmp_path, model)
    assert departures(measured, reference) == []
    assert [x.gate for x in judge(measured, reference, GATES)] == ["loss", "grad_norm", "area"]


def shifted_mask(patch: pytest.MonkeyPatch) -> None:
    """Each supervised run of tokens one too far to the right."""

    def wrap(label: Any) -> Any:
        return lambda labels, tokens, spans: label(
            labels, tokens, (spans + 1).clip(max=len(tokens))
        )

    plant(patch, batches, "_label", wrap)


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """The mean of each micro-batch, and then the mean of those."""
    share: list[float] = []

    def wrap_run(run: Any) -> Any:
        def shared(gpt: Any, given: Any, mesh: Any, **kwargs: Any) -> Any:
            share[:] = [sum(batch.supervised for batch in given) / len(given)]
            return run(gpt, given, mesh, **kwargs)

        return shared

    def wrap_head(head: Any) -> Any:
        def mean(*args: Any, **kwargs: Any) -> Any:
            return scaled(head, share[0] / len(args[2]), *args, **kwargs)

        return mean

    plant(patch, step, "run", wrap_run)
    plant(patch, build, "linear_cross_entropy", wrap_head)


def leaking_packs(patch: pytest.MonkeyPatch) -> None:
    """The documents of a pack see each other."""
    plant(patch, step, "packed", as_one_document)


def wrong_rope(patch: pytest.MonkeyPatch) -> None:
    """RoPE that turns without the scaling of Llama 3."""

    def wrap(frequencies: Any) -> Any:
        return lambda a: frequencies(dataclasses.replace(a, rope_scaling=None))

    plant(patch, build, "rope_frequencies", wrap)


def other_decay(patch: pytest.MonkeyPatch) -> None:
    """Norms are decayed, which the configuration leaves out."""

    def wrap(build_optimizer: Any) -> Any:
        def swapped(settings: Any, *args: Any) -> Any:
            other = settings.model_copy(update={"decay_1d": not settings.decay_1d})
            return build_optimizer(other, *args)

        return swapped

    plant(patch, optim, "build", wrap)


def late_warmup(patch: pytest.MonkeyPatch) -> None:
    """A warmup that is off by one step."""

    def wrap(learning_rate: Any) -> Any:
        return lambda settings, step, steps: learning_rate(settings, step + 1, steps)

    plant(patch, optim, "learning_rate", wrap)


def dropped_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """The last micro-batch of a step is not computed."""

    def wrap(run: Any) -> Any:
        return lambda gpt, given, mesh, **kwargs: run(gpt, given[:-1], mesh, **kwargs)

    plant(patch, step, "run", wrap)


def bf16_accumulation(patch: pytest.MonkeyPatch) -> None:
    """Gradients are summed over micro-batches in bf16."""

    def wrap(run: Any) -> Any:
        def rounding(gpt: Any, given: Any, mesh: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                plant(patch, step, "forward_step", lambda forward: wrap_forward(forward, gpt))
                return run(gpt, given, mesh, **kwargs)

        return rounding

    def wrap_forward(forward: Any, gpt: Any) -> Any:
        def rounded(*args: Any, **kwargs: Any) -> Any:
            for chunk in gpt:
                for weight in chunk.parameters():
                    weight.main_grad.copy_(weight.main_grad.bfloat16())
            return forward(*args, **kwargs)

        return rounded

    plant(patch, step, "run", wrap)


Defect = Callable[[pytest.MonkeyPatch], None]
# An update that is wrong shows in the loss of the step after it.
DEFECTS: dict[Defect, int] = {
    shifted_mask: 1,
    mean_of_means: 1,
    leaking_packs: 1,
    wrong_rope: 1,
    other_decay: 2,
    late_warmup: 2,
    dropped_micro_batch: 1,
    bf16_accumulation: 1,
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_is_caught_at_its_first_step(
    model: Path,
    tmp_path: Path,
    reference: Curve,
    monkeypatch: pytest.MonkeyPatch,
    defect: Defect,
) -> None:
    defect(monkeypatch)
    steps = departures(trained(tmp_path, model), reference)
    assert steps
    assert min(step for step in steps if step is not None) == DEFECTS[defect]
