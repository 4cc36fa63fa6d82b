"""Processes that judge and may be killed: jobs in, verdicts out.

    calls, in any thread  ->  one queue  ->  a thread for each worker process  ->  each call's queue

Only its own thread speaks to a worker (`worker_process`), and each job has a number that the worker
repeats, so that no call gets what another asked.
"""

import math
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any, Self

from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.grading.worker_process import CLOSED, Call, Done, Job, WorkerProcess

TIMEOUT = 10.0
_LONGEST_TIMEOUT = 86_400


class Pool:
    """Up to `processes` workers that start when needed; `timeout` is processor seconds a job.

    Threads may share it. A forked process gets workers of its own, and so does one that a pickled
    pool is sent to. Raises `EvaluationError` for a timeout or a number that means nothing.
    """

    def __init__(self, *, timeout: float = TIMEOUT, processes: int = 0) -> None:
        if not _is_number(timeout) or not 0 < timeout < _LONGEST_TIMEOUT:
            raise EvaluationError(
                f"timeout: got {timeout!r}, expected seconds, above 0 and below {_LONGEST_TIMEOUT}"
            )
        if type(processes) is not int or processes < 0:
            raise EvaluationError(f"processes: got {processes!r}, expected a number, 0 or more")
        self._timeout, self._processes = timeout, processes
        self._crews: dict[int, _Crew] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Pool, timeout=self._timeout, processes=self._processes), ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, whatever they are doing; a later call starts others."""
        if crew := self._crews.pop(os.getpid(), None):
            crew.end()

    def start(self) -> None:
        """Start all workers now and wait until each is ready; raises `EvaluationError`."""
        self._crew().start()

    def run(self, jobs: Iterable[tuple[int, Job]]) -> Iterator[tuple[int, Done]]:
        """Do all (number, job); yields (number, done) as they are decided.

        What is left undone is dropped where the generator is closed or an exception passes through
        it. Raises `EvaluationError` where no worker can be started.
        """
        crew, call = self._crew(), Call()
        try:
            for _ in range(crew.take(call, list(jobs))):
                found = call.decided.get()
                if isinstance(found, Exception):
                    raise found
                yield found
                if crew.process != os.getpid():
                    raise EvaluationError(
                        "this process was forked from the one that began this call, and gets no "
                        "verdict of it; begin another here"
                    )
        finally:
            crew.drop(call)

    def _crew(self) -> "_Crew":
        """The workers of this process: those of the process that it was forked from are not its."""
        process = os.getpid()
        if process not in self._crews:
            for inherited in list(self._crews.values()):
                inherited.leave()
            new = _Crew(self._processes or min(4, os.cpu_count() or 1), self._timeout)
            if self._crews.setdefault(process, new) is new:
                weakref.finalize(self, new.end)
        return self._crews[process]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


class _Crew:
    """All workers that one process has of a pool, each with its thread."""

    def __init__(self, size: int, timeout: float) -> None:
        self.process = os.getpid()
        self.workers: list[WorkerProcess] = []
        self._size, self._timeout = size, timeout
        self._waiting: SimpleQueue[tuple[Call, int, Job] | None] = SimpleQueue()
        self._lock = threading.RLock()  # a pool that is forgotten may end in any line
        self._jobs = 0
        """Taken and not yet done."""
        self._over = False

    def take(self, call: Call, jobs: list[tuple[int, Job]]) -> int:
        """Have `jobs` done, on as many workers as they need; how many they are."""
        with self._lock:
            self._jobs += len(jobs)
            self._hire(min(self._size, self._jobs))
            for number, job in jobs:
                self._waiting.put((call, number, job))
        return len(jobs)

    def start(self) -> None:
        """Have all workers, each of them ready."""
        with self._lock:
            self._hire(self._size)
        for each in self.workers:
            each.wait_until_started()

    def drop(self, call: Call) -> None:
        """End what is done for `call`, and begin nothing more for it."""
        call.over = True
        if self.process == os.getpid():
            for each in self.workers:
                each.interrupt(call)

    def end(self) -> None:
        """End all workers, and with them their threads; what is being done is done no more."""
        if self.process != os.getpid():
            return
        with self._lock:
            self._over = True
            for _ in self.workers:
                self._waiting.put(None)
        for each in self.workers:
            each.end()

    def leave(self) -> None:
        """Let go of the workers of the process that this one was forked from."""
        for each in self.workers:
            each.leave()
        self.workers.clear()

    def _hire(self, size: int) -> None:
        if self._over:
            raise EvaluationError(CLOSED)
        while len(self.workers) < size:
            new = WorkerProcess(self._timeout)
            # a daemon: what nobody waits for does not hold up the end of the program
            threading.Thread(target=self._serve, args=(new,), daemon=True).start()
            self.workers.append(new)

    def _serve(self, own: WorkerProcess) -> None:
        """Do one job after the other on a worker, until the crew ends."""
        own.start()
        for call, number, job in iter(self._waiting.get, None):
            try:
                if not call.over:
                    call.decided.put((number, own.do(call, job)))
            except Exception as error:  # whatever it is, the thread that waits raises it
                call.decided.put(error)
            with self._lock:
                self._jobs -= 1
        own.end()
        own.leave()
