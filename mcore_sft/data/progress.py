"""Bytes done in, a line of progress with rate and time left out."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mcore_sft.base.terminal import Console, printable

SECONDS = 30.0
"""Between lines in a log, where a bar would be lines without end."""


@contextmanager
def progress(
    description: str, *, total: int | None, console: Console
) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes on `console`, or lines in a log; yields what counts bytes done."""
    if not console.is_terminal:
        yield _lines(description, total, console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(printable(description), total=total)
        yield lambda size: bars.advance(task, size)


def _lines(description: str, total: int | None, console: Console) -> Callable[[int], None]:
    """Counts bytes, and says every SECONDS how far it is."""
    begun = told = time.monotonic()
    done = 0

    def count(size: int) -> None:
        nonlocal done, told
        done += size
        now = time.monotonic()
        if now - told < SECONDS or not done:
            return
        told, rate = now, done / (now - begun)
        share = f"{done / total:.0%} of {decimal(total)}" if total else decimal(done)
        left = f"  left {timedelta(seconds=round((total - done) / rate))}" if total else ""
        line = f"{description}  {share}  {decimal(int(rate))}/s{left}"
        console.print(line, soft_wrap=True)

    return count
