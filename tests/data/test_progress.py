import io

import pytest

from mcore_sft.base.terminal import Console
from mcore_sft.data import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes where a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("total", "said"),
    [
        (10_000_000, "reading [a]  60% of 10.0 MB  200.0 kB/s  left 0:00:20\n"),
        (None, "reading [a]  6.0 MB  200.0 kB/s\n"),
    ],
)
def test_a_log_gets_a_line_now_and_then(clock: list[float], total: int | None, said: str) -> None:
    log = io.StringIO()
    console = Console(file=log, width=20)
    with progress.progress("reading [a]", total=total, console=console) as done:
        done(1_000_000)
        clock[0] += 29
        done(2_000_000)
        assert log.getvalue() == ""
        clock[0] += 1
        done(3_000_000)
        done(3_000_000)
        clock[0] += 29
        done(500_000)
    assert log.getvalue() == said


def test_a_terminal_gets_a_bar(clock: list[float]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=True)
    with progress.progress("reading", total=10_000_000, console=console) as done:
        done(6_000_000)
    assert "6.0/10.0 MB" in screen.getvalue()
