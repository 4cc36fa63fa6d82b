"""The bytes of a JSON array in, its values out, one after another, however long the array is."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from mcore_sft.data.columns import MAX_ROW_BYTES
from mcore_sft.data.errors import DataError

_GAP = re.compile(r"[ \t\r\n]*")
_AFTER = re.compile(r"[ \t\r\n]*[,\]]")


class JsonArray:
    """Iterates over (value, its length in characters); `DataError` names the broken one.

    `read` gives the next bytes, nothing at the end. No more text is held than what it gave last and
    one value.
    """

    def __init__(self, read: Callable[[], bytes], name: str) -> None:
        self._read = read
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._number = 1

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self._take("[")
        if self._next() == "]":
            self._at += 1
        else:
            yield self._value()
            while self._take(",]") == ",":
                self._number += 1
                yield self._value()
        if rest := self._next():
            raise self._broken(f"found {rest!r} after the array")

    def _take(self, expected: str) -> str:
        found = self._next()
        if not found or found not in expected:
            raise self._broken(f"found {found!r} after the value" if found else "it ends early")
        self._at += 1
        return found

    def _value(self) -> tuple[Any, int]:
        while True:
            self._next()
            whole = self._ended or len(self._text) - self._at > 2 * MAX_ROW_BYTES
            try:
                value, end = self._parse(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if whole:
                    raise self._broken(error) from None
            else:
                if _AFTER.match(self._text, end) or whole:  # else it may go on: 1 before .5
                    length, self._at = end - self._at, end
                    return value, length
            self._more()

    def _next(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            gap = _GAP.match(self._text, self._at)
            self._at = gap.end() if gap else self._at
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def _more(self) -> None:
        piece = self._read()
        self._ended = not piece
        try:
            self._text = self._text[self._at :] + self._decode(piece, self._ended)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._name}:{self._number}: not UTF-8, at this value or later ({error.reason}: "
                f"byte 0x{error.object[error.start]:02x}); save the file as UTF-8"
            ) from None
        self._at = 0

    def _broken(self, what: object) -> DataError:
        return DataError(
            f"{self._name}:{self._number}: broken JSON ({what}); expected an array of objects"
        )
