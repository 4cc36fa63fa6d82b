"""What a chat template passes over. The templates have the shape of those that many models have."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mcore_sft.config import PromptConfig
from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import Chats
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer

FOLDER = Path(__file__).parent.parent / "fixtures" / "tokenizer"

ASKS = (
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA = (
    # Contents are trimmed, tools in the first user's message, and what a tool gives is JSON.
    "{% macro head(role) %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}"
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ head('system') + 'Today Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}"
    "{% if tools %}{{ head('user') + 'Given the following functions' }}"
    "{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}"
    "{{ messages[0].content | trim + '<|eot_id|>' }}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}"
    "{{ head('ipython') + message.content | trim | tojson + '<|eot_id|>' }}"
    "{% elif 'tool_calls' in message %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}{{ head('assistant') }}"
    '{{ \'{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson + '}<|eot_id|>' }}"
    "{% else %}{{ head(message.role) + message.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
) + ASKS

QWEN = (
    # One system block with the tools in it; content and calls in one turn; tools answer as users.
    "{% macro head(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n' }}{% endmacro %}"
    "{% set has_system = messages[0].role == 'system' %}"
    "{{ head('system') + (messages[0].content if has_system else 'You are helpful.') }}"
    "{% if tools %}{{ '\n\n# Tools\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}"
    "{{ '<|eot_id|>\n' }}"
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{{ head('user') + '<tool_response>\n' + message.content + '\n</tool_response><|eot_id|>\n' }}"
    "{% elif message.tool_calls %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}"
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}"
    "{% for call in message.tool_calls %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|eot_id|>\n' }}"
    "{% elif not loop.first or message.role != 'system' %}"
    "{{ head(message.role) + message.content + '<|eot_id|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n' + message.content }}"
    "{{ '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}{% endif %}"
)

MISTRAL = (
    # No role of the system's, whose words go to the user; nothing is added to ask for an answer.
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{% if loop.first and tools %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' }}"
    "{% elif message.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}"
    "{% if call.id is not defined or call.id | length != 9 %}"
    "{{ raise_exception('ids of calls have 9 characters') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{% endfor %}{{ ']<|eot_id|>' }}"
    "{% elif message.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + message.content + '}[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + message.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)

THINKS = CHATML.replace(
    "message.content }}",
    "('<think>' + message.thoughts + '</think>' if message.thoughts else '') + message.content }}",
)
# The prompt opens the thoughts; they stand in the content, and are taken apart and written anew.
OPENS = (
    "{% for message in messages %}{% set halves = message.content.split('</think>') %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% set thoughts = halves[0].split('<think>')[-1] if halves | length > 1 else '' %}"
    "{{ '<think>\n' + thoughts.strip() + '\n</think>\n\n' }}{% endif %}"
    "{{ halves[-1].strip() + '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n<think>\n' }}{% endif %}"
)
# Others throw them away.
FORGETS = CHATML.replace("message.content", "message.content.split('</think>')[-1]")

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def said(role: str, content: str | None, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def call(**arguments: object) -> list[dict]:
    function = {"name": "add", "arguments": json.dumps(arguments)}
    return [{"id": "abcdefghi", "type": "function", "function": function}]


TALKS = {
    "white space": [said("user", " 1 + 1?\n"), said("assistant", "\n\nIt is\t 2. \n")],
    "signs": [said("user", 'say "\\"\n\u00e9\u2028'), said("assistant", "\"\\'\n\u00e9</s> {}")],
    "turns": [
        said("system", " Count.\n"),
        said("user", "1?"),
        said("assistant", "one", name="x", id="7", reasoning=None, audio={}, refusal=""),
        said("user", "2?", weight=0),
        said("assistant", "two", weight=1),
    ],
}
CALLS = {
    "call": [
        said("user", "1 + 1?"),
        said("assistant", None, tool_calls=call(a=1, b=[1.5, True, None, {"c d": "x"}])),
        said("tool", '{"sum": "2\\n"}\n', tool_call_id="abcdefghi"),
        said("assistant", "It is 2."),
    ],
    "escaped": [
        said("user", "1 + 1?"),
        said("assistant", "", tool_calls=call(text=' "a"\n\t\\b \u00e9\u2028\U0001f600\' ')),
    ],
    "nothing given": [
        said("user", "1?"),
        said("assistant", "", tool_calls=[{"id": "abcdefghi", "function": {"name": "add"}}]),
    ],
}


def prompt(template: str, folder: Path) -> Prompt:
    shutil.copy(FOLDER / "tokenizer.json", folder)
    config = {"bos_token": "<|begin_of_text|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    wanted = PromptConfig(template="chat", instruction=None)
    return Prompt.load(wanted, load_tokenizer(folder))


def text(made: Prompt, messages: list[dict], tools: list[dict] | None = None) -> str:
    rows = Chats(name="a.jsonl", numbers=np.array([7]), messages=[messages], tools=[tools])
    examples, dropped = made.encode(rows)
    assert (len(examples), dropped) == (1, {})
    return made._tokenizer.decode(examples.tokens.tolist())


@pytest.mark.parametrize("template", [LLAMA, QWEN, CHATML, MISTRAL, THINKS])
@pytest.mark.parametrize("talk", TALKS)
def test_what_templates_do_to_messages_is_no_loss(template, talk, tmp_path):
    assert text(prompt(template, tmp_path), TALKS[talk])


@pytest.mark.parametrize("template", [LLAMA, QWEN, MISTRAL])
@pytest.mark.parametrize("talk", CALLS)
def test_what_templates_do_to_tools_and_calls_is_no_loss(template, talk, tmp_path):
    assert '"add"' in text(prompt(template, tmp_path), CALLS[talk], [TOOL])


@pytest.mark.parametrize("way", ["| tojson(ensure_ascii=true)", "| string"])
@pytest.mark.parametrize("talk", CALLS)
def test_arguments_may_be_escaped_as_json_or_python_do_it(talk, way, tmp_path):
    template = QWEN.replace("arguments | tojson", f"arguments {way}")
    assert '"add"' in text(prompt(template, tmp_path), CALLS[talk], [TOOL])


@pytest.mark.parametrize("template", [LLAMA, QWEN, CHATML, MISTRAL])
def test_problems_and_solutions_are_no_loss(template, tmp_path):
    made = prompt(template, tmp_path)
    assert made.text("1 + 1?\n") + made.answer("1 + 1?\n", "\n 2") in text(
        made, [said("user", "1 + 1?\n"), said("assistant", "\n 2")]
    )


def test_thoughts_that_the_prompt_opens_are_no_loss(tmp_path):
    made = prompt(OPENS, tmp_path)
    messages = [said("user", "1?"), said("assistant", "<think>Hm.</think>one")]
    assert text(made, messages).endswith("<think>\nHm.\n</think>\n\none<|eot_id|>")
    assert text(made, [said("user", "1?"), said("assistant", "one")])


NO_TOOLS = "makes nothing of its tool_calls"


@pytest.mark.parametrize(
    ("template", "messages", "tools", "error"),
    [
        (CHATML, CALLS["call"], None, f"message 2: the chat template {NO_TOOLS}"),
        (
            CHATML,
            [said("user", "1?"), said("assistant", "add: a 1", tool_calls=call(a=1))],
            None,
            f"message 2: the chat template {NO_TOOLS}",
        ),
        (CHATML, TALKS["turns"], [TOOL], "leaves out the tool 'add'"),
        (
            CHATML,
            [said("user", "add"), said("assistant", "2")],
            [TOOL],
            "leaves out the tool 'add'",
        ),
        (
            QWEN.replace("for tool in tools", "for tool in tools[:1]"),
            TALKS["turns"],
            [TOOL, {"type": "function", "function": {"name": "subtract"}}],
            "leaves out the tool 'subtract'",
        ),
        (
            LLAMA,
            [said("user", "1?"), said("assistant", "I will call.", tool_calls=call(a=1))],
            [TOOL],
            r"message 2: the chat template leaves out its content \('I will call\.'\)",
        ),
        (
            QWEN.replace("call.function.arguments | tojson", "'{'"),
            CALLS["call"],
            [TOOL],
            r"message 2: .* leaves out its argument of add \('b'\)",
        ),
        (
            QWEN.replace("message.content + '\n</tool", "message.content[:5] + '\n</tool"),
            CALLS["call"],
            [TOOL],
            r"message 3: .* leaves out its content \('{\"sum\"",
        ),
        (
            CHATML.replace("message.content", "message.content * (message.role != 'system')"),
            TALKS["turns"],
            None,
            r"message 1: .* leaves out its content \(' Count",
        ),
        (
            FORGETS,
            [said("user", "1?"), said("assistant", "<think>Hm.</think>one")],
            None,
            r"message 2: .* leaves out its content \('<think>Hm",
        ),
        (
            CHATML.replace("message.content", "message.content * (not message.odd)"),
            [said("user", "1?"), said("assistant", "one", odd=True)],
            None,
            r"message 2: .* makes nothing but <\|eot_id\|> of it",
        ),
        (
            LLAMA,
            [said("user", "1?"), said("assistant", "", tool_calls=2 * call())],
            None,
            "one call",
        ),
    ],
)
def test_what_a_chat_template_passes_over_is_named(template, messages, tools, error, tmp_path):
    with pytest.raises(DataError, match=rf"^a\.jsonl:7: .*{error}"):
        text(prompt(template, tmp_path), messages, tools)


FLAG = r"\(weight: 0 marks an answer that is not to be trained\)"


@pytest.mark.parametrize("template", ["llama3-instruct", CHATML])
@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("reasoning_content", "Hm.", r"reasoning_content \('Hm\.'\)"),
        ("function_call", {"name": "add", "arguments": "{}"}, r"function_call \(\{'name'"),
        ("train", False, rf"train \(False\).* {FLAG}"),
        ("loss", 0.0, rf"loss \(0\.0\).* {FLAG}"),
    ],
)
@pytest.mark.parametrize("content", ["one", None])
def test_keys_that_no_template_knows_are_named(template, key, value, error, content, tmp_path):
    made = prompt(CHATML, tmp_path)
    if template != CHATML:
        wanted = PromptConfig(template=template, instruction="generic/math")
        made = Prompt.load(wanted, load_tokenizer(FOLDER))
    answer = said("assistant", content, **{key: value})
    with pytest.raises(
        DataError, match=rf"^a\.jsonl:7: message 2: .* makes nothing of its {error}"
    ):
        text(made, [said("user", "1?"), answer])


def test_keys_that_the_template_knows_are_used(tmp_path):
    messages = [said("user", "1?"), said("assistant", "one", thoughts="Hm.")]
    wanted = "<think>Hm.</think>one<|eot_id|>"
    assert wanted in text(prompt(THINKS, tmp_path), messages)
    needed = THINKS.replace("if message.thoughts", "if message.role == 'assistant'")
    needed = needed.replace("message.thoughts +", "message.get('thoughts', ' ' * 1) +")
    assert wanted in text(prompt(needed, tmp_path), messages)
