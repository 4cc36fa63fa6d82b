import pytest

from mcore_sft.data.conversation import checked
from mcore_sft.data.errors import DataError


def call(arguments, **more):
    return {"id": "c1", "function": {"name": "add", "arguments": arguments}, **more}


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"role": "user", "content": " a "}, {"role": "user", "content": " a "}),
        ({"role": "user", "content": "a", "name": None}, {"role": "user", "content": "a"}),
        (
            {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
            {"role": "user", "content": "ab"},
        ),
        (
            {"role": "tool", "content": "3", "tool_call_id": "c1", "tool_calls": []},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [call('{"a": [1, null]}')]},
            {"role": "assistant", "tool_calls": [call({"a": [1, None]})], "content": ""},
        ),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"name": "now"}]},
            {
                "role": "assistant",
                "content": "x",
                "tool_calls": [{"name": "now", "arguments": {}}],
            },
        ),
    ],
)
def test_messages_as_templates_take_them(message, wanted):
    assert checked([message]) == [wanted]
    assert checked(checked([message])) == [wanted]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("hi", "expected an object of role and content, found str"),
        ({"content": "hi"}, "role None, expected one of system, user, assistant, tool"),
        ({"role": "gpt", "content": "hi"}, "role 'gpt', expected one of"),
        ({"role": "user"}, "its content is None, expected text"),
        ({"role": "user", "content": 3}, "its content is 3, expected text"),
        ({"role": "user", "content": [{"type": "image"}]}, "expected parts of type text"),
        ({"role": "assistant", "content": "\n"}, "the assistant says nothing"),
        ({"role": "assistant", "tool_calls": [{"id": "c1"}]}, "has no name"),
        ({"role": "assistant", "tool_calls": [call("{")]}, "call of add are neither an object nor"),
    ],
)
def test_messages_that_cannot_be_used_are_named(message, said):
    with pytest.raises(DataError, match=f"^message 2: .*{said}"):
        checked([{"role": "user", "content": "hi"}, message])
