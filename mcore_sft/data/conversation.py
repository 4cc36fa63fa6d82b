"""Who said what: the messages of a row, checked and in the one form that templates take."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mcore_sft.data.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
"""Who may speak."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one side said."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order, and the tools that an assistant may call in them."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    @classmethod
    def of(cls, problem: str, solution: str) -> "Conversation":
        """A problem and its solution."""
        said = (Message(role="user", content=problem), Message(role="assistant", content=solution))
        return cls(messages=said)


def checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates take them; `DataError` says what is wrong with which.

    Keys without a value are left out, the text parts of a content are joined, and the arguments of
    a tool call that are JSON text are read, as engines do before they render.
    """
    return [_message(number, message) for number, message in enumerate(messages, start=1)]


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(
            f"message {number}: expected an object of role and content, "
            f"found {type(message).__name__}"
        )
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"message {number}: role {role!r}, expected one of {', '.join(ROLES)}")
    plain = {key: value for key, value in message.items() if value is not None}
    calls = plain.get("tool_calls") or []
    if calls:
        plain["tool_calls"] = [_call(number, call) for call in calls]
    else:
        plain.pop("tool_calls", None)
    plain["content"] = _content(number, plain.get("content", "" if calls else None))
    if role == "assistant" and not calls and not plain["content"].strip():
        raise DataError(f"message {number}: the assistant says nothing; mend or remove the row")
    return plain


def _content(number: int, content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(number, part) for part in content)
    if not isinstance(content, str):
        raise DataError(
            f"message {number}: its content is {content!r:.60}, expected text or a list of text "
            "parts"
        )
    return content


def _part(number: int, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(
            f"message {number}: its content holds {part!r:.60}, expected parts of type text; "
            "only text is trained on"
        )
    return text


def _call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"message {number}: tool call {call!r:.60} has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise DataError(
                f"message {number}: the arguments of the call of {function['name']} are neither "
                "an object nor JSON"
            ) from None
    read = {**function, "arguments": {} if arguments is None else arguments}
    return {**call, "function": read} if "function" in call else read
