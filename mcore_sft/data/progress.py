"""Bytes done in, a line of progress with rate and time left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def progress(
    description: str, *, total: int | None, console: Console
) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes on `console`; yields what counts bytes that are done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # In a log, a bar is lines without end.
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(description, total=total)
        yield lambda size: bars.advance(task, size)
