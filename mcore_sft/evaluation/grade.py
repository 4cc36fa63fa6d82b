"""Gold answers and responses in, verdicts out, each under a deadline that holds.

    response  ->  extract  ->  exact rules here  ->  (where those are silent) a worker process

Model output is hostile: a worker that overruns its deadline is killed and replaced, never joined,
and no answer can cost more than the deadline or end the run.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import mcore_sft
from mcore_sft.evaluation import worker
from mcore_sft.evaluation.equivalence import Outcome, Verdict, judge_exactly
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.extract import Extraction, extract

_START_SECONDS = 120.0
# Longer texts go to a worker even for the exact rules, so that nothing here can take long.
_SHORT = 400


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What one grading compares: the right answer and the answer given, already extracted."""

    gold: str
    prediction: str


@dataclass(frozen=True, kw_only=True)
class Graded:
    """One response with what was found in it and what was decided."""

    extraction: Extraction
    verdict: Verdict


class Grader:
    """Grades under `timeout` seconds each, on up to `processes` workers that start when needed."""

    def __init__(self, *, timeout: float, processes: int = 0) -> None:
        self._timeout = timeout
        self._size = processes or min(4, os.cpu_count() or 1)
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._workers:
            process.kill()
        self._workers.clear()

    def grade(self, gold: str, response: str, *, truncated: bool = False) -> Graded:
        """Extract the answer from one `response` and grade it."""
        return dict(self.grade_all([(gold, response, truncated)]))[0]

    def grade_all(self, rows: Iterable[tuple[str, str, bool]]) -> Iterator[tuple[int, Graded]]:
        """Grade (gold, response, truncated) rows; yields (position, graded) as they are decided."""
        extractions: dict[int, tuple[int, Extraction]] = {}
        pairs: list[Pair] = []
        for position, (gold, response, truncated) in enumerate(rows):
            found = extract(response, truncated=truncated)
            if found.answer is None:
                verdict = Verdict(outcome="no_answer", rule=str(found.missing))
                yield position, Graded(extraction=found, verdict=verdict)
            else:
                extractions[len(pairs)] = position, found
                pairs.append(Pair(gold=gold, prediction=found.answer))
        for index, verdict in self.judge_all(pairs):
            position, found = extractions[index]
            yield position, Graded(extraction=found, verdict=verdict)

    def judge_all(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, Verdict]]:
        """Judge answers that are already extracted; yields (position, verdict) as decided."""
        hard: deque[tuple[int, Pair]] = deque()
        for position, pair in enumerate(pairs):
            verdict = _judge_here(pair)
            if verdict:
                yield position, verdict
            else:
                hard.append((position, pair))
        yield from self._judge_in_workers(hard)

    def _judge_in_workers(self, hard: deque[tuple[int, Pair]]) -> Iterator[tuple[int, Verdict]]:
        while hard or any(process.busy for process in self._workers):
            busy = sum(process.busy for process in self._workers)
            while len(self._workers) < min(self._size, len(hard) + busy):
                self._workers.append(_Worker())
            for process in self._workers:
                if hard and process.idle:
                    process.send(*hard.popleft(), self._timeout)
            self._wait()
            decided = [process.collect() for process in self._workers]
            self._workers = [process for process in self._workers if not process.dead]
            yield from (verdict for verdict in decided if verdict is not None)

    def _wait(self) -> None:
        """Sleep until a worker has something to say or the next deadline is over."""
        with selectors.DefaultSelector() as selector:
            for process in self._workers:
                selector.register(process.output, selectors.EVENT_READ)
            deadline = min(process.deadline for process in self._workers)
            selector.select(max(0.0, deadline - time.monotonic()))


def _judge_here(pair: Pair) -> Verdict | None:
    if len(pair.gold) + len(pair.prediction) <= _SHORT:
        return judge_exactly(pair.gold, pair.prediction)
    # an overlong answer does not travel to be refused
    if len(pair.prediction) > 100_000:
        return Verdict(outcome="unsafe", rule="length")
    return None


class _Worker:
    """One process of `worker`, seen from outside: starting, idle, busy or dead."""

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
        self._position: int | None = None
        self._ready = False
        self.dead = False
        self.deadline = time.monotonic() + _START_SECONDS

    @property
    def output(self) -> int:
        """File descriptor of what the worker says."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def busy(self) -> bool:
        """Whether an answer is being judged."""
        return self._position is not None

    @property
    def idle(self) -> bool:
        """Whether an answer can be sent."""
        return self._ready and not self.busy and not self.dead

    def send(self, position: int, pair: Pair, timeout: float) -> None:
        """Start judging one pair, which is to end within `timeout` seconds."""
        assert self._process.stdin is not None
        self._position = position
        self.deadline = time.monotonic() + timeout
        line = json.dumps([pair.gold, pair.prediction]) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            self.deadline = 0.0

    def collect(self) -> tuple[int, Verdict] | None:
        """The verdict if there is one by now, also when that is `timeout` or an early death."""
        line = self._line()
        if line is not None and not self._ready:
            self._ready, self.deadline = True, float("inf")
            return None
        if line is not None:
            outcome, rule = json.loads(line)
            return self._finish(outcome, rule)
        if self._process.poll() is not None:
            return self._die("unsafe", "worker_died")
        if time.monotonic() >= self.deadline:
            return self._die("timeout", "deadline")
        return None

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def _finish(self, outcome: Outcome, rule: str) -> tuple[int, Verdict]:
        assert self._position is not None
        position, self._position, self.deadline = self._position, None, float("inf")
        return position, Verdict(outcome=outcome, rule=rule)

    def _die(self, outcome: Outcome, rule: str) -> tuple[int, Verdict] | None:
        self.kill()
        self.dead = True
        if not self._ready:
            raise EvaluationError(
                "the grading worker did not start; run "
                f"`{sys.executable} -P -m {worker.__name__} < /dev/null` to see why"
            )
        return self._finish(outcome, rule) if self.busy else None

    def _line(self) -> bytes | None:
        with suppress(BlockingIOError):
            self._received += os.read(self.output, 65536)
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        return line
