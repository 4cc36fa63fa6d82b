"""Processes that judge and may be killed: tasks in, verdicts out, each under a deadline that holds.

A worker that overruns its deadline is killed, never joined; its successor is forked from a process
that has already imported everything, so that a hostile answer costs its deadline and little more.

    crashed (SIGSEGV, SIGABRT, an exit, ...)      the answer did it: unsafe
    killed (SIGKILL, SIGTERM, ...) by others      done once more, then not_graded

An answer cannot have a process killed: it is never executed, and its memory has a limit at which
allocations fail.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import mcore_sft
from mcore_sft.evaluation import worker
from mcore_sft.evaluation.equivalence import NOT_GRADED, Outcome, Verdict
from mcore_sft.evaluation.errors import EvaluationError

_START_SECONDS = 120.0
_OWN = frozenset(
    {
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT),
        *(signal.SIGSYS, signal.SIGTRAP, signal.SIGXCPU, signal.SIGXFSZ),
        *(signal.SIGPROF, signal.SIGALRM, signal.SIGVTALRM),
    }
)
"""What a process brings upon itself; every other signal comes from outside."""
_MOST_STARTS = 5
"""In a row without a worker that is ready, before the run ends: something kills each of them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One task for a worker."""

    task: worker.Task
    gold: str
    prediction: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a worker said of one job, or why it said nothing."""

    verdict: Verdict
    extracted: str | None = None


class Pool:
    """Up to `processes` workers, started when they are needed; `timeout` is seconds a job."""

    def __init__(self, *, timeout: float, processes: int = 0) -> None:
        self._timeout = timeout
        self._size = processes or min(4, os.cpu_count() or 1)
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for process in self._workers:
            process.end()
        self._workers.clear()

    def start(self) -> None:
        """Start all workers now and wait until each is ready."""
        while len(self._workers) < self._size or not all(one.idle for one in self._workers):
            self._grow(self._size)
            self._wait()
            self._collect()

    def run(self, jobs: Iterable[tuple[int, Job]]) -> Iterator[tuple[int, Done]]:
        """Do all (number, job); yields (number, done) as they are decided.

        Raises `EvaluationError` where no worker can be started.
        """
        waiting = deque(jobs)
        sent: dict[int, Job] = {}
        again: set[int] = set()
        while waiting or any(process.busy for process in self._workers):
            busy = sum(process.busy for process in self._workers)
            self._grow(min(self._size, len(waiting) + busy))
            for process in self._workers:
                if waiting and process.idle:
                    number, job = waiting.popleft()
                    sent[number] = job
                    process.send(number, job, self._timeout)
            self._wait()
            for number, done in self._collect():
                job = sent.pop(number)
                if done.verdict.outcome == NOT_GRADED and number not in again:
                    again.add(number)
                    waiting.append((number, job))
                else:
                    yield number, done

    def _grow(self, size: int) -> None:
        while len(self._workers) < size:
            self._workers.append(_Worker())

    def _collect(self) -> list[tuple[int, Done]]:
        """What has been decided; workers that have ended are left out from then on."""
        decided = [done for process in self._workers for done in process.collect()]
        if any(process.served for process in self._workers):
            self._failed_starts = 0
        for process in [one for one in self._workers if one.ended]:
            self._workers.remove(process)
            process.end()
            self._failed_starts += not process.served
            if self._failed_starts >= _MOST_STARTS or not (process.served or process.killed):
                raise EvaluationError(
                    f"a grading worker did not start ({process.ended}); run "
                    f"`{sys.executable} -P -m {worker.__name__} < /dev/null` to see why"
                )
        return decided

    def _wait(self) -> None:
        """Sleep until a worker has something to say or the next deadline is over."""
        with selectors.DefaultSelector() as selector:
            for process in self._workers:
                selector.register(process.output, selectors.EVENT_READ)
            deadline = min((process.deadline for process in self._workers), default=0.0)
            selector.select(max(0.0, deadline - time.monotonic()))


