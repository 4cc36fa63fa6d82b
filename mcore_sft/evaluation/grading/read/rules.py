"""Tables of what is written for what, applied one after another."""

import re
from collections.abc import Callable

Replacement = str | Callable[[re.Match[str]], str]
Rules = tuple[tuple[re.Pattern[str], Replacement], ...]


def rules(*table: tuple[str, Replacement]) -> Rules:
    """Pairs of a pattern and what stands for it, compiled."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in table)


def apply(table: Rules, text: str) -> str:
    """`text` with each pattern replaced, in the order of the table."""
    for pattern, replacement in table:
        text = pattern.sub(replacement, text)
    return text
