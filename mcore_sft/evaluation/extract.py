r"""A response in, the answer that stands in it out.

    "so it is \boxed{\frac12}."  ->  "\frac12"

Policy `last_box`: the content of the last complete `\boxed{...}`; a box that is never closed is
passed over. Why there is no answer is told apart, since each cause has another mend.
"""

import re
from dataclasses import dataclass
from typing import Literal

Missing = Literal["no_box", "unbalanced", "empty", "truncated"]

# An escaped brace is a printed brace and balances nothing. Some models escape twice: `\\boxed{5}`.
_TOKEN = re.compile(r"\\+(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What a policy found in one response."""

    answer: str | None
    """Content of the deciding box, or none."""
    missing: Missing | None = None
    """Why there is no answer; none where there is one."""
    differing: bool = False
    """The response holds several complete boxes that do not say the same."""


def extract(response: str, *, truncated: bool = False) -> Extraction:
    """The answer in `response` by the policy `last_box`.

    `truncated` says that generation ended at its length limit; without any box that is the cause.
    """
    boxes, opened = _boxes(response)
    if not boxes:
        if truncated:
            return Extraction(answer=None, missing="truncated")
        return Extraction(answer=None, missing="unbalanced" if opened else "no_box")
    differing = len({re.sub(r"\s+", "", box) for box in boxes}) > 1
    if not boxes[-1]:
        return Extraction(answer=None, missing="empty", differing=differing)
    return Extraction(answer=boxes[-1], differing=differing)


def last_box(text: str) -> str | None:
    """Content of the last complete box in `text`, or none."""
    boxes, _ = _boxes(text)
    return boxes[-1] if boxes else None


def _boxes(text: str) -> tuple[list[str], bool]:
    """Contents of the complete outermost boxes in order, and whether any box was opened.

    One pass, so that a megabyte of opened boxes costs no more than a megabyte of prose.
    """
    open_groups: list[tuple[bool, int, int]] = []  # is a box, start, start of the content
    complete: list[tuple[int, int, int]] = []  # start, content
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
    return [text[begin:end].strip() for _, begin, end in complete], opened


def _keep_outermost(
    complete: list[tuple[int, int, int]], start: int, content: int, end: int
) -> None:
    """Add a box that has just closed; the boxes within it, which closed before, go."""
    while complete and complete[-1][0] > start:
        complete.pop()
    complete.append((start, content, end))
