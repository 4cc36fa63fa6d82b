"""What reaches a terminal: names, paths, rows and answers come from elsewhere, and are text alone.

A terminal obeys escape codes, and rich obeys square brackets; neither is ours to pass on.
"""

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterable
from typing import IO, Any, NoReturn

from rich import console as rich_console
from rich.segment import Segment
from rich.text import Text

# C0 but tab and line feed, DEL and C1, marks that turn the direction of text, line separators; and
# halves of surrogate pairs, which stand for bytes of a name that are no UTF-8, and have none.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_CLOSED = (errno.EIO, errno.EPIPE)
"""Of a terminal, and of a pipe, that nobody reads any more."""


def printable(text: object) -> str:
    r"""What `text` says, with each character that a terminal would obey written out, as `\x1b`."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
    """Print `text` as it is, and nothing that the terminal obeys, on stdout or stderr.

    A terminal or pipe that has closed ends nothing: the rest goes nowhere.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        print(printable(text), file=stream, end=end, flush=True)
    except OSError as fault:
        if fault.errno not in _CLOSED:
            raise
        _let_go(stream)


def say_at_once(text: object) -> None:
    """Say a line on stderr past Python's own stream, which a thread that hangs may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{printable(text)}\n".encode())


def _let_go(stream: IO[str]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Parser(argparse.ArgumentParser):
    """Quotes what stood on the command line as text alone."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, and end."""
        super().error(printable(message))


class Console(rich_console.Console):
    """Prints text as it is: no markup, no emoji, and nothing that the terminal obeys.

    A terminal that closes, or a pipe, ends nothing: what is printed goes nowhere from then on.
    What is ours to style has a `style`, or is printed with `markup=True`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, if there is still somebody to read it."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            if error.errno not in _CLOSED:
                raise
            _let_go(self.file)

    def on_broken_pipe(self) -> None:
        """Go on without whoever read."""
        _let_go(self.file)

    def render_str(self, text: str, **options: Any) -> Text:
        """Strings, before they are measured: what is written out is longer."""
        return super().render_str(printable(text), **options)

    def render(
        self,
        renderable: rich_console.RenderableType,
        options: rich_console.ConsoleOptions | None = None,
    ) -> Iterable[Segment]:
        """The pieces of everything else that is printed, styles apart from text."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)
