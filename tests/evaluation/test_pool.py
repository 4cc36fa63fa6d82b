"""The grader as a library: shared, interrupted, nested, abandoned and forked."""

import asyncio
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.grading.grade import Grader, Pair
from tests.evaluation.forks import BOMB, wait_for_busy_fork, wait_until_gone, workers

RIGHT, WRONG = Pair(gold="2^m+2", prediction="2+2^m"), Pair(gold="2^m+2", prediction="2^m-2")
BOMBED = Pair(gold="5", prediction=BOMB)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout=60, processes=2) as made:
        yield made


def pairs(count: int) -> list[tuple[Pair, bool]]:
    """Every other is right, and takes a worker."""
    return [
        (Pair(gold=f"2^m+{n}", prediction=f"{n + n % 2}+2^m"), n % 2 == 0)
        for n in range(2, count + 2)
    ]


def judged(grader: Grader, asked: list[tuple[Pair, bool]]) -> list[bool]:
    return [grader.same(pair.gold, pair.prediction).correct for pair, _ in asked]


def test_threads_get_their_own_verdicts(grader: Grader) -> None:
    asked = pairs(64)
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda part: judged(grader, part), [asked[n::8] for n in range(8)])
    assert list(found) == [[right for _, right in asked[n::8]] for n in range(8)]
    assert len(workers(grader)) == 2


def test_tasks_of_an_event_loop_get_their_own_verdicts(grader: Grader) -> None:
    asked = pairs(32)

    async def all_of_them() -> list[Any]:
        one = [asyncio.to_thread(grader.same, p.gold, p.prediction) for p, _ in asked]
        return await asyncio.gather(*one)

    found = asyncio.run(all_of_them())
    assert [verdict.correct for verdict in found] == [right for _, right in asked]


def test_what_a_call_left_behind_is_no_verdict_of_the_next(grader: Grader) -> None:
    rights = [Pair(gold=f"{n}+m", prediction=f"m+{n}") for n in range(20)]
    for n in range(1, 6):
        assert any(verdict.correct for _, verdict in grader.judge_all(rights))
        assert not grader.same(f"{n}+q", f"q-{n}").correct
    abandoned = grader.judge_all(rights)
    next(abandoned)  # and it stays where it is
    assert dict(grader.judge_all([WRONG, RIGHT]))[1].correct
    nested = [
        (first.correct, second.correct)
        for _, first in grader.judge_all(rights[:3])
        for _, second in grader.judge_all([WRONG])
    ]
    assert nested == [(True, False)] * 3
    assert len(list(abandoned)) == 19


def test_a_closed_generator_ends_its_workers(grader: Grader) -> None:
    generator = grader.judge_all([RIGHT, BOMBED])
    assert next(generator)[1].correct
    fork = wait_for_busy_fork(grader)
    generator.close()
    wait_until_gone(fork)
    assert grader.same("2^m+2", "2+2^m").correct


def test_an_alarm_or_ctrl_c_leaves_nothing_behind() -> None:
    class Alarm(BaseException):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    def strike() -> None:
        wait_for_busy_fork(grader)
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with Grader(timeout=600, processes=1) as grader:
            grader.start()
            for n in range(1, 4):
                striker = threading.Thread(target=strike)
                striker.start()
                with pytest.raises(Alarm):
                    grader.same("5", BOMB)
                striker.join()
                assert grader.same(f"m+{n}", f"{n}+m").outcome == "equal"
                assert grader.same(f"m+{n}", f"{n}-m").outcome == "different"
    finally:
        signal.signal(signal.SIGALRM, before)


GRADER = Grader(timeout=60, processes=1)
"""What a forked or spawned process finds as a global of its own."""


def correct(pair: Pair) -> bool:
    return GRADER.same(pair.gold, pair.prediction).correct


def correct_by(grader: Grader) -> list[bool]:
    return [grader.same(p.gold, p.prediction).correct for p in (RIGHT, WRONG)]


def test_forked_processes_have_workers_of_their_own() -> None:
    asked = pairs(24)
    assert correct(RIGHT)  # before the fork
    ours = workers(GRADER)[0]._process
    begun = GRADER.judge_all([RIGHT, RIGHT, RIGHT])
    next(begun)
    with multiprocessing.get_context("fork").Pool(2) as processes:
        found = processes.map(correct, [pair for pair, _ in asked])
        assert processes.apply(correct_by, (Grader(timeout=60),)) == [True, False]
    assert found == [right for _, right in asked]
    child = os.fork()
    if not child:
        try:
            list(begun)
        except EvaluationError as error:
            os._exit("forked" not in str(error))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    begun.close()
    assert correct(RIGHT)
    assert workers(GRADER)[0]._process is ours  # which no child has ended
    GRADER.close()


def test_a_grader_can_be_sent_to_a_spawned_process(grader: Grader) -> None:
    correct_by(grader)
    assert correct_by(pickle.loads(pickle.dumps(grader))) == [True, False]
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        assert processes.apply(correct_by, (grader,)) == [True, False]


def test_a_program_ends_with_its_workers_whatever_it_left_undone() -> None:
    program = f"""
from mcore_sft.evaluation.grading.grade import Grader, Pair
grader = Grader(timeout=600, processes=2)
bomb = Pair(gold="5", prediction="{BOMB}")
left = grader.judge_all([Pair(gold="2^m+2", prediction="2+2^m"), bomb, bomb, bomb])
next(left)
print(*(each._process.pid for each in grader._pool._crew().workers))
"""
    run = [sys.executable, "-c", program]
    said = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
    assert said.stderr == ""
    for process in said.stdout.split():
        wait_until_gone(int(process))


