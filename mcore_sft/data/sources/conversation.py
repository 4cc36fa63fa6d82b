"""Who said what: the messages of a row, checked and in the one form that templates take."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mcore_sft.base import json_text
from mcore_sft.data.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
"""Who may speak."""

# Who speaks in ShareGPT's files, and in those that followed them.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
    "system": "system",
}

# Keys of a message that say nothing by themselves stay without effect where no template asks.
_KNOWN = ("role", "content", "tool_calls", "weight", "name", "id", "tool_call_id")


REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys that hold what an assistant thinks; templates read the first two, and transformers gives
them either."""


class UnfitRow(DataError):
    """What is wrong with one row, and not with the configuration: a run may leave such out."""


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


def checked(
    messages: Sequence[Mapping[str, Any]], ignored: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Messages as templates take them; `UnfitRow` says what is wrong with which.

    Keys without a value are left out, and so are those `ignored`; from and value, as ShareGPT has
    them, become role and content; the text parts of a content are joined, and the arguments of a
    tool call that are JSON text are read, as engines do before they render. Of the weights, those
    stay that are 0: their answers are not trained.
    """
    read = [_message(number, message, ignored) for number, message in enumerate(messages, start=1)]
    answers = [message for message in read if message["role"] == "assistant"]
    if answers and not any(map(is_trained, answers)):
        raise UnfitRow("all its answers have weight 0, so that there is nothing to learn")
    return read


def system_text(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The system message that a conversation begins with; None if it begins otherwise."""
    first = messages[0] if messages else {}
    return _content(1, first.get("content")) if first.get("role") == "system" else None


def is_trained(answer: Mapping[str, Any]) -> bool:
    """Whether a checked message of an assistant is learned."""
    return "weight" not in answer


def reasoning_of(message: Mapping[str, Any]) -> str | None:
    """What the assistant of a checked message thinks, if a key of its own says so."""
    return next((message[key] for key in REASONING if message.get(key)), None)


def unknown_keys(message: Mapping[str, Any]) -> list[str]:
    """Keys of a message that say something in a way that only some template may know."""
    return [key for key, value in message.items() if key not in _KNOWN and _says_something(value)]


def texts_in(value: Any) -> list[str]:
    """Every text in `value`, keys included."""
    texts: list[str] = []
    _collect_texts(value, texts)
    return texts


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """Every text of a message, but what all messages have: their keys, and who speaks."""
    texts = [key for key in message if key not in _KNOWN]
    for key, value in message.items():
        if key != "role":
            _collect_texts(value, texts)
    return texts


def _collect_texts(value: Any, texts: list[str]) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict | Mapping):
        for key, inner in value.items():
            _collect_texts(key, texts)
            _collect_texts(inner, texts)
    elif isinstance(value, Sequence):
        for inner in value:
            _collect_texts(inner, texts)


def _says_something(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(_says_something, value.values()))
    if isinstance(value, Sequence):
        return any(map(_says_something, value))
    return value is not None


def _message(number: int, message: Any, ignored: Collection[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UnfitRow(
            f"message {number}: expected an object of role and content, "
            f"found {type(message).__name__}"
        )
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str) and content.strip() and len(message) == 2 and role in ROLES:
        return {"role": role, "content": content}
    plain = {key: said for key, said in message.items() if said is not None and key not in ignored}
    if "role" not in plain and {"from", "value"} <= plain.keys():
        plain = _of_sharegpt(number, plain)
    role = plain.get("role")
    if role not in ROLES:
        raise UnfitRow(f"message {number}: role {role!r}, expected one of {', '.join(ROLES)}")
    if not _is_learned(number, role, plain.pop("weight", None)) and role == "assistant":
        plain["weight"] = 0
    _keep_one_reasoning(number, plain)
    calls = _calls(number, plain.get("tool_calls"))
    if calls:
        plain["tool_calls"] = [_call(number, call) for call in calls]
    else:
        plain.pop("tool_calls", None)
    otherwise = bool(calls or unknown_keys(plain))  # which the template is to know
    plain["content"] = _content(number, plain.get("content", "" if otherwise else None))
    if role == "assistant" and not otherwise and not plain["content"].strip():
        raise UnfitRow(f"message {number}: the assistant says nothing; mend or remove the row")
    return plain


def _keep_one_reasoning(number: int, message: dict[str, Any]) -> None:
    """Take the others away where several keys hold what an assistant thinks."""
    given = [key for key in REASONING if message.get(key)]
    same = all(message[key] == message[given[0]] for key in given)
    if given and not (same and isinstance(message[given[0]], str)):
        raise UnfitRow(
            f"message {number}: its {' and '.join(given)}, expected one text of its reasoning; "
            "mend or remove the row"
        )
    for key in given[1:]:
        del message[key]


def _of_sharegpt(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of from and value as one of role and content, or of tool calls."""
    rest = {key: said for key, said in message.items() if key not in ("from", "value")}
    speaker, said = message["from"], message["value"]
    if speaker not in _SPEAKERS:
        raise UnfitRow(
            f"message {number}: it is from {speaker!r:.60}, expected one of {', '.join(_SPEAKERS)}"
        )
    if speaker != "function_call":
        return {"role": _SPEAKERS[speaker], "content": said, **rest}
    try:
        calls = json_text.loads(said) if isinstance(said, str) else said
    except ValueError:
        calls = None
    if not isinstance(calls, list | dict):
        raise UnfitRow(f"message {number}: its function call {said!r:.60} is not JSON of a call")
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": "", "tool_calls": calls, **rest}


def _is_learned(number: int, role: str, weight: Any) -> bool:
    """What `weight` says, as OpenAI's files for fine-tuning have it."""
    if weight is None:
        return role == "assistant"
    expected = (0, 1) if role == "assistant" else (0,)
    if weight not in expected:
        raise UnfitRow(
            f"message {number}: weight {weight!r:.60} of the {role}, expected "
            f"{' or '.join(map(str, expected))}; answers are trained wholly or not at all, and "
            "nothing else is"
        )
    return bool(weight)


def _content(number: int, content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(number, part) for part in content)
    if not isinstance(content, str):
        raise UnfitRow(
            f"message {number}: its content is {content!r:.60}, expected text or a list of text "
            "parts"
        )
    return content


def _part(number: int, part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise UnfitRow(
            f"message {number}: its content holds {part!r:.60}, expected parts of type text; "
            "only text is trained on"
        )
    return text


def _calls(number: int, calls: Any) -> Sequence[Any]:
    """The calls of a message; JSON text, as tables hold them, is read."""
    read = calls or []
    if isinstance(calls, str):
        try:
            read = (json_text.loads(calls) or []) if calls.strip() else []
        except ValueError:
            read = None
    if isinstance(read, Sequence) and not isinstance(read, str):
        return read
    raise UnfitRow(
        f"message {number}: tool_calls {calls!r:.60}, expected a list of calls, or one as JSON text"
    )


def _call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnfitRow(f"message {number}: tool call {call!r:.60} has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json_text.loads(arguments)
        except ValueError:
            raise UnfitRow(
                f"message {number}: the arguments of the call of {function['name']} are neither "
                "an object nor JSON"
            ) from None
    read = {**function, "arguments": {} if arguments is None else arguments}
    return {**call, "function": read} if "function" in call else read
