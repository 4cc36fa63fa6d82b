"""A checkpoint in, answers and a report on a benchmark out: a process beside the training.

    python -m mcore_sft.training.beside.accuracy_process RUN/step_N RUN/evaluation/step_N

How it is evaluated stands in config.yaml of the second folder. The process ends when standard input
does: then whoever started it has ended, or wants no answer any more.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from mcore_sft import command
from mcore_sft import config as configuration
from mcore_sft.base.terminal import say

_NICE = 10
_GRACE_SECONDS = 10.0


def main() -> None:
    """Evaluate what the command line names."""
    os.nice(_NICE)  # training goes first
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm's warning: the run ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Imported late: it takes seconds, in which the run may end.
    from mcore_sft.checkpoint.export import export
    from mcore_sft.data.text.tokenizer import load_tokenizer
    from mcore_sft.evaluation import benchmarks
    from mcore_sft.evaluation.run import Evaluation, evaluate
    from mcore_sft.evaluation.trained_prompt import Asked, choose

    checkpoint, output = map(Path, sys.argv[1:])
    config = configuration.load(output / "config.yaml")
    model = output.parent / f"hf_{checkpoint.name}"
    _clear(output.parent)
    try:
        export(checkpoint, model)
        tokenizer = load_tokenizer(model)
        chosen = choose(model, tokenizer, Asked())
        say(chosen.why)
        evaluation = Evaluation(
            model=model,
            benchmark=benchmarks.load(config.watched, config.data.root),
            prompt=chosen.prompt,
            tokenizer=tokenizer,
            config=config.evaluation,
            output=output / config.watched.name,
            samples=config.watched.samples,
        )
        evaluate([evaluation], lambda _, report: say(report["text"]))
    finally:
        _clear(output.parent)


def _clear(folder: Path) -> None:
    """Remove the models that were made here, whole and begun, and what locked them."""
    for left in folder.glob("*hf_step_*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing ever comes
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    command.run(main)
