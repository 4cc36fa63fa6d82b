"""Numbers of a step in, TensorBoard's files or W&B's page out: where the configuration asks."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcore_sft.base.errors import UserError
from mcore_sft.config import ConfigError, LogConfig

Tracker = Callable[[int, dict[str, float]], None]
"""Told of each step and its numbers by name."""


def check(settings: LogConfig) -> None:
    """Raise `ConfigError` if a package is missing that the configuration asks for."""
    for asked, key, package, extra in (
        (settings.tensorboard, "log.tensorboard", "tensorboard", "track"),
        (settings.wandb, "log.wandb", "wandb", "track"),
        (settings.curve, "log.curve", "matplotlib", "plot"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{key} needs the package {package}, which is not installed: pip install "
                f"{package}, or the `{extra}` extra; or leave {key} out"
            )


def open_trackers(settings: LogConfig, folder: Path, name: str, resumed_at: int) -> list[Tracker]:
    """What the configuration asks for; lines of steps after `resumed_at` are taken back."""
    made = []
    if settings.tensorboard:
        made.append(_tensorboard(folder, resumed_at))
    if settings.wandb:
        made.append(_wandb(settings.wandb, folder, name, resumed_at))
    return made


def _tensorboard(folder: Path, resumed_at: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def track(step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()

    return track


def _wandb(project: str, folder: Path, name: str, resumed_at: int) -> Tracker:
    """A run of `project`; its id is kept in the folder, so that a resumed run goes on in it.

    A run that begins has one of its own: W&B takes no numbers of steps that it has.
    """
    wandb = importlib.import_module("wandb")
    kept = folder / "wandb_id"
    known = kept.read_text(encoding="utf-8").strip() if resumed_at and kept.exists() else None
    try:
        run = wandb.init(project=project, name=name, dir=str(folder), id=known, resume="allow")
    except wandb.Error as error:
        raise UserError(
            f"log.wandb: {project}: W&B does not begin ({error}); run `wandb login`, set "
            "WANDB_API_KEY, set WANDB_MODE=offline to send it later with `wandb sync`, or leave "
            "log.wandb out"
        ) from error
    kept.write_text(run.id + "\n", encoding="utf-8")
    run.define_metric("accuracy", step_metric="evaluated_step")

    def track(step: int, numbers: dict[str, float]) -> None:
        if "accuracy" in numbers:
            # Steps have followed, and W&B takes no numbers of an earlier one.
            late = {"accuracy": numbers["accuracy"], "evaluated_step": step}
            run.log(late, commit=False)
        else:
            run.log(numbers, step=step)

    return track
