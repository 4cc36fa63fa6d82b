"""Blocks in, encoded blocks out, in order: the processes that tokenize, and how they end.

They end with the process that started them, however that ends. Ctrl-C, SIGTERM and SIGHUP are for
that one alone: a worker that dies while it answers leaves half an answer, for whose end the pool
then waits.
"""

import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import active_children, get_context

from mcore_sft.command import ENDING, end_with_parent
from mcore_sft.data.blocks import Block
from mcore_sft.data.encode import Encoded, Encoder, Recipe
from mcore_sft.data.errors import DataError


def encode_all(
    blocks: Iterable[tuple[int, Block]], recipe: Recipe, *, workers: int
) -> Generator[Encoded, None, None]:
    """Encode blocks (source, block) in `workers` processes, in order; few are in memory.

    One worker is this process. To be closed by whoever does not take all.
    """
    if workers == 1:
        encoder = Encoder(recipe)
        yield from (encoder.encode(block, source) for source, block in blocks)
        return
    others = active_children()
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start, initargs=(recipe,)
    )
    try:
        waiting: deque[Future[Encoded]] = deque()
        for source, block in blocks:
            with _signals_held():  # a process may be started here
                waiting.append(pool.submit(_encode, block, source))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        for process in active_children():  # the pool only sends them SIGTERM
            if process not in others:
                process.kill()
        raise DataError(
            "a process that tokenizes was ended from outside, perhaps for want of memory; "
            f"try fewer (data.workers={max(1, workers // 2)})"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


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


_make_encoder: Callable[[], Encoder]  # of a worker process: one encoder, whatever the blocks


def _start(recipe: Recipe) -> None:
    global _make_encoder
    end_with_parent()
    # Made with the first block: an error there is told, one in here only ends the process.
    _make_encoder = cache(partial(Encoder, recipe))


def _encode(block: Block, source: int) -> Encoded:
    return _make_encoder().encode(block, source)
