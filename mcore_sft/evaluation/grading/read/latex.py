r"""LaTeX as TeX reads it in, the same with a brace around every argument out.

    "\frac12"  ->  "\frac{1}{2}"        "\sqrt\frac\pi3"  ->  "\sqrt{\frac{\pi}{3}}"

TeX takes one token for an argument that has no brace, so `\frac123` is a half times 3. Under a root
a run of digits is one number to whoever writes an answer: `\sqrt12` is the root of twelve.
"""

import re

_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, r"\overline": 1, r"\bar": 1}
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_MACRO = re.compile("|".join(re.escape(name) + "(?![a-zA-Z])" for name in _ARGUMENTS))
_DEGREE = re.compile(r"\s*(\[[^][]*\])?\s*")
_BLANK, _DIGITS = re.compile(r"\s*"), re.compile(r"\d+")
_DEEPEST = 50


class _Cut(Exception):
    """An argument is missing or never ends."""


def with_braces(text: str) -> str:
    """`text` with its arguments braced; as it is where one is missing."""
    try:
        return _braced(text, 0)
    except _Cut:
        return text


def _braced(text: str, depth: int) -> str:
    return _Reader(text, depth).rest() if _MACRO.search(text) else text


def group_end(text: str, start: int) -> int:
    """The place behind the brace that closes the one at `start`; -1 where none does."""
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return -1


class _Reader:
    def __init__(self, text: str, depth: int) -> None:
        if depth > _DEEPEST:
            raise _Cut
        self._text, self._depth = text, depth
        self._place = 0

    def rest(self) -> str:
        """All that is left."""
        made = []
        while found := _MACRO.search(self._text, self._place):
            made.append(self._text[self._place : found.start()])
            self._place = found.start()
            made.append(self._token(is_argument=False))
        return "".join((*made, self._text[self._place :]))

    def _token(self, *, is_argument: bool) -> str:
        """The next token, with its arguments where it is a macro."""
        found = _TOKEN.match(self._text, self._place)
        if not found or found[0] == "}":
            raise _Cut
        self._place = found.end()
        if found[0] == "{":
            self._place = group_end(self._text, found.start())
            if self._place < 0:
                raise _Cut
            return "{" + _braced(self._text[found.end() : self._place - 1], self._depth + 1) + "}"
        if found[0] == r"\sqrt":
            return self._root(is_argument=is_argument)
        return found[0] + "".join(self._argument() for _ in range(_ARGUMENTS.get(found[0], 0)))

    def _root(self, *, is_argument: bool) -> str:
        degree = _DEGREE.match(self._text, self._place)
        assert degree is not None
        self._place = degree.end()
        if self._text.startswith("(", self._place):
            return rf"\sqrt{degree[1] or ''}"
        number = _DIGITS.match(self._text, self._place)
        if number and not is_argument:
            self._place = number.end()
            return rf"\sqrt{degree[1] or ''}{{{number[0]}}}"
        return rf"\sqrt{degree[1] or ''}{self._argument()}"

    def _argument(self) -> str:
        blank = _BLANK.match(self._text, self._place)
        assert blank is not None
        self._place = blank.end()
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _Cut
        token = self._token(is_argument=True)
        self._depth -= 1
        return token if token.startswith("{") else "{" + token + "}"
