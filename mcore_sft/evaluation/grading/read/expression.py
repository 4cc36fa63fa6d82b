r"""An expression in canonical spelling in, what an arithmetic makes of it out; no sympy, nothing
evaluated as code.

    "\frac{x}{2} + \sqrt{3}", numbers of some kind  ->  one such number

The grammar is here once; the kinds of numbers are complex ones at a point (`value`) and residues
(`signature`). What has more than one reading (`1/2x`, `x^10`, `\sin x(y)`) has no value.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

_MAX_TOKENS = 400
_TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|\d+(?:\.\d+)?|\.\d+|[a-zA-Z](?:_\{\w+\})?|[-+/^(){}\[\]!])")
_TIMES = {r"\cdot", r"\times"}
_FUNCTIONS = {r"\sin", r"\cos", r"\tan", r"\cot", r"\sec", r"\csc", r"\ln", r"\exp"}
_STARTS = {r"\frac", r"\sqrt", r"\binom", r"\pi", "(", "{", *_FUNCTIONS}
_CLOSING = {"(": ")", "{": "}", "[": "]"}


class Ambiguous(Exception):
    """The text has no value, or more than one."""


# What has + - * / among itself: complex, or a class of its own.
Number = TypeVar("Number", bound=Any)


class Arithmetic(ABC, Generic[Number]):
    """A kind of numbers. What it has no number for raises `Ambiguous`."""

    @abstractmethod
    def number(self, digits: str) -> Number:
        """Of `12`, `1.5` or `.5`."""

    @abstractmethod
    def letter(self, name: str) -> Number:
        r"""Of a variable, of `i`, `e` or `\pi`."""

    @abstractmethod
    def power(self, base: Number, exponent: Number) -> Number:
        """`base` to the `exponent`."""

    @abstractmethod
    def root(self, number: Number, degree: Number | None) -> Number:
        """The root of `degree`, a square root where that is none."""

    @abstractmethod
    def call(self, function: str, argument: Number) -> Number:
        r"""`\sin` and the like."""

    @abstractmethod
    def factorial(self, number: Number) -> Number:
        """`number!`."""

    @abstractmethod
    def binomial(self, above: Number, below: Number) -> Number:
        """Of so many, so many chosen."""

    def seen(self, number: Number) -> Number:
        """`number`, which came up on the way."""
        return number


Reading = Literal["outer", "inner"]
r"""Whose power `\sin(x)^2` is: of the sine or of x."""


def evaluate(text: str, arithmetic: Arithmetic[Number], reading: Reading | None = None) -> Number:
    """The number that `text` is; raises `Ambiguous` or `ArithmeticError`."""
    reader = _Reader(text, arithmetic, reading)
    value: Number = reader.expression()
    if reader.token is not None:
        raise Ambiguous
    return value


def is_words(text: str) -> bool:
    """Whether letters stand there that are no product."""
    return bool(re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", text))


class _Reader(Generic[Number]):
    """Recursive descent over the tokens; each method takes what it reads."""

    def __init__(self, text: str, arithmetic: Arithmetic[Number], reading: Reading | None) -> None:
        self._of, self._reading = arithmetic, reading
        self._tokens: list[str] = []
        place, end = 0, len(text.rstrip())
        while place < end:
            found = _TOKEN.match(text, place)
            if not found or len(self._tokens) > _MAX_TOKENS:
                raise Ambiguous
            self._tokens.append(found[1])
            place = found.end()
        self._place = 0
        self._raised = False

    @property
    def token(self) -> str | None:
        """The next token, or none at the end."""
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def expression(self) -> Number:
        """Terms with + and - between them."""
        total = self._signed(self._term)
        while self.token in {"+", "-"}:
            total = self._of.seen(total + self._signed(self._term))
        return total

    def _signed(self, read: Callable[[], Number]) -> Number:
        negative = False
        while self.token in {"+", "-"}:
            negative ^= self._next() == "-"
        value = read()
        negated: Number = -value
        return negated if negative else value

    def _term(self) -> Number:
        product = self._power()
        while self.token is not None:
            if self.token in _TIMES:
                self._next()
                product = self._of.seen(product * self._signed(self._power))
            elif self.token == "/":
                self._next()
                product = self._of.seen(product / self._signed(self._power))
                if self._starts_factor():
                    raise Ambiguous  # 1/2x
            elif self._starts_factor():
                if self._at_number() and not self._raised:
                    raise Ambiguous  # 2 3, x 3; but 2^5 3^4 is a product
                product = self._of.seen(product * self._power())
            else:
                break
        return product

    def _at_number(self) -> bool:
        return self.token is not None and (self.token[0].isdigit() or self.token[0] == ".")

    def _starts_factor(self) -> bool:
        token = self.token
        return token is not None and (token in _STARTS or token[0].isalnum() or token[0] == ".")

    def _power(self) -> Number:
        base = self._factor()
        while self.token == "!":
            self._next()
            base = self._of.seen(self._of.factorial(base))
            if self.token == "!":
                raise Ambiguous  # n!! is not (n!)!
        self._raised = self.token == "^"
        if not self._raised:
            return base
        self._next()
        exponent = self._exponent()
        if self.token in {"^", "!"}:
            raise Ambiguous
        self._raised = True
        return self._of.seen(self._of.power(base, exponent))

    def _exponent(self) -> Number:
        if self.token == "{":
            return self._group()
        token = self._next()
        if len(token) == 1 and token.isdigit():
            return self._of.number(token)
        if token[0].isalpha():
            return self._of.letter(token)
        raise Ambiguous  # x^10 is x^1 0 in LaTeX

    def _factor(self) -> Number:
        token = self.token
        if token in {"(", "{"}:
            return self._group()
        token = self._next()
        if token[0].isdigit() or token[0] == ".":
            return self._of.seen(self._of.number(token))
        if token[0].isalpha() or token == r"\pi":
            return self._of.letter(token)
        if token == r"\frac":
            top, bottom = self._group(), self._group()
            return self._of.seen(top / bottom)
        if token == r"\binom":
            return self._of.seen(self._of.binomial(self._group(), self._group()))
        if token == r"\sqrt":
            degree = self._group() if self.token == "[" else None
            return self._of.seen(self._of.root(self._group(), degree))
        if token in _FUNCTIONS:
            return self._function(token)
        raise Ambiguous

    def _function(self, name: str) -> Number:
        power = None
        if self.token == "^":
            self._next()
            if self._tokens[self._place : self._place + 3] == ["{", "-", "1"]:
                raise Ambiguous  # the inverse function
            power = self._exponent()
        if self.token in {"(", "{"}:
            argument = self._group()
            if self.token == "^" and self._reading and power is None:
                self._next()
                if self._reading == "outer":
                    power = self._exponent()
                else:
                    argument = self._of.power(argument, self._exponent())
            if self.token in {"^", "(", "{"}:
                raise Ambiguous  # \sin(x)^2, \sin(x)(y)
        else:
            argument = self._bare_argument()
        value = self._of.call(name, argument)
        return self._of.seen(value if power is None else self._of.power(value, power))

    def _bare_argument(self) -> Number:
        """A product of numbers and letters, as in 2x; a bracket after it is of one or the other."""
        product = None
        while self.token is not None and (self.token[0].isalnum() or self.token in {r"\pi"}):
            factor = self._power()
            product = factor if product is None else product * factor
        after = {"(", "{", "/", r"\frac", r"\sqrt", *_TIMES}
        if product is None or self.token in after:
            raise Ambiguous
        return product

    def _group(self) -> Number:
        opening = self._next()
        if opening not in _CLOSING:
            raise Ambiguous
        value = self.expression()
        if self._next() != _CLOSING[opening]:
            raise Ambiguous
        return value

    def _next(self) -> str:
        token = self.token
        if token is None:
            raise Ambiguous
        self._place += 1
        return token
