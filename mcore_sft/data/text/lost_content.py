"""A conversation and the text that a template made of it in; an error out if something is missing.

A chat template is a program: what it does not know, such as tools or a call, it passes over. What
is left of such a row would be trained all the same.
"""

import json
from collections.abc import Container, Iterator, Mapping
from typing import Any

from mcore_sft.data.sources.conversation import UnfitRow, texts_in, unknown_keys
from mcore_sft.data.text.chat_template import ChatTemplate, Messages, Tools


def require_written(
    template: ChatTemplate,
    messages: Messages,
    tools: Tools | None,
    text: str,
    answers: Mapping[int, tuple[int, int]],
    *,
    stop: str,
) -> None:
    """`UnfitRow` if `text` does not hold, each in its turn, all that a conversation says.

    answers: where in the text the trained ones stand, stop token included, by their message. Those
    that are not trained are context, which is as the template writes it. White space does not
    count, and texts may be escaped as in JSON or Python.
    """
    _require_keys(template, messages, tools, text, answers)
    _require_tools(template, messages, tools, text)
    first, done = 0, 0
    for last, (begin, end) in answers.items():
        before, body = text[done:begin], text[begin:end].removesuffix(stop)
        for index in range(first, last):
            if messages[index]["role"] != "assistant":
                _require(messages[index], index + 1, before)
        if not body.strip():
            raise UnfitRow(
                f"message {last + 1}: the chat template makes nothing but {stop} of it; mend the "
                "row, or name another prompt.template"
            )
        try:
            _require(messages[last], last + 1, body)
        except UnfitRow:
            # Where an answer begins with thoughts, what opens them may belong to the prompt.
            said = template.render(messages[:last], tools=tools)
            if not text.startswith(said):
                raise
            _require(messages[last], last + 1, text[len(said) : end].removesuffix(stop))
        first, done = last + 1, end


def passed_over(who: str, number: int, message: Mapping[str, Any], key: str) -> UnfitRow:
    """The error where the template `who` does not know the `key` of a message."""
    value = message[key]
    flag = isinstance(value, int | float)
    hint = " (weight: 0 marks an answer that is not to be trained)" if flag else ""
    return UnfitRow(
        f"message {number}: {who} makes nothing of its {key} ({value!r:.60}); say it in content, "
        f"name it in the source's ignore_keys{hint}, or name another prompt.template"
    )


def _require(message: Mapping[str, Any], number: int, written: str) -> None:
    for what, text in _parts(message):
        if not _holds(written, text):
            raise UnfitRow(
                f"message {number}: the chat template leaves out its {what} ({text!r:.60}), or a "
                "part of it; mend the row, or name another prompt.template"
            )


def _parts(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All that must be found of a message: what it is, and its text."""
    yield "content", message["content"]
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        yield "tool call", function["name"]
        for text in texts_in(function["arguments"]):
            yield f"argument of {function['name']}", text


def _holds(written: str, text: str) -> bool:
    text = text.strip()
    if text in written:
        return True
    forms = (
        text,
        json.dumps(text)[1:-1],
        json.dumps(text, ensure_ascii=False)[1:-1],
        repr(text)[1:-1],
    )
    squeezed = "".join(written.split())
    return any("".join(form.split()) in squeezed for form in forms)


def _require_tools(
    template: ChatTemplate, messages: Messages, tools: Tools | None, text: str
) -> None:
    if not tools:
        return
    used = _writes_otherwise(template, messages, None, text)  # a name may occur by chance
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not used or (isinstance(name, str) and not _holds(text, name)):
            raise UnfitRow(
                f"the chat template leaves out the tool {name or tool!r:.60}; take the tools away, "
                "or name another prompt.template"
            )


def _require_keys(
    template: ChatTemplate,
    messages: Messages,
    tools: Tools | None,
    text: str,
    answers: Container[int],
) -> None:
    """`UnfitRow` if the template writes the same without a key that it would have to know."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index not in answers:
            continue
        calls = ["tool_calls"] if "tool_calls" in message else []
        for key in (*calls, *unknown_keys(message)):
            rest = {name: value for name, value in message.items() if name != key}
            others = [*messages[:index], rest, *messages[index + 1 :]]
            if not _writes_otherwise(template, others, tools, text):
                raise passed_over("the chat template", index + 1, message, key)


def _writes_otherwise(
    template: ChatTemplate, messages: Messages, tools: Tools | None, text: str
) -> bool:
    try:
        return template.render(messages, tools=tools) != text
    except UnfitRow:  # it cannot do without
        return True
