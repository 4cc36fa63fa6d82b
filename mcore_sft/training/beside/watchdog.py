"""A rank that hangs: the stacks of all ranks on disk, and the end of the run.

RUN/hang/BEGINNING/rank_N.txt    what rank N was doing; the first of them makes all write theirs

A rank that cannot even do that, because it was stopped or something in it keeps Python's lock for
ever, is made to by a signal from one of the same machine: faulthandler needs no lock.
"""

import contextlib
import faulthandler
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Self

from mcore_sft.base.terminal import say_at_once
from mcore_sft.runtime.peers import Peers
from mcore_sft.training.beside.callback import Callback

SLOW = 1.5
"""Loading and saving may stand still so much longer than a step."""
HUNG = 124
"""Exit code of a run that hung, as that of timeout(1)."""
_ROUNDS = 10
"""So often is looked for the stacks of all ranks; halfway, those that wrote none are made to."""
_SPEAK = signal.SIGUSR2


class Watchdog(Callback):
    """A thread that looks whether this rank still goes on, or another does not.

    It needs no process group and no rank but its own, since any of them may be what hangs.
    """

    def __init__(self, folder: Path, seconds: float | None, peers: Peers) -> None:
        """`seconds` without a sign of life are a hang in a step; None is never."""
        self._run = folder.name[-100:]
        self._folder = folder / "hang"
        self._seconds = seconds or math.inf
        self._peers = peers
        self._rank = peers.launch.rank
        self._limit = SLOW * self._seconds
        self._beat = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def before_step(self, step: int) -> None:
        """A step begins."""
        self.at(f"in step {step}")

    def beat(self) -> None:
        """This rank goes on."""
        self._beat = time.monotonic()

    def at(self, doing: str, *, slow: bool = False) -> None:
        """This rank begins what is called `doing` in sentences; what is `slow` may take longer."""
        self._peers.doing = doing
        self._limit = self._seconds * (SLOW if slow else 1.0)
        self.beat()

    def on_save(self, path: Path) -> None:
        """A new start would continue from there."""
        self._peers.resumes = path.name

    def __enter__(self) -> Self:
        self._memory = os.memfd_create(self._name(self._rank))
        mine = f"/proc/{os.getpid()}/fd/{self._memory}"
        found = self._peers.exchange(
            mine, lambda places: {"began": time.strftime("%Y%m%d-%H%M%S"), "places": places}
        )
        self._folder, self._places = self._folder / str(found["began"]), found["places"]
        faulthandler.register(_SPEAK, file=self._memory)
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(_SPEAK)
        os.close(self._memory)

    def _watch(self) -> None:
        pause = min(5.0, self._seconds / 4)
        looked = time.monotonic()
        while not self._ended.wait(pause):
            late = time.monotonic() - looked - pause
            looked += late + pause
            if late > pause:  # this process was stopped as a whole, as Slurm suspends a job
                self._beat += late
            silent = time.monotonic() - self._beat
            hung = self._first_to_speak()
            if silent > self._limit or hung is not None:
                self._peers.leave()  # each rank ends by itself from here on
                missing = self._write_stacks()
                if hung is None or self._peers.is_first_here:
                    self._tell(silent, hung, missing)
                os._exit(HUNG)

    def _first_to_speak(self) -> int | None:
        """The rank that wrote its stacks before all others; None if none has."""
        with contextlib.suppress(OSError):
            files = sorted(self._folder.glob("rank_*.txt"), key=lambda file: file.stat().st_mtime)
            return int(files[0].stem.removeprefix("rank_")) if files else None
        return None

    def _write_stacks(self) -> list[int] | None:
        """Write what this rank does and wait for the others; whose is missing, None if it fails."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._file(self._rank).open("w") as file:
                faulthandler.dump_traceback(file)
            return self._await_others()
        return None

    def _await_others(self) -> list[int]:
        """The ranks whose stacks are not there in the end."""
        missing: list[int] = []
        for turn in range(_ROUNDS):
            ranks = range(self._peers.launch.size)
            missing = [rank for rank in ranks if not self._file(rank).exists()]
            if not missing:
                break
            for rank in missing if turn >= _ROUNDS // 2 else []:
                self._make_speak(rank)
            time.sleep(min(1.0, self._seconds / 8))
        return missing

    def _make_speak(self, rank: int) -> None:
        """Ask a rank that is silent for its stacks, and keep them as soon as they are there."""
        place = Path(self._places[rank])
        # Of another machine or container, this is no process or another one.
        with contextlib.suppress(OSError):
            if self._name(rank) not in os.readlink(place):
                return
            if stacks := place.read_bytes():
                self._file(rank).write_bytes(stacks)
                return
            for number in (_SPEAK, signal.SIGCONT):
                os.kill(int(place.parts[2]), number)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.txt"

    def _name(self, rank: int) -> str:
        return f"stacks of {self._run} rank {rank}."

    def _tell(self, silent: float, hung: int | None, missing: list[int] | None) -> None:
        """Say which rank hangs, this one or `hung`, where the stacks lie, and whose are missing."""
        if missing is None:
            told = f"its stack could not be written to {self._folder}"
        else:
            told = f"what each rank was doing stands in {self._folder}"
            if missing:
                told += f"; of ranks {', '.join(map(str, missing))} there are none"
        who, since = self._peers.name, f"for {silent:.0f} s "
        if hung is not None and hung != self._rank:
            who, since = f"{who}: rank {hung}", "for too long; this one was "
        say_at_once(
            f"error: {who} has computed nothing {since}{self._peers.doing} "
            f"(train.hang_seconds {self._seconds:g}), and the run ends; {told}"
        )
