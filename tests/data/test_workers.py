import signal
import subprocess
import sys
import threading

import pytest

from mcore_sft.data.workers import _signals_held


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
