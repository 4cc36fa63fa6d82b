"""What the commands share: `--config FILE key=value ...` in, one clear sentence on failure out."""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from mcore_sft import config
from mcore_sft.base.errors import Stopped, UserError
from mcore_sft.base.terminal import Parser, say
from mcore_sft.config import RunConfig


def parser(description: str, *, config_required: bool = True) -> Parser:
    """Arguments that every command takes; a command adds its own."""
    made = Parser(description=description)
    made.add_argument(
        "--config",
        type=path,
        required=config_required,
        metavar="FILE",
        help="experiment file (configs/*.yaml)",
    )
    made.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optimizer.lr=1e-5")
    return made


def experiment(arguments: argparse.Namespace) -> RunConfig:
    """The experiment that the command line names; prints it and exits where that was asked."""
    loaded = config.load(arguments.config, arguments.overrides)
    if arguments.print_config:
        say(config.dump(loaded), end="")
        raise SystemExit(0)
    return loaded


def count(text: str) -> int:
    """The type of an argument that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more; given {text!r}")
    return int(text)


def path(said: str) -> Path:
    """The type of an argument that is a path; `~` is the home folder."""
    try:
        return Path(config.home(said))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


STOPPED = 75
"""Exit code of a run that was asked to stop and has saved: started again, it goes on (EX_TEMPFAIL).
torchrun makes 1 of it, as of every failure."""


_UNASKED = ("megatron.core.models.gpt.gpt_model", "torch.utils.cpp_extension")
"""Loggers that warn whoever has a CPU, or a GPT, of what is ours to know (decision 17)."""


def _silence_libraries() -> None:
    """Drop what libraries warn of each other at import: no Apex, renamed functions.

    A user of these commands could act on none of it. What is asked for and absent is an error of
    our own.
    """
    for library in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")
    for name in _UNASKED:
        logging.getLogger(name).setLevel(logging.ERROR)


ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command: a scheduler's or timeout's, and a terminal's that closes."""


class Terminated(KeyboardInterrupt):
    """A signal of `ENDING` came, and the command ends as by Ctrl-C: it cleans up what it began.

    Its argument is the signal's number.
    """


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command; an error meant for the user is one sentence on stderr and exit code 2.

    Every error meant for the user is a `UserError`; anything else is a defect of ours and keeps
    its traceback. Ctrl-C is exit code 130, SIGTERM 143, SIGHUP 129 (ignored under `nohup`), and a
    run that was asked to stop and has saved (`Stopped`) is 75.
    """
    _silence_libraries()
    try:
        with _signals_end():
            check_clone()
            main()
    except UserError as error:
        if not error.quiet:
            say(f"error: {error}", error=True)
        sys.exit(2)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            say(f"stopped: {stopped}", error=True)
        sys.exit(STOPPED)
    except Terminated as terminated:
        say("terminated", error=True)
        sys.exit(128 + terminated.args[0])
    except KeyboardInterrupt:
        say("interrupted", error=True)
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)


@contextlib.contextmanager
def _signals_end() -> Iterator[None]:
    """Let the signals of `ENDING` end what happens inside.

    torchrun ends ranks that hang where no handler of ours would run. Training hears signals by
    itself, from its first step on: what was learned is saved.
    """
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if "RANK" not in os.environ and handler != signal.SIG_IGN:
            signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _terminate:  # else it came, and stays ignored
                signal.signal(number, handler)


def check_clone() -> None:
    """Raise `UserError` where the script that was started is of another clone than this package.

    A copied environment goes on importing the package of the clone that it was made in.
    """
    started = getattr(sys.modules["__main__"], "__file__", None)
    here = Path(__file__).resolve().parent
    beside = Path(started).resolve().parent.parent / here.name if started else here
    if beside != here and beside.is_dir() and (here.parent / "pyproject.toml").exists():
        raise UserError(
            f"{sys.executable} imports {here} (expected {beside}, beside {started}); run "
            f"`make setup` in {beside.parent}, and use the Python of its .venv"
        )


def _terminate(number: int, _: object) -> NoReturn:
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)  # timeout(1) sends it twice, and cleaning must go on
    raise Terminated(number)


def end_with_parent() -> None:
    """End this process as soon as the one that started it by multiprocessing has ended."""
    threading.Thread(target=_outlive_nobody, daemon=True).start()


def _outlive_nobody() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # the pipe from it has come to its end, even if it was killed
    os._exit(1)
