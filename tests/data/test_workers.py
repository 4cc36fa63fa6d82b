import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mcore_sft.data.errors import DataError, WorkerEnded
from mcore_sft.data.workers import Workers, _signals_held, no_tool


def ten():
    return 10


def broken():
    raise DataError("no tool here")


def add(tool, number):
    time.sleep(0.01 * (number % 3))
    return tool + number


def fail(_, number):
    if number == 2:
        raise DataError(f"{number} is none")
    return number


def die(_, number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


TASKS = [(number,) for number in range(12)]


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order_and_errors_are_those_of_the_task(count):
    with Workers(count, ten) as workers:
        assert list(workers.each(add, TASKS)) == [10 + number for (number,) in TASKS]
    got = []
    with pytest.raises(DataError, match="2 is none"), Workers(count, no_tool) as workers:
        got.extend(workers.each(fail, TASKS))
    with pytest.raises(DataError, match="no tool here"), Workers(count, broken) as workers:
        list(workers.each(add, TASKS))


def test_worker_that_is_killed_ends_the_others():
    threads = threading.active_count()
    said = r"try fewer \(data\.workers=1\)"
    with pytest.raises(WorkerEnded, match=said), Workers(2, no_tool) as workers:
        list(workers.each(die, TASKS))
    assert threading.active_count() == threads


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_come_when_the_process_is_started(number):
    done = []

    def come(*_):
        done.append("signal")
        raise KeyboardInterrupt

    @_signals_held()
    def start():
        for _ in range(2):
            signal.raise_signal(number)
        done.append("process")

    before = signal.signal(number, come)
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert signal.getsignal(number) is come
    finally:
        signal.signal(number, before)
    assert done == ["process", "signal"]


def test_process_hears_neither():
    asked = "import signal; print(*signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with _signals_held():
        heard = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert {int(number) for number in heard.stdout.split()} == {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    }
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_nothing_is_held_in_other_threads():
    passed = []

    def start_a_process():
        with _signals_held():
            passed.append(True)

    thread = threading.Thread(target=start_a_process)
    thread.start()
    thread.join()
    assert passed