class _Worker:
    """One process of `worker` and its present fork, seen from outside: starting, idle or busy."""

    def __init__(self) -> None:
        package = str(Path(mcore_sft.__file__).parent.parent)
        inherited = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
        environment = {name: os.environ[name] for name in inherited if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "PYTHONPATH": package, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._received = b""
        self._number: int | None = None
        self._fork: int | None = None
        self._taken = False
        self.served = False
        """Whether it has ever been ready."""
        self.killed = False
        """Whether it, or its fork while that was busy, has been killed from outside."""
        self.ended = ""
        """Why it serves no more; empty while it does."""
        self.deadline = time.monotonic() + _START_SECONDS

    @property
    def output(self) -> int:
        """File descriptor of what the worker says."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def busy(self) -> bool:
        """Whether a job is being done."""
        return self._number is not None

    @property
    def idle(self) -> bool:
        """Whether a job can be sent."""
        return self._fork is not None and not self.busy

    def send(self, number: int, job: Job, timeout: float) -> None:
        """Start one job, which is to end within `timeout` seconds."""
        assert self._process.stdin is not None
        self._number, self._taken = number, False
        self.deadline = time.monotonic() + timeout
        line = json.dumps([job.task, job.gold, job.prediction, timeout]) + "\n"
        with suppress(BrokenPipeError):  # its death is seen where its answers are read
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def collect(self) -> Iterator[tuple[int, Done]]:
        """What has been decided by now, also when that is `timeout` or an early death."""
        for line in self._lines():
            outcome, rule, extracted = json.loads(line)
            if outcome == worker.READY:
                yield from self._next_fork(int(rule), extracted)
            elif outcome == worker.TAKEN:
                self._taken = True
            elif self.busy:
                yield self._finish(outcome, rule, extracted)
        if self.ended:
            return
        if (code := self._process.poll()) is not None:
            self._note_end(code)
            if self.busy:
                yield self._lost()
        elif time.monotonic() >= self.deadline:
            yield from self._overrun()

    def _next_fork(self, fork: int, signal_before: str | None) -> Iterator[tuple[int, Done]]:
        if self.busy:  # the fork that was to do the job is dead
            assert signal_before is not None
            self._note_end(-int(signal_before))
            yield self._lost()
            if not self._taken:  # this one would do it, in place of the next job
                return
            self.ended, self.killed = "", False
        self._fork, self.served, self.deadline = fork, True, float("inf")

    def _overrun(self) -> Iterator[tuple[int, Done]]:
        if self._fork is None:
            self.ended = f"it was not ready within {_START_SECONDS:g} s"
            return
        with suppress(ProcessLookupError):
            os.kill(self._fork, signal.SIGKILL)
        yield self._finish("timeout", "deadline")
        self._fork, self.deadline = None, time.monotonic() + _START_SECONDS

    def _note_end(self, code: int) -> None:
        """Of it or its fork; a negative code is a signal."""
        self.killed = code < 0 and -code not in _OWN
        self.ended = f"signal {-code}" if code < 0 else f"exit code {code}"

    def _lost(self) -> tuple[int, Done]:
        """The job of a fork that died while it was busy."""
        if self.killed:
            return self._finish(NOT_GRADED, "killed")
        return self._finish("unsafe", "worker_died")

    def end(self) -> None:
        """End the process and its fork, whatever they are doing."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def _finish(
        self, outcome: Outcome, rule: str, extracted: str | None = None
    ) -> tuple[int, Done]:
        assert self._number is not None
        number, self._number, self.deadline = self._number, None, float("inf")
        return number, Done(verdict=Verdict(outcome=outcome, rule=rule), extracted=extracted)

    def _lines(self) -> list[bytes]:
        with suppress(BlockingIOError):
            self._received += os.read(self.output, 65536)
        *lines, self._received = self._received.split(b"\n")
        return lines
