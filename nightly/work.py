"""Commands run as their users run them, each with a log, none left behind."""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from mcore_sft.base.errors import UserError

LAST_LINES, LONGEST_LINE = 20, 500
MARK = "MCORE_SFT_NIGHTLY"
"""Variable in the environment of every command, and so of all that it starts: where it is run."""
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Crash(UserError):
    """A command ended badly; the message has its name and its last lines."""


def run(command: Sequence[str], log: Path, *, threads: int, until: float) -> None:
    """Run `command` to its end; raises `Crash` if that is not well, or not by time `until`."""
    with _started(command, log, threads) as process:
        try:
            code = process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Crash(f"{_told(command, log)}\nno end within the time of the tier") from None
    if code:
        raise Crash(f"{_told(command, log)}\nexit code {code}")


def run_and_kill(
    command: Sequence[str], log: Path, when: Callable[[], bool], *, threads: int, until: float
) -> None:
    """Kill `command` and all that it has started as soon as `when()`; raises `Crash` likewise."""
    with _started(command, log, threads) as process:
        while not when():
            if process.poll() is not None:
                raise Crash(f"{_told(command, log)}\nended by itself, exit code {process.poll()}")
            if time.monotonic() > until:
                raise Crash(f"{_told(command, log)}\nno end within the time of the tier")
            time.sleep(0.02)


@contextlib.contextmanager
def _started(command: Sequence[str], log: Path, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed on the way out, with all that it has started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    where = str(log.parent.absolute())
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "120", MARK: where}
    with log.open("ab") as out:
        out.write(f"$ {shlex.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            [program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            yield process
        finally:
            _end(process, log)


def _end_with_parent() -> None:
    """A night that is killed ends its command, and torchrun its ranks: two would write one run."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes], log: Path) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _kill(started)
    end_all_of(log.parent)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what has cleared its environment
    process.wait()


def end_all_of(folder: Path) -> None:
    """Kill what commands in `folder`, and below it, have started and left.

    torchrun's ranks have process groups of their own and, when it was killed, no parent that would
    lead to them: only their environment tells whose they are.
    """
    until = time.monotonic() + 10
    while (left := list(_left_of(folder.absolute()))) and time.monotonic() < until:
        _kill(left)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _left_of(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            where = process.environ().get(MARK)
            if where and Path(where).is_relative_to(folder) and process.pid != os.getpid():
                yield process


def program(name: str) -> str:
    """`python` and `torchrun` are those of this environment."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _told(command: Sequence[str], log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_LINES * 4 * LONGEST_LINE))
        last = file.read().decode("utf-8", "replace")
    return f"{shlex.join(command[:2])}, {log}:\n{tail(last)}"


def tail(text: str, count: int = LAST_LINES) -> str:
    """The last lines, none of them longer than can be read, in characters that can be written."""
    lines = text.encode("utf-8", "backslashreplace").decode().splitlines()[-count:]
    return "\n".join(x if len(x) <= LONGEST_LINE else f"{x[:LONGEST_LINE]} ..." for x in lines)
