"""What a night found out of each benchmark in, a line of JSON out, which is only ever added to."""

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from mcore_sft.base import files
from nightly.judge import Finding

Outcome = Literal["passed", "failed", "crashed"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One benchmark, or one suite of tests, at one commit."""

    tier: str
    benchmark: str
    commit: str
    commit_time: str
    """ISO 8601."""
    date: str
    """When it was judged, ISO 8601."""
    machine: dict[str, str | int]
    """`device`, a name, and `cores`, a number."""
    outcome: Outcome
    findings: tuple[Finding, ...]
    figures: dict[str, float]
    """Those of final_loss, validation_loss, accuracy, accuracy_low, accuracy_high (percent),
    tokens_per_second, speed_ratio, step_seconds, peak_memory_gib and seconds (of all its stages)
    that are known; of tests: tests, tests_passed and seconds."""
    curve: str | None
    """File of the measured curve, seen from the history's folder."""
    reference: str | None
    """File of the curve that it was held against."""
    narrowed: str | None = None
    """Without which layout or precision a failure goes away."""
    commits: str | None = None
    """Since which commits a benchmark that did not pass may not have."""
    crash: str | None = None
    """The stage that ended badly, and the last lines of its log."""

    def to_json(self) -> str:
        """One line; a figure that is no finite number is left out."""
        said = asdict(self)
        said["figures"] = {name: x for name, x in self.figures.items() if math.isfinite(x)}
        return json.dumps(said, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """Read one line; raises ValueError if it is torn or no record."""
        said: dict[str, Any] = json.loads(line)
        try:
            # a field that was added later has a default, and is in no older line
            found = {x.name: said[x.name] for x in fields(cls) if x.default is MISSING}
            found |= {x.name: said[x.name] for x in fields(cls) if x.name in said}
            found["findings"] = tuple(Finding(**finding) for finding in found["findings"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no record ({type(error).__name__}: {error})") from None
        if found["outcome"] not in get_args(Outcome):
            raise ValueError(f"no record (outcome {found['outcome']!r})")
        return cls(**found)


def append(file: Path, record: Record) -> None:
    """Add one line, on the disk when this returns; raises OSError."""
    files.make_folder(file.parent)
    handle = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        # a writer that was killed leaves a line without its end
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        line = b"\n" * torn + record.to_json().encode() + b"\n"
        written = os.write(handle, line)
        if written != len(line):
            raise OSError(f"{file}: {written} of {len(line)} bytes were written; is the disk full?")
        os.fsync(handle)
    finally:
        os.close(handle)
    files.sync(file.parent)


def read(file: Path) -> tuple[list[Record], str | None]:
    """The records in the order they were added, none of no file, and which lines hold no record.

    Raises OSError.
    """
    if not file.exists():
        return [], None
    records, torn = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            records.append(Record.from_json(line.decode()))
        except ValueError as error:
            torn.append(f"{file.name}:{number} is ignored: {error}")
    return records, "; ".join(torn) or None
