import io

import pytest

from mcore_sft.base import progress
from mcore_sft.base.progress import Course
from mcore_sft.base.terminal import Console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes where a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("total", "said"),
    [
        (10_000_000, "reading [a]  60% of 10.0 MB  100.0 kB/s  left 0:00:40\n"),
        (None, "reading [a]  6.0 MB  100.0 kB/s\n"),
    ],
)
def test_a_log_gets_a_line_now_and_then(clock: list[float], total: int | None, said: str) -> None:
    log = io.StringIO()
    console = Console(file=log, width=20)
    clock[0] += 5  # what is lost before anything is done slows nothing down
    with progress.progress("reading [a]", total=total, console=console) as done:
        clock[0] += 10
        done(3_000_000)
        clock[0] += 10
        done(2_000_000)
        assert log.getvalue() == ""
        clock[0] += 20
        done(1_000_000)
        done(3_000_000)
        clock[0] += 29
        done(500_000)
    assert log.getvalue() == said


def test_a_terminal_gets_a_bar(clock: list[float]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=True)
    with progress.progress("reading", total=10_000_000, console=console) as done:
        done(6_000_000)
    assert "reading  60% of 10.0 MB" in screen.getvalue()


def test_one_line_goes_over_all_stages_at_the_rate_of_the_last_minute(clock: list[float]) -> None:
    log = io.StringIO()
    with Course(Console(file=log, width=20), {"one": 60, "two": 40}) as course:
        with course.stage("one", total=100_000_000) as done:
            for rate in (100_000, 100_000, 200_000, 400_000):  # bytes a second, for half a minute
                clock[0] += 30
                done(30 * rate)
            done(100_000_000 - 30 * 800_000)
        with course.stage("two", total=3_000_000) as done:
            for _ in range(2):
                clock[0] += 60
                done(1_000_000)
    lines = log.getvalue().splitlines()
    assert lines[0] == "one  3% of 100.0 MB  all 2%"  # too early to tell how long
    # In the last minute 6 MB and then 12 MB: nothing before that counts.
    assert lines[2] == "one  12% of 100.0 MB  150.0 kB/s  all 7%  left 0:17:11"
    assert lines[3] == "one  24% of 100.0 MB  300.0 kB/s  all 14%  left 0:07:56"
    # From 60 % on, the second stage counts, and the time that is left is that of all.
    assert lines[4:] == [
        "two  33% of 3.0 MB  all 73%  left 0:02:00",
        "two  67% of 3.0 MB  16.7 kB/s  all 87%  left 0:01:00",
    ]
