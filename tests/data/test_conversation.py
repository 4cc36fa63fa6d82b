import json

import pytest

from mcore_sft.data.sources.conversation import UnfitRow, checked, unknown_keys


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
        (
            {"role": "assistant", "content": "x", "tool_calls": json.dumps([call({"a": 1})])},
            {"role": "assistant", "content": "x", "tool_calls": [call({"a": 1})]},
        ),
        (
            {"role": "assistant", "content": "x", "tool_calls": "[]"},
            {"role": "assistant", "content": "x"},
        ),
        ({"role": "user", "content": "a", "weight": 0}, {"role": "user", "content": "a"}),
        ({"role": "assistant", "content": "a", "weight": 1}, {"role": "assistant", "content": "a"}),
        (
            {"role": "assistant", "content": "a", "thinking": "x", "reasoning_content": "x"},
            {"role": "assistant", "content": "a", "reasoning_content": "x"},
        ),
        (
            {"role": "assistant", "content": None, "thoughts": "Hm."},
            {"role": "assistant", "content": "", "thoughts": "Hm."},
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
        ({"from": "somebody", "value": "hi"}, "it is from 'somebody', expected one of human, user"),
        ({"from": "gpt", "value": None}, "role None, expected one of"),
        (
            {"from": "function_call", "value": "add"},
            "its function call 'add' is not JSON of a call",
        ),
        (
            {"role": "assistant", "tool_calls": '{"name": "add"}'},
            "tool_calls '{.*, expected a list of calls, or one as JSON text",
        ),
        ({"from": "function_call", "value": "[1]"}, "tool call 1 has no name"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight 0.5 of .*, expected 0 or 1"),
        ({"role": "assistant", "content": "a", "weight": "0"}, "weight '0' of .*, expected 0 or 1"),
        ({"role": "user", "content": "a", "weight": 1}, "weight 1 of the user, expected 0;"),
        ({"role": "user"}, "its content is None, expected text"),
        ({"role": "user", "content": 3}, "its content is 3, expected text"),
        ({"role": "user", "content": [{"type": "image"}]}, "expected parts of type text"),
        ({"role": "assistant", "content": "\n"}, "the assistant says nothing"),
        ({"role": "assistant", "tool_calls": [{"id": "c1"}]}, "has no name"),
        (
            {"role": "assistant", "content": "a", "thinking": "x", "reasoning_content": "y"},
            "its reasoning_content and thinking, expected one text",
        ),
        ({"role": "assistant", "content": "a", "thinking": [1]}, "its thinking, expected one text"),
        ({"role": "assistant", "tool_calls": [call("{")]}, "call of add are neither an object nor"),
    ],
)
def test_messages_that_cannot_be_used_are_named(message, said):
    with pytest.raises(UnfitRow, match=f"^message 2: .*{said}"):
        checked([{"role": "user", "content": "hi"}, message])


def test_answers_of_weight_0_stay_what_they_are_and_one_must_be_trained():
    answers = [{"role": "assistant", "content": "a", "weight": w} for w in (0, 1, None, False)]
    talk = checked(answers)
    assert [message.get("weight") for message in talk] == [0, None, None, 0]
    assert checked(talk) == talk
    with pytest.raises(UnfitRow, match="all its answers have weight 0"):
        checked([{"role": "user", "content": "hi"}, answers[0], answers[3]])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        *((value, False) for value in (None, " ", [], {"a": [None, ""]})),
        *((value, True) for value in (0, False, "x", [0], {"a": {"b": "x"}})),
    ],
)
def test_a_key_says_something_where_it_has_a_value(value, says):
    message = {"role": "user", "content": "x", "name": "x", "id": "x", "new": value}
    assert unknown_keys(message) == ["new"] * says


def test_from_and_value_are_read_as_role_and_content():
    told = [
        ("system", "Be brief."),
        ("human", "2 + 3?"),
        ("function_call", '{"name": "add", "arguments": {"a": 2}}'),
        ("observation", "5"),
        ("gpt", "It is 5."),
        ("tool", "?"),
        ("function_call", '[{"name": "f", "arguments": "{}"}, {"name": "g"}]'),
    ]
    talk = [{"from": speaker, "value": said} for speaker, said in told]
    talk[4]["weight"] = 0
    call, calls = ([{"name": "add", "arguments": {"a": 2}}], [{"name": n} for n in "fg"])
    assert checked(talk) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5.", "weight": 0},
        {"role": "tool", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [c | {"arguments": {}} for c in calls]},
    ]


def test_keys_that_are_ignored_are_not_there():
    message = {"role": "user", "content": "x", "score": 0.5, "at": "today", "weight": 7}
    assert checked([message], ["score", "weight"]) == [
        {"role": "user", "content": "x", "at": "today"}
    ]
