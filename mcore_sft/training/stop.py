"""Why a run ends before its last step: it is told to, or its time is over."""

import signal
import time
from types import FrameType
from typing import Any, Self

_CLOCK = signal.NSIG  # no signal has this number
_HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_REASONS = {
    _CLOCK: "train.max_minutes are over",
    signal.SIGHUP: "SIGHUP came",
    signal.SIGUSR1: "SIGUSR1 came",
    signal.SIGTERM: "SIGTERM came",
}


class Stop:
    """Hears SIGTERM, SIGHUP and SIGUSR1 (Slurm's warning) where it is entered; watches the clock.

    SIGHUP is not heard where it is ignored: `nohup` asks for a run that outlives its terminal.

    What was asked of one rank is a number, so that the ranks can agree on the largest and with it
    on the step: a signal may reach them before and after the end of a step.
    """

    def __init__(self, minutes: float | None) -> None:
        """`minutes` count from here."""
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._came = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _HEARD:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> int:
        """0, or what asked this rank to stop."""
        if self._end is not None and time.monotonic() >= self._end:
            return self._came or _CLOCK
        return self._came

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._came = max(self._came, number)


def reason(asked: int) -> str:
    """What a number of `Stop.asked` means."""
    return _REASONS[asked]
