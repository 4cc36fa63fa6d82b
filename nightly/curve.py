"""The metrics of a run in, what a judgement looks at out; a reference is kept in the same form."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mcore_sft.base import files
from mcore_sft.base.errors import UserError

METRICS = "metrics.jsonl"
"""What a training run writes into its folder."""


class CurveError(UserError):
    """What should hold a curve does not."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a run or the oracle measured of each step; what is no number is NaN."""

    steps: tuple[int, ...]
    """Counted from 1, in order."""
    loss: tuple[float, ...]
    """Mean over the supervised tokens of the global batch, in nats."""
    grad_norm: tuple[float, ...]
    """Before clipping."""
    tokens_per_second: tuple[float, ...]
    """Without padding."""
    validation: dict[int, float]
    """Step -> validation loss."""
    peak_memory: int
    """Bytes, of the rank that needed most."""
    step_seconds: tuple[float, ...] = ()
    """Without validation and checkpoints; empty where nobody measured it."""

    @classmethod
    def of_run(cls, folder: Path) -> "Curve":
        """What the run in `folder` wrote; raises `CurveError`."""
        path = folder / METRICS
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise CurveError(
                f"{path}: no metrics of a run ({error}); its log says how far it came"
            ) from None
        taken = [entry for entry in entries if "loss" in entry]
        return cls(
            steps=tuple(entry["step"] for entry in taken),
            loss=_numbers(taken, "loss"),
            grad_norm=_numbers(taken, "grad_norm"),
            tokens_per_second=_numbers(taken, "tokens_per_second"),
            validation={
                entry["step"]: _number(entry["validation_loss"])
                for entry in entries
                if "validation_loss" in entry
            },
            peak_memory=max((entry["peak_memory_bytes"] for entry in taken), default=0),
            step_seconds=_numbers(taken, "step_seconds"),
        )

    @classmethod
    def read(cls, path: Path) -> "Curve":
        """Read what `write` wrote; raises `CurveError`."""
        try:
            return cls.of_tree(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CurveError(
                f"{path}: no curve ({type(error).__name__}: {error}); remove it and run again"
            ) from None

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all; raises OSError."""
        files.replace(path, json.dumps(self.to_tree(), allow_nan=False) + "\n")

    @classmethod
    def of_tree(cls, tree: dict[str, Any]) -> "Curve":
        """What `to_tree` made; raises KeyError, TypeError or ValueError of anything else."""
        return cls(
            steps=tuple(tree["steps"]),
            **{name: _numbers_of(tree[name]) for name in SERIES},
            validation={int(step): _number(x) for step, x in tree["validation"].items()},
            peak_memory=tree["peak_memory"],
            step_seconds=_numbers_of(tree.get("step_seconds", [])),
        )

    def until(self, last: int) -> "Curve":
        """The steps up to `last`."""
        count = sum(step <= last for step in self.steps)
        return replace(
            self,
            steps=self.steps[:count],
            **{name: getattr(self, name)[:count] for name in SERIES},
            validation={step: x for step, x in self.validation.items() if step <= last},
            step_seconds=self.step_seconds[:count],
        )

    def to_tree(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: null."""
        said = asdict(self)
        for name in (*SERIES, "step_seconds"):
            said[name] = [_or_null(x) for x in said[name]]
        said["validation"] = {str(step): _or_null(x) for step, x in self.validation.items()}
        return said


SERIES = ("loss", "grad_norm", "tokens_per_second")
"""What there is a number of for each step."""


def _numbers(entries: list[dict[str, Any]], key: str) -> tuple[float, ...]:
    return _numbers_of([entry[key] for entry in entries])


def _numbers_of(values: list[float | None]) -> tuple[float, ...]:
    return tuple(_number(x) for x in values)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
