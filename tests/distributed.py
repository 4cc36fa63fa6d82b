"""Gloo ranks inside pytest: `run_ranks(n, fn, *args)` gives what `fn` returned on each rank.

Ranks are forked, so that what the test process has imported costs them nothing. The test process
itself never joins a process group: what it left of one would hang in the ranks. None can be forked
from a process that has looked for a GPU: there ranks are started anew, but one alone runs in the
test process, since it takes a quarter of a minute until a new one has a GPU and all libraries.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any
from unittest import mock

import torch

# Imported before the fork, and costly: every rank has them at once.
import mcore_sft.training.loop  # noqa: F401

TIMEOUT = 240
METHOD = "fork"
"""Or `spawn`, with which one rank alone runs in the test process."""


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` in `size` processes that torch.distributed can join."""
    port = _free_port()
    if METHOD == "spawn" and size == 1:
        return [_here(port, function, args)]
    context = multiprocessing.get_context(METHOD)
    ends, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, size, port, function, args))
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        answers = _answers(ends, processes)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [answers[rank] for rank in range(size)]


def _rank(
    end: Any, rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(_place(rank, size, port))
    faulthandler.dump_traceback_later(TIMEOUT - 10, file=2)  # pytest may hold sys.stderr
    try:
        # Plain pickle: multiprocessing's own would send tensors by shared memory of this process.
        end.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _place(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would say in the environment."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _here(port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What `function(*args)` gives in this process, which is left as it was found."""
    with mock.patch.dict(os.environ, _place(0, 1, port)):
        try:
            return pickle.loads(pickle.dumps(function(*args)))
        finally:
            torch.use_deterministic_algorithms(False)
            if engine := sys.modules.get("transformer_engine.pytorch.quantization"):
                engine.FP8GlobalStateManager.reset()
            gc.collect()
            torch.cuda.empty_cache()


def _answers(ends: list[Any], processes: list[Any]) -> dict[int, Any]:
    """What each rank gives; the first that fails or dies ends the wait for those that need it."""
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT
    while len(answers) < len(ends):
        silent = [end for rank, end in enumerate(ends) if rank not in answers]
        spoken = wait(silent, deadline - time.monotonic())
        if not spoken:
            raise TimeoutError(f"{len(silent)} of {len(ends)} ranks: no answer in {TIMEOUT} s")
        for end in spoken:
            rank = ends.index(end)
            try:
                good, answers[rank] = pickle.loads(end.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                code = processes[rank].exitcode
                raise AssertionError(f"rank {rank} died, exit code {code}") from None
            if not good:
                raise AssertionError(f"rank {rank} failed:\n{answers[rank]}")
    return answers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
