import json
import signal
import subprocess
import sys

WORKER = "import mcore_sft.evaluation.grading.worker as w; w.{change}; w.main()"


def ask(pairs: list[list[str]], change: str) -> list[list[str | None]]:
    ran = subprocess.run(
        [sys.executable, "-c", WORKER.format(change=change)],
        input="".join(
            json.dumps([number, "judge", *pair, 10.0]) + "\n" for number, pair in enumerate(pairs)
        ),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert lines[0][:2] == [None, "ready"]
    assert [line[:2] for line in lines[1::2]] == [[n, "taken"] for n in range(len(pairs))]
    assert [line[0] for line in lines[2::2]] == list(range(len(pairs)))
    return [[outcome, rule] for _, outcome, rule, _ in lines[2::2]]


def test_memory_has_an_end() -> None:
    # the judge is replaced by one that asks for more than there is
    change = "equivalence.judge = lambda gold, prediction: bytearray(3 * 1024**3)"
    assert ask([["1", "2"]], change) == [["unsafe", "memory"]]


def test_no_file_can_be_written(tmp_path: object) -> None:
    write = f"open({str(tmp_path)!r} + '/x', 'w').write('x' * 99999)"
    change = f"equivalence.judge = lambda gold, prediction: {write}"
    assert ask([["1", "2"]], change) == [["unparsable", "OSError"]]


def test_what_libraries_print_is_no_verdict() -> None:
    assert ask([["2^m+2", "2+2^m"], ["5", r"\frac{"]], "MEMORY_BYTES += 0") == [
        ["equal", "math_verify"],
        ["unparsable", "prediction"],
    ]


def test_a_task_that_uses_up_its_processor_time_ends_its_process() -> None:
    """SIGPROF, which is the deadline, needs nobody who watches and no help of Python."""
    change = "equivalence.judge = lambda gold, prediction: pow(int(gold), 10**9)"
    ran = subprocess.run(
        [sys.executable, "-c", WORKER.format(change=change)],
        input=json.dumps([7, "judge", "3", "x", 0.2]) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line[:2] for line in lines] == [[None, "ready"], [7, "taken"], [None, "ready"]]
    assert lines[-1][3] == signal.SIGPROF
