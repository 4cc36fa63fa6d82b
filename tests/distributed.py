"""Gloo ranks inside pytest: `run_ranks(n, fn, *args)` gives what `fn` returned on each rank.

Ranks are forked, so that what the test process has imported costs them nothing. The test process
itself never joins a process group: what it left of one would hang in the ranks. Ranks on a GPU are
started anew: none can be forked from a process that has looked for one.
"""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

# Imported before the fork, and costly: every rank has them at once.
import mcore_sft.training.loop  # noqa: F401

TIMEOUT = 240
METHOD = "fork"


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` in `size` processes that torch.distributed can join."""
    context = multiprocessing.get_context(METHOD)
    port = _free_port()
    ends, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, size, port, function, args))
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        results = [_receive(end, rank) for rank, end in enumerate(ends)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return results


def _rank(
    end: Any, rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    faulthandler.dump_traceback_later(TIMEOUT - 10)
    try:
        # Plain pickle: multiprocessing's own would send tensors by shared memory of this process.
        end.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _receive(end: Any, rank: int) -> Any:
    if not end.poll(TIMEOUT):
        raise TimeoutError(f"rank {rank} gave no answer in {TIMEOUT} s")
    good, value = pickle.loads(end.recv_bytes())
    if not good:
        raise AssertionError(f"rank {rank} failed:\n{value}")
    return value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
