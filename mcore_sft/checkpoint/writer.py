"""The share of one rank in, files and their checksums out, in a process beside the training.

GPU --copy--> host --fork--> writer --files, SHA-256--> .step_N.tmp;    what it wrote --pipe--> run

The fork is the copy of what lies on the CPU already: pages are shared until training changes them.
Pinned pages are not: a copy of what lay on a GPU is held until the writer has ended, since torch
would hand its memory to the next copy.
"""

import gc
import multiprocessing
import queue
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mcore_sft.checkpoint.manifest import File, digest
from mcore_sft.command import end_with_parent
from mcore_sft.runtime import megatron_core

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest


class Writer:
    """Writes what an AsyncRequest of Megatron-core holds for this rank into `folder`."""

    def __init__(self, request: AsyncRequest, results: megatron_core.Results, folder: Path) -> None:
        self._end: Connection | None = None
        self._copies: Any = None
        """What the writer reads; pinned memory that is let go of is overwritten."""
        self._results = results
        self._moved = ""
        if request.async_fn is None:  # the other ranks hold all that this one does
            return
        transforms = request.async_fn.args[0]
        self._copies = request.preload_fn()
        context = multiprocessing.get_context("fork")
        self._end, theirs = context.Pipe(duplex=False)
        shared = (theirs, transforms, self._copies, folder)
        self._process = context.Process(target=_run, args=shared)
        self._process.start()
        theirs.close()

    @property
    def is_writing(self) -> bool:
        """Whether it has neither told what it wrote nor ended."""
        return self._end is not None and not self._end.poll()

    def goes_on(self) -> bool:
        """Whether it has read or written anything since this was asked last, or has ended."""
        if not self.is_writing:
            return True
        before = self._moved
        try:
            self._moved = Path(f"/proc/{self._process.pid}/io").read_text(encoding="ascii")
        except OSError:  # where the kernel does not count it, or the process has just ended
            return True
        return self._moved != before

    def outcome(self) -> dict[str, File] | str:
        """The files that were written, by name within the folder, or what went wrong."""
        if self._end is None:
            return {}
        try:
            told = self._end.recv()
        except EOFError:
            told = None
        self._process.join()
        self._copies = None
        if told is None:
            return f"the process that writes ended with exit code {self._process.exitcode}"
        if isinstance(told, str):
            return told
        results, files = told
        self._results.put(results)
        return dict(files)


def _run(end: Connection, transforms: list[Any], buckets: list[Any], folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the run ends itself, and waits for this process
    gc.disable()  # tensors of the GPU are not this process's to free
    end_with_parent()
    try:
        results = {place: _write(transforms, bucket) for place, bucket in enumerate(buckets)}
        paths = [Path(bucket[0]) for bucket in buckets]
        end.send((results, {str(path.relative_to(folder)): digest(path) for path in paths}))
    except Exception as error:  # whatever it is, the run says it and ends
        end.send(f"{type(error).__name__}: {error}")


def _write(transforms: list[Any], bucket: Any) -> list[Any]:
    """Write one file, which `digest` makes durable.

    Megatron-core reports by queues, since it would start a process for each.
    """
    results: queue.Queue[tuple[int, Any]] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    count.put(0)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, results, count, use_fsync=False
    )
    _, written = results.get()
    if isinstance(written, Exception):
        raise written
    return list(written)
