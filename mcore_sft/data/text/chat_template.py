"""Messages and a Jinja chat template in, text out, rendered as transformers does it."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.conversation import REASONING, UnfitRow

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A chat template that came with a tokenizer; it is data, and runs in a sandbox.

    tokens: how bos_token, eos_token, ... are spelt. variables: what else it is given by name. date:
    the day that it is told where it asks for today's, which what is rendered must not depend on;
    without one, templates that can do without, as Llama's, print a date of their own.
    marks_answers: whether `{% generation %}` says in it which text is the assistant's.
    """

    def __init__(
        self,
        source: str,
        *,
        where: Path,
        tokens: Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        self.source = source
        self.variables = variables or {}
        self.date = date
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        self.where = where
        self._tokens = tokens
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = date.strftime if date else _no_date(where)
        try:
            self._template = environment.from_string(source)
            # As one dict: it is copied for every text.
            self._template.globals = dict(self._template.globals)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template is not valid Jinja: {error}") from None

    def given(self, variables: Mapping[str, Any], date: datetime.date | None) -> "ChatTemplate":
        """The same template, given `variables` and told `date`; `DataError` if it cannot be."""
        for name in variables:
            if name in _TAKEN or not name.isidentifier():
                raise DataError(
                    f"prompt.variables: {name!r} is not a name of its own in a chat template. Fix: "
                    "take it away (the day is prompt.date)"
                )
        return ChatTemplate(
            self.source, where=self.where, tokens=self._tokens, variables=variables, date=date
        )

    def render(
        self, messages: Messages, *, tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Text of `messages`; `UnfitRow` if the template refuses them."""
        return self._render(messages, tools, add_generation_prompt, ("", ""))

    def render_marked(
        self, messages: Messages, *, tools: Tools | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text of `messages`, and where in it each `{% generation %}` begins and ends."""
        plain = self.render(messages, tools=tools)
        # Noncharacters mark the places: the first two that the text itself does not hold.
        begin, end = [mark for mark in map(chr, range(0xFDD0, 0xFDF0)) if mark not in plain][:2]
        marked = self._render(messages, tools, False, (begin, end))
        if marked.replace(begin, "").replace(end, "") != plain:
            raise DataError(
                f"{self.where}: the chat template does something to what stands in its "
                "{% generation %} blocks, so they cannot say what is trained"
            )
        first, *others = marked.split(begin)
        spans, length = [], len(first)
        for other in others:
            answer, _, rest = other.partition(end)
            spans.append((length, length + len(answer)))
            length += len(answer) + len(rest)
        return plain, spans

    def _render(
        self,
        messages: Messages,
        tools: Tools | None,
        add_generation_prompt: bool,
        marks: tuple[str, str],
    ) -> str:
        try:
            return self._template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                generation_marks=marks,
                **{**self._tokens, **self.variables},
            )
        except DataError:
            raise
        except Exception as error:  # a template is a program
            roles = ", ".join(message["role"] for message in messages)
            raise UnfitRow(
                f"{self.where}: the chat template refuses messages of {roles}: {error}"
            ) from None


_TAKEN = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
)


def _no_date(where: Path) -> jinja2.Undefined:
    """What a template finds undefined, and what says how to define it where it is called."""
    return jinja2.Undefined(
        hint=f"{where}: the chat template asks for today's date, but nothing says which day that "
        "is. Fix: prompt.date=YYYY-MM-DD, which the dataset and the exported model keep",
        exc=DataError,  # type: ignore[arg-type]
    )


class _Environment(ImmutableSandboxedEnvironment):
    """Finds the keys of messages where the sandbox would first look for attributes, as it would."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute` of a template."""
        if type(obj) is not dict or attribute in _OF_DICT:
            return super().getattr(obj, attribute)
        try:
            return obj[attribute]
        except KeyError:
            return self.undefined(obj=obj, name=attribute)


_OF_DICT = frozenset(dir(dict))


class _Generation(Extension):
    """`{% generation %}` holds the assistant's part, which stands between two marks, or none."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.Name("generation_marks", "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, marks: tuple[str, str], caller: Any) -> str:
        begin, end = marks
        return f"{begin}{caller()}{end}"


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose reasoning has both names that templates know, as transformers gives it."""
    given = [message[key] for key in REASONING if message.get(key) is not None]
    return {"thinking": given[0], **message, "reasoning_content": given[0]} if given else message


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
