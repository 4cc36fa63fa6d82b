"""Pairs of answers on standard input, verdicts on standard output: the process that may be killed.

One JSON line `[number, task, gold, prediction, seconds]` in, one `[number, outcome, rule,
extracted]` out. The process that was started imports what grading needs and then only forks: each
fork serves until it is killed, and its successor is there in milliseconds. A fork says `[null,
"ready", its id, signal]` before it serves, with the number of the signal that ended the one before,
and `[number, "taken", null, null]` when it begins with a task. A task that uses up its `seconds` of
processor time ends its fork by SIGPROF, which needs no help of Python and nobody who watches. A
fork limits its own memory and may write no file. Texts travel as JSON, so nothing that an answer
says is ever unpickled or evaluated.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Literal, TextIO

from mcore_sft.evaluation.grading import reference
from mcore_sft.evaluation.grading.compare import equivalence
from mcore_sft.evaluation.grading.compare.equivalence import Verdict

Task = Literal["judge", "math_verify", "nemo_rl"]
READY, TAKEN = "ready", "taken"
OVERTIME = signal.SIGPROF
"""What ends a fork whose task has used up its processor time."""
MEMORY_BYTES = 2 * 1024**3
_SHOWN = 300


def main() -> None:
    """Serve until standard input ends."""
    sys.dont_write_bytecode = True
    # whoever started this may ignore or block it
    signal.signal(OVERTIME, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    answers = _take_over_stdout()
    equivalence.symbolic("x + 1", "1 + x")  # imports and caches before the first task is timed
    reference.nemo_rl("1", r"\boxed{1}")
    before: int | None = None
    while True:
        child = os.fork()
        if child == 0:
            _serve(answers, before)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
        before = os.WTERMSIG(status)


def _serve(answers: TextIO, before: int | None) -> None:
    _limit()
    _say(answers, None, READY, os.getpid(), before)
    for line in sys.stdin.buffer:
        number, task, gold, prediction, seconds = json.loads(line)
        _say(answers, number, TAKEN, None, None)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdict, extracted = _judge(task, gold, prediction)
        signal.setitimer(signal.ITIMER_PROF, 0)
        shown = None if extracted is None else extracted[:_SHOWN]
        _say(answers, number, verdict.outcome, verdict.rule, shown)


def _say(answers: TextIO, *what: int | str | None) -> None:
    # at most 4096 bytes, which a pipe takes whole or not at all, whenever this process is killed
    print(json.dumps(what), file=answers, flush=True)


def _take_over_stdout() -> TextIO:
    """Keep standard output for verdicts alone; what a library prints is lost."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return answers


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _judge(task: Task, gold: str, prediction: str) -> tuple[Verdict, str | None]:
    try:
        return _TASKS[task](gold, prediction)
    except MemoryError:
        return Verdict(outcome="unsafe", rule="memory"), None
    except RecursionError:
        return Verdict(outcome="unsafe", rule="recursion"), None
    except Exception as error:
        # sympy raises nearly anything on nearly-mathematics; the name of it is the rule
        return Verdict(outcome="unparsable", rule=type(error).__name__), None


_TASKS: dict[Task, Callable[[str, str], tuple[Verdict, str | None]]] = {
    "judge": lambda gold, prediction: (equivalence.judge(gold, prediction), None),
    "math_verify": lambda gold, prediction: (reference.math_verify(gold, prediction), None),
    "nemo_rl": reference.nemo_rl,
}

if __name__ == "__main__":
    main()
