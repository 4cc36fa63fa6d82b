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

LAST_LINES, LONGEST_LINE = 20, 500
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Crash(Exception):
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
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "120"}
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
            _end(process)


def _end_with_parent() -> None:
    """A night that is killed ends its command, and torchrun its ranks: two would write one run."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun's ranks have process groups of their own: only by their parents are they found."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(started, timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what a command that died has left in its group
    process.wait()


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
