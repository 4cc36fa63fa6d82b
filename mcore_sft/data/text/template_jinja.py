"""What was trained in, a Jinja chat template that writes the same by itself out, for servers.

A template of fixed strings as Jinja; a chat template with the variables and the day it was given.

Rendered by transformers it gives the text that was trained, to the letter. What the template has no
markup for is an error there too, and is not left out.
"""

import datetime
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mcore_sft.data.text.render import Template

_CONTENT = """\
{%- if message["content"] is string -%}
{{- message["content"] -}}
{%- elif not message["content"] -%}
{{- raise_exception("a message of role " ~ message["role"] ~ " has no content") -}}
{%- else -%}
{%- for part in message["content"] -%}
{%- if part["type"] != "text" -%}
{{- raise_exception("a content of type " ~ part["type"] ~ " has no markup in this template") -}}
{%- endif -%}
{{- part["text"] -}}
{%- endfor -%}
{%- endif -%}
"""

_REFUSE = """\
{%- if tools -%}
{{- raise_exception("tools have no markup in this template") -}}
{%- endif -%}
{%- if documents -%}
{{- raise_exception("documents have no markup in this template") -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message["role"] == "system" and not loop.first -%}
{{- raise_exception("a system message stands after others; expected it first") -}}
{%- endif -%}
{%- if message["role"] not in ["system", "user", "assistant"] -%}
{{- raise_exception("a message of role " ~ message["role"] ~ " has no markup here") -}}
{%- endif -%}
{%- for key in message -%}
{%- if key not in ["role", "content", "weight", "name", "id", "tool_call_id"] -%}
{%- if message[key] is not none and message[key] | string | trim not in ["", "[]", "{}"] -%}
{{- raise_exception("the key " ~ key ~ " of a message has no markup in this template") -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
"""

_TEXT_OF_SYSTEM = (
    '(message["content"] if message["content"] is string '
    'else message["content"] | map(attribute="text") | join)'
)


def chat_template(template: Template, stopped: str) -> str:
    """Jinja that writes conversations as `template` does; the last answer ends with `stopped`.

    `stopped` is `assistant_end` up to the stop token, behind which nothing is trained.
    """
    return "".join(_lines(template, stopped))


def with_given(source: str, variables: Mapping[str, Any], date: datetime.date | None) -> str:
    """A chat template that has `variables` where it is given none, and takes `date` for today.

    Without a `date` it finds none, as in training.
    """
    lines = [
        f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in variables.items()
    ]
    if date is not None:
        forms = {form: date.strftime(form) for _, form in _ASKED.findall(source)}
        lines.append(
            "{%- macro strftime_now(form) -%}"
            f"{{{{ {_literal(forms)}[form] }}}}{{%- endmacro %}}\n"
        )
    elif "strftime_now" in source:
        lines.append("{%- set strftime_now = no_day_was_given %}\n")
    return "".join(lines) + source


_ASKED = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def _literal(value: Any) -> str:
    """A JSON value as Jinja reads it."""
    if isinstance(value, Mapping):
        parts = (f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items())
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _lines(template: Template, stopped: str) -> Iterator[str]:
    yield "{#- The markup that this model was trained with, written by mcore_sft. -#}\n"
    yield _REFUSE
    yield _write(template.text_begin)
    if not template.system_optional:
        yield '{%- if not messages or messages[0]["role"] != "system" -%}\n'
        yield _write(template.system_begin + template.system_end)
        yield "{%- endif -%}\n"
    yield "{%- for message in messages -%}\n"
    yield '{%- if message["role"] == "system" -%}\n'
    if template.system_optional:
        yield f"{{%- if {_TEXT_OF_SYSTEM} -%}}\n"
    yield _write(template.system_begin) + _CONTENT + _write(template.system_end)
    if template.system_optional:
        yield "{%- endif -%}\n"
    yield '{%- elif message["role"] == "user" -%}\n'
    yield _write(template.user_begin) + _CONTENT + _write(template.user_end)
    yield "{%- else -%}\n"
    yield _write(template.assistant_begin) + _CONTENT
    yield "{%- if loop.last and not add_generation_prompt -%}\n"
    yield _write(stopped) + "{%- else -%}\n" + _write(template.assistant_end)
    yield "{%- endif -%}\n{%- endif -%}\n{%- endfor -%}\n"
    yield "{%- if add_generation_prompt -%}\n"
    yield _write(template.assistant_begin) + "{%- endif -%}\n"


def _write(text: str) -> str:
    """What writes `text` itself: Jinja reads a string's escapes as JSON writes them."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}\n" if text else ""
