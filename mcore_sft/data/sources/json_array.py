"""The bytes of a JSON array in, its values out, one after another, however long the array is."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from mcore_sft.base import json_text
from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.single_row import MAX_ROW_BYTES

_LARGEST = 2 * MAX_ROW_BYTES  # characters, which may be escaped
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
        self._text, self._at, self._ended = "", 0, False
        self._number, self._bytes, self._not_utf8 = 1, 0, ""

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
            whole = self._ended or len(self._text) - self._at > _LARGEST
            try:
                value, end = json_text.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if whole:
                    raise self._refused(error) from None
            else:
                if json_text.is_too_deep(value):
                    raise self._refused(ValueError(json_text.TOO_DEEP))
                if (length := end - self._at) > _LARGEST:
                    raise self._too_large()
                if _AFTER.match(self._text, end) or whole:  # else it may go on: 1 before .5
                    self._at = end
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
        """Read on. What is not UTF-8 is told of when all that comes before it has been taken."""
        if self._not_utf8:
            raise DataError(
                f"{self._name}:{self._number}: not UTF-8 ({self._not_utf8}); mend or remove the "
                "value, or save the file as UTF-8"
            )
        piece = self._read()
        self._bytes += len(piece)
        try:
            more = self._decode(piece, not piece)
            self._ended = not piece
        except UnicodeDecodeError as error:
            more = error.object[: error.start].decode()
            at = self._bytes - len(error.object) + error.start
            self._not_utf8 = f"byte {at + 1} of the text is 0x{error.object[error.start]:02x}"
        self._text, self._at = self._text[self._at :] + more, 0

    def _refused(self, error: Exception) -> DataError:
        """The error for a text that is no value, by json's own verdict."""
        if not isinstance(error, json.JSONDecodeError):
            return self._broken(error)
        # Where the text is cut, json names its end, or where a string or a short token begins.
        cut = error.msg.startswith("Unterminated") or len(self._text) - error.pos < 10
        if cut and not self._ended:
            return self._too_large()
        return self._broken(f"{error.msg}: character {error.pos - self._at + 1} of the value")

    def _too_large(self) -> DataError:
        return DataError(
            f"{self._name}:{self._number}: a value of more than {_LARGEST // 1_000_000} MB, or "
            "without an end; mend or remove it"
        )

    def _broken(self, what: object) -> DataError:
        return DataError(
            f"{self._name}:{self._number}: broken JSON ({what}); expected an array of objects"
        )
