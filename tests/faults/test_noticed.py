"""What the tests did not notice: numbers wrong by half, and equalities that nobody runs."""

from pathlib import Path
from typing import Any

import pytest

from mcore_sft.training import optimizer as optim
from mcore_sft.training import step
from nightly import tier
from tests import test_equalities as equalities
from tests import test_planted as planted

ROOT = Path(__file__).parent.parent.parent


def test_gradients_clipped_at_one_and_a_half_times_clip_grad_are_noticed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrap(clip: Any) -> Any:
        return lambda weights, bound, norm: clip(weights, 1.5 * bound, norm)

    planted.plant(monkeypatch, optim, "clip_grad_by_total_norm_fp32", wrap)
    with pytest.raises(AssertionError):
        equalities.check_10(model, tmp_path)


@pytest.mark.parametrize("changes", [{"betas": (0.9, 0.97)}, {"eps": 1.5e-3}])
def test_equality_10_compares_weights_and_moments_after_an_update(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def wrap(build: Any) -> Any:
        return lambda settings, *rest: build(settings.model_copy(update=changes), *rest)

    planted.plant(monkeypatch, optim, "build", wrap)
    named = r"layout one: (update|exp_avg_sq) 1 of model\.[\w.]+ differs first"
    with pytest.raises(AssertionError, match=named):
        equalities.check_10(model, tmp_path)


def test_each_number_of_optimizer_schedule_guards_and_loss_is_planted() -> None:
    numbers = {"lr", "min_lr", "warmup_steps", "warmup_ratio", "decay_ratio"}
    numbers |= {"eps", "weight_decay", "clip_grad"}
    others = {"beta of exp_avg", "beta of exp_avg_sq", "bias correction", "multiplier of decay"}
    loss = {"divisor of gradients", "divisor of the loss", "end of cosine", "end of linear"}
    assert numbers | others | loss <= planted.FAULTS.keys()
    assert planted.GUARDED == ["spike_sigmas", "spike_window"]


def test_a_failing_equality_names_the_first_tensor_and_layout_that_differ(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.plant(monkeypatch, step, "packed", planted.as_one_document)
    named = r"layout one, rank 0: .* differs first: max abs \S+ \(bound 0\) at \[\d+, \d+\]"
    with pytest.raises(AssertionError, match=named):
        equalities.check_1(model, "one")


def test_the_nightly_runs_all_equalities() -> None:
    suite = tier.named("cpu").suite("equalities")
    assert suite is not None
    assert suite.tests == ("tests/test_equalities.py",)


def test_the_readme_names_date_and_commit_of_the_last_full_run() -> None:
    assert "\nLast full run: " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_layout_matrix() -> None:
    assert '\npart "layouts" make test-layouts\n' in (ROOT / ".ci" / "run").read_text()
    recipe = (ROOT / "Makefile").read_text().partition("\ntest-layouts:")[2].splitlines()[1]
    assert recipe.endswith("-m slow tests/test_equalities.py -k every_layout")
