"""Messages and a Jinja chat template in, text out, rendered as transformers does it."""

import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mcore_sft.data.errors import DataError


class ChatTemplate:
    """A chat template that came with a tokenizer; it is data, and runs in a sandbox."""

    def __init__(self, source: str, *, where: Path) -> None:
        self.source = source
        self._where = where
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        # No strftime_now: what is rendered must not depend on the day. Templates that can do
        # without it, as Llama's, print a fixed date then.
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template is not valid Jinja: {error}") from None

    def render(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, tokens: dict[str, str]
    ) -> str:
        """Text of `messages`; `tokens` spells bos, eos and pad for the template."""
        spelt = {f"{role}_token": name for role, name in tokens.items()}
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **spelt,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{self._where}: the chat template refuses messages of {roles}: {error}"
            ) from None


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part; it leaves no trace in the text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
