"""What a resumed run may change: refused, reported or allowed, for every key of the configuration.

checkpoint + configuration --> an error | lines "optimizer.lr: 0.001 -> 0.1" and the history
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from mcore_sft import config as configuration
from mcore_sft.checkpoint.describe import CONFIG
from mcore_sft.checkpoint.sharded import DATASET_BEFORE, Checkpoints, Progress, short
from mcore_sft.config import OptimizerConfig, RunConfig
from mcore_sft.data.manifest import split_fingerprint
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.model.architecture import Architecture
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.optimizer import learning_rate

REFUSED = (
    *("data.train", "data.sequence_length", "data.seed"),
    *("prompt.template", "prompt.instruction", "prompt.system"),
    *("prompt.reasoning_tags", "prompt.mask_reasoning", "prompt.variables.*", "prompt.date"),
    "data.train_on",
    *("train.seed", "train.last_step", "train.precision"),
    "optimizer.decay_1d",
)
"""They decide what is trained on, and in which form: with another value it is another run."""

SCHEDULE = (
    *("optimizer.lr", "optimizer.min_lr", "optimizer.schedule", "optimizer.decay_ratio"),
    *("optimizer.warmup_steps", "optimizer.warmup_ratio", "train.steps"),
)
REPORTED = (
    *SCHEDULE,
    *("optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_grad"),
    *("train.packs", "train.global_batch", "model.layers", "train.fp8", "train.fp8_bf16_ends"),
    *("train.on_nonfinite", "train.on_spike", "train.spike_sigmas", "train.spike_window"),
    *("data.validation", "train.validation_packs", "train.evaluate_benchmark"),
)
"""They change what is learned from here on, or what scores before and after are compared by."""

ALLOWED = (
    *("name", "output", "model.path", "model.tokenizer", "data.packed", "data.root"),
    *("data.on_bad_row", "data.max_bad_rows", "data.workers", "data.gigatoken"),
    *("data.holdout.*", "data.filters.*", "data.contamination.*"),
    *("parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual"),
    *("parallel.context", "parallel.distributed_optimizer", "parallel.overlap"),
    *("train.micro_batch", "train.recompute", "train.deterministic", "train.max_minutes"),
    *("train.validate_every", "train.evaluate_every", "train.evaluate_gpus", "train.hang_seconds"),
    *("train.nodes", "train.connect_seconds"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.best", "checkpoint.metric"),
    *("checkpoint.keep_every", "checkpoint.resume", "evaluation.*", "log.*"),
)
"""Where and how fast a run goes, what is kept and told of it, and how its dataset was made.

What lies under a path is compared: the architecture, the tokenizer and the training packs.
"""


def what_stays(
    config: RunConfig, dataset: PackedDataset, architecture: Architecture
) -> dict[str, Any]:
    """What a resumed run must share with the run that stopped: its examples and its weights."""
    return {
        "dataset": dataset.fingerprint,
        "train.seed": config.train.seed,
        "train.last_step": config.train.last_step,
        "train.precision": config.train.precision,
        "optimizer.decay_1d": config.optimizer.decay_1d,
        "architecture": asdict(architecture),
    }


def resumed(
    config: RunConfig,
    checkpoints: Checkpoints,
    fixed: dict[str, Any],
    dataset: PackedDataset,
    beat: Callable[[], None],
) -> Progress | None:
    """Where the run was, its weights and moments restored; None if it begins. Collective.

    `beat` is called for each file that is verified.
    """
    if not config.checkpoint.resume:
        checkpoints.begin_anew()
        return None
    # Runs began with a fingerprint of all splits together.
    together = dataset.manifest["fingerprint"]
    progress = checkpoints.restore_latest(fixed, formerly={"dataset": together}, beat=beat)
    if progress is None:
        return None
    if progress.fixed.get("dataset") == together:
        progress.validation = _validation(dataset)
        if together != fixed["dataset"]:
            progress.fixed[DATASET_BEFORE] = together
    progress.fixed |= fixed
    return progress


def report(progress: Progress, config: RunConfig, dataset: PackedDataset, mesh: Mesh) -> list[str]:
    """Record in `progress` what has changed since its checkpoint; returns a line for each change.

    Nothing has changed where the run begins. Collective.
    """
    before, progress.validation = progress.validation, _validation(dataset)
    if not progress.step:
        return []
    file = config.folder / f"step_{progress.step}" / CONFIG
    then = _defaults() | mesh.from_main(lambda: leaves(configuration.read_tree(file)))
    now = leaves(config.model_dump(mode="json"))
    # What a validation set holds is told by its packs.
    then["data.validation"], now["data.validation"] = before, progress.validation
    changed = {key: [then[key], now[key]] for key in REPORTED if then[key] != now[key]}
    if changed:
        progress.history.append({"step": progress.step, "changed": changed})
    lines = [f"{key}: {short(old)} -> {short(new)}" for key, (old, new) in changed.items()]
    return lines + _jump(changed, then, config, progress.step)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by their dotted keys; lists are values."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _defaults() -> dict[str, Any]:
    """What a checkpoint's configuration means by the keys that it does not have yet."""
    return leaves(configuration.parse({"name": "", "model": {"path": "."}}).model_dump(mode="json"))


def _validation(dataset: PackedDataset) -> str | None:
    if "validation" not in dataset.manifest["splits"]:
        return None
    return split_fingerprint(dataset.manifest, "validation")


def _jump(
    changed: Mapping[str, Any], then: Mapping[str, Any], config: RunConfig, step: int
) -> list[str]:
    """How the learning rate goes on after `step`, where it would have gone on otherwise."""
    causes = [
        f"{key} was {short(was)}, now {short(now)}"
        for key, (was, now) in changed.items()
        if key in SCHEDULE
    ]
    if not causes or step >= config.train.steps:
        return []
    names = [key.removeprefix("optimizer.") for key in SCHEDULE if key.startswith("optimizer.")]
    before = OptimizerConfig.model_validate({name: then[f"optimizer.{name}"] for name in names})
    steps = then["train.steps"]
    was, expected = (learning_rate(before, at, steps) for at in (step - 1, min(step, steps)))
    now = learning_rate(config.optimizer, step, config.train.steps)
    if now == expected:
        return []
    return [f"lr was {was:.2e} at step {step}, is {now:.2e} now: {'; '.join(causes)}"]
