"""One worker process, seen from outside: it is started, asked, killed and started again.

A job may use `timeout` seconds of the worker's processor time, so that a verdict does not depend on
what else the machine does:

    out of processor time                        timeout
    crashed (SIGSEGV, SIGABRT, an exit, ...)     the answer did it: unsafe
    killed (SIGKILL, SIGTERM, ...) by others     done once more, then not_graded
    ten times `timeout` have passed              done once more, then not_graded

An answer cannot have a process killed: it is never executed, and its memory has a limit at which
allocations fail. What is killed is never joined: a successor is forked from a process that has
already imported everything, so that a hostile answer costs its time and little more.
"""

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Literal

import mcore_sft
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.grading import worker
from mcore_sft.evaluation.grading.compare.equivalence import NOT_GRADED, Verdict

_WALL = 10
"""Seconds that may pass for a second of processor time."""
_START_SECONDS = 120.0
_END_SECONDS = 5.0
"""From the end of a worker's output to its own."""
_OWN = frozenset(
    {
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT),
        *(signal.SIGSYS, signal.SIGTRAP, signal.SIGXCPU, signal.SIGXFSZ),
        *(signal.SIGALRM, signal.SIGVTALRM),
    }
)
"""What a process brings upon itself; every other signal comes from outside."""
CLOSED = "the grader was closed while it graded; make another"
_MOST_STARTS = 5
"""In a row without a worker that is ready, before the call ends: something kills each of them."""


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


class Call:
    """Whoever waits for jobs: where what is decided goes, and whether it still waits."""

    def __init__(self) -> None:
        self.decided: SimpleQueue[tuple[int, Done] | Exception] = SimpleQueue()
        self.over = False


class _Ended(Exception):
    """A worker has ended; says how."""

    def __init__(self, code: int) -> None:
        super().__init__(f"signal {-code}" if code < 0 else f"exit code {code}")
        self.code = code


