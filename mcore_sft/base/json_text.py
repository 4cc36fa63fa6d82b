"""JSON text in, its value out, nested no deeper than we say, whatever this Python could read.

An integer of more digits than Python converts is a Decimal.
"""

import json
from decimal import Decimal
from typing import Any

DEEPEST = 100
"""Lists and objects within each other."""
TOO_DEEP = f"nested more than {DEEPEST} levels deep"

_DECODER = json.JSONDecoder()


def loads(text: str | bytes) -> Any:
    """Parse `text`; `ValueError` if it is no JSON or is nested deeper than `DEEPEST`."""
    try:
        value = _loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) > DEEPEST and is_too_deep(value):  # type: ignore[arg-type]
        raise ValueError(TOO_DEEP)
    return value


def raw_decode(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends; errors as json's own."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.JSONDecoder(parse_int=_integer).raw_decode(text, at)


def is_too_deep(value: Any) -> bool:
    """Whether a value that was read from JSON is nested deeper than `DEEPEST`."""
    level = [value]
    for _ in range(DEEPEST):
        level = [one for one in level if isinstance(one, list | dict)]
        level = [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, list | dict) for one in level)


def _loads(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer is too long, or bytes are not UTF-8
        return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)
