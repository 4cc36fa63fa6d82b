"""Tasks in, results out, in order: the processes that do them, and how they end.

    this process -> foreman: makes what all need, once -> workers: forked, they share its memory
    this process <- a pipe for each worker, and a thread that attends to it -> tasks, results

They end with the process that started them, however that ends. Ctrl-C, SIGTERM and SIGHUP are for
that one alone: a worker that dies while it answers leaves half an answer.
"""

import gc
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cached_property
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self, TypeVar

from mcore_sft.command import ENDING, end_with_parent
from mcore_sft.data.errors import WorkerEnded

Result = TypeVar("Result")


def no_tool() -> None:
    """For tasks that need none."""


class Workers:
    """`count` processes that do tasks; one is this process itself.

    A task is a function and its arguments. The first of them is what `make` makes, once for all: an
    error there is told by the first task.
    """

    def __init__(self, count: int, make: Callable[[], Any]) -> None:
        self.count = count
        self._make = make
        self._crew: _Crew | None = None

    def __enter__(self) -> Self:
        if self.count > 1:
            self._crew = _Crew(self.count, self._make)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._crew is not None:
            self._crew.end(at_once=error is not None)
            self._crew = None

    @cached_property
    def _tool(self) -> Any:
        return self._make()

    def submit(self, do: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have a task done; the oldest that waits is begun first."""
        if self._crew is not None:
            return self._crew.submit(do, arguments)
        done: Future[Result] = Future()
        done.set_result(do(self._tool, *arguments))
        return done

    def each(self, do: Callable[..., Result], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """What `do` gives for the arguments of each task, in order; few tasks wait at a time."""
        waiting: deque[Future[Result]] = deque()
        for arguments in tasks:
            waiting.append(self.submit(do, *arguments))
            if len(waiting) > self.ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    @property
    def ahead(self) -> int:
        """How many tasks should wait, so that no process does."""
        return 2 * self.count if self._crew is not None else 0


class _Crew:
    """A foreman, its workers, and the threads that attend to them."""

    def __init__(self, count: int, make: Callable[[], Any]) -> None:
        self._count = count
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Any] | None] = queue.SimpleQueue()
        self._pids: set[int] = set()
        self._broken = False
        context = get_context("spawn")
        pipes = [context.Pipe() for _ in range(count)]
        theirs = [end for _, end in pipes]
        self._foreman = context.Process(target=_be_foreman, args=(make, theirs))
        resource_tracker.ensure_running()  # whose start lets the signals through that are held
        with _signals_held():
            self._foreman.start()
        for end in theirs:
            end.close()
        self._threads = [
            threading.Thread(target=self._attend, args=(end,), daemon=True) for end, _ in pipes
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, do: Callable[..., Result], arguments: tuple[Any, ...]) -> Future[Result]:
        if self._broken:
            raise self._ended()
        future: Future[Result] = Future()
        self._tasks.put((future, (do, arguments)))
        return future

    def end(self, *, at_once: bool) -> None:
        """Let what was submitted be done, unless `at_once`, and wait for all processes to end."""
        if at_once:
            self._drain()
            if not self._pids:
                self._foreman.kill()
            for pid in self._pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._foreman.join()

    def _attend(self, worker: Connection) -> None:
        """Give tasks to a worker, one by one."""
        future: Future[Any] | None = None
        try:
            with worker:
                self._pids.add(pid := worker.recv())
                while (task := self._tasks.get()) is not None:
                    future, asked = task
                    worker.send(asked)
                    result, error = worker.recv()
                    if error is None:
                        future.set_result(result)
                    else:
                        future.set_exception(error)
                    future = None
                self._tasks.put(None)  # for the next one
                self._pids.discard(pid)
        except Exception as error:  # its end, or something that cannot be sent
            self._broken = True
            told = self._ended() if isinstance(error, EOFError | OSError) else error
            if future is not None:
                future.set_exception(told)
            self._drain()

    def _drain(self) -> None:
        """Take back what waits."""
        with suppress(queue.Empty):
            while (task := self._tasks.get_nowait()) is not None:
                task[0].set_exception(self._ended())
            self._tasks.put(None)

    def _ended(self) -> WorkerEnded:
        return WorkerEnded(
            "a process that works on the data was ended from outside, perhaps for want of memory; "
            f"try fewer (data.workers={max(1, self._count // 2)})"
        )


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back that would leave a process half started, which then prints a traceback.

    One that is started meanwhile never hears them: it inherits that they are blocked.
    """
    if threading.current_thread() is not threading.main_thread():  # no signal interrupts others
        yield
        return
    came: list[int] = []
    held_back = (signal.SIGINT, *ENDING)
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in held_back}
    signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held_back)
        for number, handler in before.items():
            signal.signal(number, handler)
        for held in came:
            signal.raise_signal(held)


def _be_foreman(make: Callable[[], Any], ends: Sequence[Connection]) -> None:
    """Make what the workers need, fork one for each of `ends`, and wait for them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    tool, error = None, None
    try:
        tool = make()
    except Exception as told:
        error = told
    gc.collect()
    gc.freeze()  # so that no collection writes to what is shared
    for end in ends:
        if os.fork() == 0:
            for other in ends:
                if other is not end:
                    other.close()
            _work(end, tool, error)
    for end in ends:
        end.close()
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _work(end: Connection, tool: Any, error: Exception | None) -> None:
    """Do tasks until nobody has any more, and end."""
    try:
        end_with_parent()
        end.send(os.getpid())
        while True:
            do, arguments = end.recv()
            end.send((None, error) if error else _outcome(do, tool, arguments))
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)


def _outcome(do: Callable[..., Any], tool: Any, arguments: tuple[Any, ...]) -> Any:
    try:
        return do(tool, *arguments), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        return None, error
