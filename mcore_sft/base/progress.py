"""Bytes done in, a line of progress out: how far, how fast in the last minute, how long still.

stages, the share of the time that each is expected to take -> one line over all of them
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn

from mcore_sft.base.terminal import Console, printable

SECONDS = 30.0
"""Between lines in a log, where a bar would be lines without end."""

_WINDOW = 60.0  # seconds that rates are taken over
_FIRST = 5.0  # seconds of work before the first guess

Advance = Callable[[int], None]
"""Counts bytes that are done."""


class Course:
    """One line of progress over all stages of some work, on a console or in a log."""

    def __init__(self, console: Console, shares: Mapping[str, float]) -> None:
        """shares: the stages in order, and the share of the time that each may take."""
        whole, behind = sum(shares.values()), 0.0
        self._stages: dict[str, tuple[float, float]] = {}
        for name, share in shares.items():
            self._stages[name] = behind, share / whole
            behind += share / whole
        self._console = console
        self._bar: Progress | None = None
        self._told = time.monotonic()
        self._lately = _Lately()
        self._lock = threading.Lock()

    def __enter__(self) -> "Course":
        if self._console.is_terminal:
            text = TextColumn("{task.description}", markup=False)
            self._bar = Progress(text, BarColumn(), console=self._console)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def stage(self, name: str, *, total: int | None = None) -> Iterator[Advance]:
        """One stage, which has `total` bytes to do. Some may be left out, or begin again."""
        (behind, share), rate = self._stages[name], _Lately()
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            with self._lock:
                done += size
                part = min(1.0, done / total) if total else 0.0
                rate.note(done)
                self._lately.note(behind + share * part)
                self._tell(name, done, total, rate)

        if self._bar is not None:
            self._tell(name, 0, total, rate)
        yield advance
        self._lately.note(behind + share)

    def _tell(self, name: str, done: int, total: int | None, rate: "_Lately") -> None:
        now = time.monotonic()
        if self._bar is None and (now - self._told < SECONDS or not done):
            return
        self._told = now
        line = [name]
        if done or total:
            line.append(f"{done / total:.0%} of {decimal(total)}" if total else decimal(done))
        if speed := rate.per_second():
            line.append(f"{decimal(int(speed))}/s")
        at = self._lately.latest
        if len(self._stages) > 1:
            line.append(f"all {at:.0%}")
        if (total or len(self._stages) > 1) and (speed := self._lately.per_second()):
            line.append(f"left {timedelta(seconds=round((1 - at) / speed))}")
        said = printable("  ".join(line))
        if self._bar is None:
            self._console.print(said, soft_wrap=True)
        else:
            self._bar.update(self._task, completed=at, description=said)


@contextmanager
def progress(description: str, *, total: int | None, console: Console) -> Iterator[Advance]:
    """A line over `total` bytes of one piece of work; yields what counts bytes done."""
    with (
        Course(console, {description: 1.0}) as course,
        course.stage(description, total=total) as advance,
    ):
        yield advance


class _Lately:
    """How much was done by when, in the last minute."""

    def __init__(self) -> None:
        self._notes = deque([(time.monotonic(), 0.0)])
        self._begun: float | None = None

    @property
    def latest(self) -> float:
        """How much is done."""
        return self._notes[-1][1]

    def note(self, done: float) -> None:
        """So much is done by now."""
        now = time.monotonic()
        if self._begun is None and done:  # what came before was the start of processes
            self._begun = now
            self._notes.clear()
        self._notes.append((now, done))
        while len(self._notes) > 2 and self._notes[1][0] <= now - _WINDOW:
            self._notes.popleft()

    def per_second(self) -> float | None:
        """How much is done in a second; None before enough was done to tell."""
        (first, before), (last, after) = self._notes[0], self._notes[-1]
        if self._begun is None or last - self._begun < _FIRST:
            return None
        return (after - before) / (last - first) if after > before else None
