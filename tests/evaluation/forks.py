"""The processes behind a grader, which tests look at, stop and kill."""

import os
import time
from pathlib import Path

from mcore_sft.evaluation.grading.grade import Grader
from mcore_sft.evaluation.grading.worker_process import WorkerProcess

BOMB = "(10^9)!"


def workers(grader: Grader) -> list[WorkerProcess]:
    return grader._pool._crew().workers


def busy_forks(grader: Grader) -> list[int]:
    """Those that compute: they have used a tenth of a second of processor time for their job."""
    busy = [each._fork for each in workers(grader) if each._call is not None]
    return [fork for fork in busy if fork is not None and _processor_seconds(fork) >= 0.1]


def wait_for_busy_fork(grader: Grader) -> int:
    deadline = time.monotonic() + 60
    while not (found := busy_forks(grader)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline, f"process {process} is still there"
        time.sleep(0.02)


def _processor_seconds(process: int) -> float:
    try:
        words = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