def test_a_grader_that_is_forgotten_ends_its_workers() -> None:
    grader = Grader(timeout=60, processes=1)
    assert grader.same("2^m+2", "2+2^m").correct
    process = workers(grader)[0]._process
    assert process is not None
    del grader
    wait_until_gone(process.pid)


def test_a_grader_that_is_closed_ends_what_others_ask_of_it() -> None:
    grader = Grader(timeout=600, processes=1)
    grader.start()
    closer = threading.Thread(target=lambda: wait_for_busy_fork(grader) and grader.close())
    closer.start()
    with pytest.raises(EvaluationError, match="was closed while it graded"):
        list(grader.judge_all([BOMBED] * 3))
    closer.join()
    assert grader.same("2^m+2", "2+2^m").correct  # with new workers
    grader.close()


# --- processor time ----------------------------------------------------------------------------


def test_time_that_the_machine_takes_from_a_worker_decides_nothing() -> None:
    """A worker that stands still for longer than it may compute still gives its verdict."""
    with Grader(timeout=1.0, processes=1) as grader:
        grader.start()
        fork = workers(grader)[0]._fork
        assert fork is not None
        os.kill(fork, signal.SIGSTOP)
        wake = threading.Timer(2.0, os.kill, (fork, signal.SIGCONT))
        wake.start()
        assert grader.same("2^m+2", "2+2^m").outcome == "equal"
        wake.join()
        assert grader.same("5", BOMB).outcome == "timeout"


def test_a_worker_that_stands_still_is_ended_and_its_answer_not_graded() -> None:
    with Grader(timeout=0.1, processes=1) as grader:
        grader.start()
        over, stopped = threading.Event(), set()

        def stop_each() -> None:
            while not over.wait(0.005):
                for each in workers(grader):
                    if each._fork not in (None, *stopped):
                        stopped.add(each._fork)
                        os.kill(each._fork, signal.SIGSTOP)

        stopper = threading.Thread(target=stop_each)
        stopper.start()
        verdict = grader.same("2^m+2", "2+2^m")
        over.set()
        stopper.join()
        assert (verdict.outcome, verdict.rule) == ("not_graded", "overdue")
        assert len(stopped) >= 2


# --- nonsense ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"timeout": 0}, "timeout: got 0, expected seconds, above 0"),
        ({"timeout": -1.0}, "timeout: got -1.0"),
        ({"timeout": float("nan")}, "timeout: got nan"),
        ({"timeout": float("inf")}, "timeout: got inf"),
        ({"timeout": "5"}, "timeout: got '5'"),
        ({"timeout": None}, "timeout: got None"),
        ({"processes": -1}, "processes: got -1, expected a number, 0 or more"),
        ({"processes": 1.5}, "processes: got 1.5"),
        ({"policy": "first_box"}, "policy: got 'first_box', expected one of last_box, "),
        ({"policy": ["last_box"]}, "policy: got"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        Grader(**settings)


@pytest.mark.parametrize("nothing", [None, 5, b"5", ["5"]])
def test_what_is_no_text_is_refused(grader: Grader, nothing: Any) -> None:
    with pytest.raises(EvaluationError, match=r"gold: got .*, expected a text"):
        grader.same(nothing, "5")
    with pytest.raises(EvaluationError, match=r"prediction: got .*, expected a text"):
        grader.same("5", nothing)
    with pytest.raises(EvaluationError, match=r"gold: got .*, expected a text"):
        grader.grade(nothing, "no box")
    with pytest.raises(EvaluationError, match=r"response: got .*, expected a text"):
        grader.grade("5", nothing)


# --- all together ------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_calls_in_every_way_agree_with_one_thread() -> None:
    chance = random.Random(7)
    asked = [
        chance.choice(
            [
                lambda n: (f"{n}+2^m", f"2^m+{n + n % 2}"),
                lambda n: (str(n), rf"\boxed{{{n + n % 2}}}"),
                *[lambda n: (rf"\frac{{{n}}}{{7}}", f"{n}/{7 + n % 2}")] * 12,
                lambda n: (rf"{n}\sqrt{{13}}", rf"\sqrt{{{13 * n * n + n % 2}}}"),
                lambda n: (rf"\sin({n}x)", rf"\frac{{{n}"),
            ]
        )(n)
        for n in range(10_000)
    ]
    with Grader(timeout=60) as grader:
        alone = [grader.same(*pair).outcome for pair in asked]
        assert {"equal", "different", "unparsable"} <= set(alone)

        def part(first: int) -> list[str]:
            ways = random.Random(first)
            found = []
            for place in range(first, len(asked), 16):
                if ways.random() < 0.1:  # begin something and leave it
                    some = ways.sample(asked, 3)
                    next(grader.judge_all(Pair(gold=a, prediction=b) for a, b in some))
                found.append(grader.same(*asked[place]).outcome)
            return found

        async def tasks() -> list[list[str]]:
            return await asyncio.gather(*(asyncio.to_thread(part, n) for n in range(8, 16)))

        with ThreadPoolExecutor(8) as threads:
            half = threads.map(part, range(8))
            other = asyncio.run(tasks())
            assert [*half, *other] == [alone[n::16] for n in range(16)]
