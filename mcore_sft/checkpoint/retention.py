"""Which steps of a run are there, which of them stay, and how the others go.

A step that goes loses its name first, so that what is called step_N is whole. What cannot be
removed is left as it is: tidying never ends a run.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mcore_sft.base import files
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.manifest import read_manifest
from mcore_sft.config import CheckpointConfig

SCORES = "scores.json"


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, newest first."""
    numbers = {path: path.name.removeprefix("step_") for path in folder.glob("step_*")}
    found = [path for path, number in numbers.items() if number.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(numbers[path]), reverse=True)


def superfluous(scores: Mapping[int, float | None], settings: CheckpointConfig) -> list[int]:
    """The steps that may go, of the steps that are there with their scores.

    With `keep` or `best`, what stays is the newest, the best and the multiples of `keep_every`.
    """
    if not (settings.keep or settings.best):
        return []
    newest = sorted(scores, reverse=True)
    best = best_first(scores, settings.metric)
    stay = {*newest[: max(1, settings.keep)], *best[: settings.best]}
    if settings.keep_every:
        stay |= {step for step in scores if step % settings.keep_every == 0}
    return [step for step in newest if step not in stay]


def best_first(scores: Mapping[int, float | None], metric: str) -> list[int]:
    """The steps that have a score by `metric`, of two that are as good the newer first."""
    sign = -1 if metric == "accuracy" else 1
    order = sorted((sign * score, -step) for step, score in scores.items() if score is not None)
    return [-step for _, step in order]


def scores(folder: Path, metric: str) -> dict[int, float | None]:
    """The score of each step by `metric`, the newest first; None where it was not measured.

    A folder that cannot be read, or holds another step than its name says, is left out: it is
    neither counted nor removed.
    """
    found: dict[int, float | None] = {}
    for path in steps(folder):
        with contextlib.suppress(CheckpointError, OSError):
            known = read_manifest(path).get("scores", {}) | scores_since(path)
            found[int(path.name.removeprefix("step_"))] = known.get(metric)
    return found


def scores_since(path: Path) -> dict[str, float | None]:
    """What was measured of a step after it was complete; raises OSError if it cannot be read."""
    try:
        return dict(json.loads((path / SCORES).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def remove(step: Path) -> None:
    """Remove a step; raises OSError, and then as much of it is gone as could be removed."""
    nameless = unfinished(step.parent, step.name)
    step.rename(nameless)
    discard(nameless)


def discard(folder: Path) -> None:
    """Remove a folder that has no step's name, or a link to one; raises OSError."""
    if folder.is_symlink():
        folder.unlink()  # what it leads to was moved there by somebody
        return
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)


def leftovers(folder: Path) -> list[Path]:
    """What saves and removals that did not end have left."""
    return sorted(folder.glob(".step_*.tmp"))


def room(folder: Path) -> int | None:
    """Bytes that a step may take, those of the leftovers included; None where that is not known."""
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(folder)
        within = (path for left in leftovers(folder) for path in left.rglob("*"))
        swept = sum(path.lstat().st_size for path in within if path.is_file())
        return disk.free + swept if disk.total else None
    return None


def unfinished(folder: Path, name: str) -> Path:
    """A name that nothing has, for a step that is being written or removed."""
    return _unused(folder, f".{name}{{}}.tmp")


def set_aside(path: Path, why: str) -> Path:
    """Rename a folder to `why`_step_N, or `why`_step_N.2 and so on, and return that; OSError."""
    aside = _unused(path.parent, f"{why}_{path.name}{{}}")
    files.rename(path, aside)
    return aside


def _unused(folder: Path, form: str) -> Path:
    names = (form.format(f".{number}" if number > 1 else "") for number in itertools.count(1))
    return next(folder / name for name in names if not os.path.lexists(folder / name))
