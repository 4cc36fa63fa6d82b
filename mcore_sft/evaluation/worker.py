"""Pairs of answers on standard input, verdicts on standard output: the process that may be killed.

One JSON line `[gold, prediction]` in, one JSON line `[outcome, rule]` out. The process limits its
own memory and may write no file; whoever starts it keeps the deadline. Texts travel as JSON, so
nothing that an answer says is ever unpickled or evaluated.
"""

import json
import os
import resource
import sys
from typing import TextIO

from mcore_sft.evaluation import equivalence
from mcore_sft.evaluation.equivalence import Verdict

READY = '["ready", ""]'
MEMORY_BYTES = 2 * 1024**3


def main() -> None:
    """Serve until standard input ends."""
    sys.dont_write_bytecode = True
    answers = _take_over_stdout()
    equivalence.symbolic("x + 1", "1 + x")  # imports and caches before the first deadline runs
    _limit()
    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        gold, prediction = json.loads(line)
        verdict = _judge(gold, prediction)
        print(json.dumps([verdict.outcome, verdict.rule]), file=answers, flush=True)


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


def _judge(gold: str, prediction: str) -> Verdict:
    try:
        return equivalence.judge(gold, prediction)
    except MemoryError:
        return Verdict(outcome="unsafe", rule="memory")
    except RecursionError:
        return Verdict(outcome="unsafe", rule="recursion")
    except Exception as error:
        # sympy raises nearly anything on nearly-mathematics; the name of it is the rule
        return Verdict(outcome="unparsable", rule=type(error).__name__)


if __name__ == "__main__":
    main()
