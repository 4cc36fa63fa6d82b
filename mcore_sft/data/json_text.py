"""JSON text in, its value out, nested no deeper than we say, whatever this Python could read."""

import json
from typing import Any

DEEPEST = 100
"""Lists and objects within each other."""
TOO_DEEP = f"nested more than {DEEPEST} levels deep"


def loads(text: str | bytes) -> Any:
    """Parse `text`; `ValueError` if it is no JSON or is nested deeper than `DEEPEST`."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) > DEEPEST and is_too_deep(value):  # type: ignore[arg-type]
        raise ValueError(TOO_DEEP)
    return value


def is_too_deep(value: Any) -> bool:
    """Whether a value that was read from JSON is nested deeper than `DEEPEST`."""
    level = [value]
    for _ in range(DEEPEST):
        level = [one for one in level if isinstance(one, list | dict)]
        level = [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, list | dict) for one in level)