class WorkerProcess:
    """A process of `worker`, started when it is needed and again where it was killed.

    One thread does everything but `interrupt`, `end` and `leave`, which others call.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._numbers = itertools.count()
        self._started = threading.Event()
        self._failed: Exception | None = None
        self._received = b""
        self._lock = threading.RLock()  # as a pool's
        """Of all below, where another thread may ask for it."""
        self._process: subprocess.Popen[bytes] | None = None
        self._fork: int | None = None
        """What does the jobs; none until it is ready."""
        self._call: Call | None = None
        """Whose job the fork has begun."""
        self._over = False

    def start(self) -> None:
        """Have a process that is ready; where none can be had, the next job says so."""
        try:
            self._make_ready()
        except Exception as error:
            self._failed = error
        self._started.set()

    def wait_until_started(self) -> None:
        """Return once `start` has; raises what it met."""
        self._started.wait()
        if self._failed:
            raise self._failed

    def do(self, call: Call, job: Job) -> Done:
        """Do a job of `call`, once more where something else ended it.

        Raises `EvaluationError` where no process can be started.
        """
        for _ in range(2):
            self._make_ready()
            done = self._attempt(call, job)
            with self._lock:
                self._call = None
            if call.over or done.verdict.outcome != NOT_GRADED:
                break
        return done

    def interrupt(self, call: Call) -> None:
        """End what is being done for `call`, which is over."""
        with self._lock:
            if self._call is call and self._fork is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._fork, signal.SIGKILL)
                self._fork = None

    def _begun(self, call: Call) -> None:
        """Note that the fork has begun a job, so that it can be interrupted, or must be."""
        with self._lock:
            self._call = call
        if call.over:
            self.interrupt(call)

    def end(self) -> None:
        """End the process and its fork, whatever they are doing, and start no other."""
        with self._lock:
            self._over = True
            process = self._process
            if process is not None:
                _kill_group(process)
        if process is not None:
            process.wait()

    def leave(self) -> None:
        """Close the pipes, which nobody here uses any more."""
        if self._process is not None:
            _close(self._process)

    def _attempt(self, call: Call, job: Job) -> Done:
        """What the process says of a job, or why it says nothing."""
        number, taken = next(self._numbers), False
        until = time.monotonic() + _WALL * self._timeout
        try:
            self._say([number, job.task, job.gold, job.prediction, self._timeout], until)
            while said := self._hear(until):
                about, what, rule, more = said
                if what == worker.READY:  # in place of the fork that had the job
                    if not taken:  # it would do this job in place of the next one
                        self._stop()
                    return _lost(-more, taken)
                if about == number and what == worker.TAKEN:
                    taken = True
                    self._begun(call)
                elif about == number:
                    return Done(verdict=Verdict(outcome=what, rule=rule), extracted=more)
        except _Ended as end:
            return _lost(end.code, taken)
        self._stop()
        return Done(verdict=Verdict(outcome=NOT_GRADED, rule="overdue"))

    def _make_ready(self) -> None:
        """Have a fork that waits for a job; raises `EvaluationError` where there is none."""
        for _ in range(_MOST_STARTS):
            try:
                if self._process is None:
                    self._begin()
                until = time.monotonic() + _START_SECONDS
                while self._fork is None or self._has_said():
                    if self._hear(until) is None:
                        self._stop()
                        raise _not_started(f"it was not ready within {_START_SECONDS:g} s")
                return
            except _Ended as end:
                reason = str(end)
                if not _is_foreign(end.code):
                    break
        raise _not_started(reason)

    def _begin(self) -> None:
        package = str(Path(mcore_sft.__file__).parent.parent)
        inherited = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
        environment = {name: os.environ[name] for name in inherited if name in os.environ}
        with self._lock:
            if self._over:
                raise EvaluationError(CLOSED)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", worker.__name__],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**environment, "PYTHONPATH": package, "PYTHONHASHSEED": "0"},
                    start_new_session=True,
                )
            except OSError as error:
                raise _not_started(str(error)) from None
        self._received = b""
        os.set_blocking(self._pipe("stdin"), False)

    def _stop(self) -> int:
        """End the process and its fork, if they have not ended; the exit code of the process."""
        with self._lock:
            process, self._process, self._fork = self._process, None, None
            assert process is not None
            _kill_group(process)
            code = process.wait()
        _close(process)
        return code

    def _say(self, what: list[Any], until: float) -> None:
        """Send a line, as much of it as is taken by then."""
        pipe, line = self._pipe("stdin"), json.dumps(what).encode() + b"\n"
        with suppress(BrokenPipeError):  # its death is seen where its answers are read
            while line and _wait(pipe, select.POLLOUT, until):
                line = line[os.write(pipe, line) :]

    def _hear(self, until: float) -> list[Any] | None:
        """The next line, or none where none comes by then; raises `_Ended`."""
        pipe = self._pipe("stdout")
        while b"\n" not in self._received:
            if not _wait(pipe, select.POLLIN, until):
                return None
            part = os.read(pipe, 65536)
            if not part:
                raise _Ended(self._exit_code())
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        said: list[Any] = json.loads(line)
        if said[1] == worker.READY:
            with self._lock:
                self._fork = said[2]
        return said

    def _has_said(self) -> bool:
        """Whether `_hear` need not wait."""
        return b"\n" in self._received or _wait(self._pipe("stdout"), select.POLLIN, 0.0)

    def _exit_code(self) -> int:
        """How the process ended by itself, whose output has ended."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        return self._stop()

    def _pipe(self, name: Literal["stdin", "stdout"]) -> int:
        """A file descriptor, which only the thread of this worker may use and close."""
        stream: IO[bytes] = getattr(self._process, name)
        return stream.fileno()


def _wait(pipe: int, event: int, until: float) -> bool:
    """Whether `pipe` is ready by then; it is asked once at least."""
    poll = select.poll()  # select itself takes no descriptor above 1,023
    poll.register(pipe, event)
    return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))


def _lost(code: int, taken: bool) -> Done:
    """The verdict on a job whose process ended with this exit code; a negative one is a signal."""
    if taken and -code == worker.OVERTIME:
        return Done(verdict=Verdict(outcome="timeout", rule="deadline"))
    if taken and not _is_foreign(code):
        return Done(verdict=Verdict(outcome="unsafe", rule="worker_died"))
    return Done(verdict=Verdict(outcome=NOT_GRADED, rule="killed"))


def _is_foreign(code: int) -> bool:
    """Whether a process with this exit code was ended by another."""
    return code < 0 and -code not in _OWN


def _not_started(reason: str) -> EvaluationError:
    return EvaluationError(
        f"a grading worker did not start ({reason}); run "
        f"`{sys.executable} -P -m {worker.__name__} < /dev/null` to see why"
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and its fork, which are a process group, unless that is known to be gone."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
