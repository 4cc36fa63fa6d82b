r"""A text in, its complete outermost boxes out.

"so \boxed{\frac12} and \boxed{3"  ->  \frac12
"""

import re
from dataclasses import dataclass

# An escaped brace is a printed brace and balances nothing. Some models escape twice, `\\boxed{5}`,
# or write `\beginboxed{5}`.
_TOKEN = re.compile(r"(?<!\\)\\+(?:begin)?(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Span:
    """A part of a text, and what is within its delimiters."""

    start: int
    end: int
    content: str


def differ(boxes: list[Span]) -> bool:
    """Whether they do not all say the same."""
    return len({re.sub(r"\s+", "", box.content) for box in boxes}) > 1


def find_boxes(text: str) -> tuple[list[Span], bool]:
    """The complete outermost boxes in order, and whether any box was opened.

    One pass, so that a megabyte of opened boxes costs no more than a megabyte of prose.
    """
    open_groups: list[tuple[bool, int, int]] = []  # is a box, start, start of the content
    complete: list[tuple[int, int, int]] = []  # start, content, its end
    opened = False
    for token in _TOKEN.finditer(text):
        found = token.group()
        if found == "}":
            if open_groups:
                is_box, start, content = open_groups.pop()
                if is_box:
                    _keep_outermost(complete, start, content, token.start())
        elif found.endswith("{") and found != r"\{":
            is_box = found != "{"
            opened |= is_box
            open_groups.append((is_box, token.start(), token.end()))
    return [Span(start, end + 1, text[begin:end].strip()) for start, begin, end in complete], opened


def _keep_outermost(
    complete: list[tuple[int, int, int]], start: int, content: int, end: int
) -> None:
    """Add a box that has just closed; the boxes within it, which closed before, go."""
    while complete and complete[-1][0] > start:
        complete.pop()
    complete.append((start, content, end))
