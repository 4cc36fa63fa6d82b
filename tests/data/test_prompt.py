import datetime
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from mcore_sft import config as configuration
from mcore_sft.config import ConfigError, parse_section
from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import Chats, Examples, Pairs
from mcore_sft.data.sources.conversation import Conversation, Message
from mcore_sft.data.text import chat_files
from mcore_sft.data.text.chat import require_asked
from mcore_sft.data.text.chat_template import ChatTemplate
from mcore_sft.data.text.prompt import MANY_BOS, NO_STOP, Prompt
from mcore_sft.data.text.render import read_instruction
from mcore_sft.data.text.talks import NO_ANSWER, SPECIAL_IN_TEXT
from mcore_sft.data.text.tokenizer import Tokenizer, load_tokenizer
from tests.prompts import MathPrompt as PromptConfig

FOLDER = Path(__file__).parent.parent / "fixtures" / "tokenizer"
SEED = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
    "Solve the following math problem. Make sure to put the answer (and only answer) inside "
    "\\boxed{}.\n\nWhat is {1} + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return Prompt.load(PromptConfig(), tokenizer)


def test_seed_prompt_to_the_letter(prompt, tokenizer):
    assert prompt.text("What is {1} + 1?") == SEED
    ids = prompt.prompt_ids("What is {1} + 1?")
    assert ids == tokenizer.encode(SEED)
    assert ids.count(tokenizer.bos_id) == 1
    assert prompt.stop_tokens == ("<|eot_id|>",)
    assert prompt.stop_ids == (tokenizer.token_id("<|eot_id|>"),)


def test_example_is_prompt_then_solution_with_its_stop(prompt, tokenizer):
    example = prompt.example(Conversation.of("What is {1} + 1?", " 2 \n"))
    asked = prompt.prompt_ids("What is {1} + 1?")
    assert example.tokens.tolist() == asked + tokenizer.encode(" 2 \n<|eot_id|>")
    assert example.spans.tolist() == [[len(asked), len(example)]]


def pairs(*texts: tuple[str, str]) -> Pairs:
    problems, solutions = zip(*texts, strict=True) if texts else ((), ())
    return Pairs(
        name="a.jsonl",
        numbers=np.arange(len(texts)) + 1,
        problems=pa.array(problems, pa.large_string()),
        solutions=pa.array(solutions, pa.large_string()),
    )


def chats(*messages: list, tools: list | None = None) -> Chats:
    return Chats(
        name="a.jsonl", numbers=np.arange(len(messages)) + 1, messages=messages, tools=tools
    )


def said(*texts: str, system: str | None = None) -> list[dict]:
    """A conversation in which user and assistant speak in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def pieces(examples: Examples, tokenizer, number: int = 0) -> list[str]:
    """The text of an example, untrained and trained in turn."""
    one = examples.keep(np.arange(len(examples)) == number)
    cuts = [0, *one.spans.flatten().tolist(), len(one.tokens)]
    texts = (tokenizer.decode(one.tokens[a:b]) for a, b in pairwise(cuts))
    return list(texts)


def test_columns_are_one_by_one(prompt, tokenizer):
    texts = [(f"What is {i % 9} + Łukasz? 😀", f" It is\n{i % 9 + 1}.") for i in range(90)]
    whole = pairs(("cut off", "too"), *texts)
    sliced = Pairs(
        name="a.jsonl",
        numbers=whole.numbers[1:],
        problems=whole.problems[1:],
        solutions=whole.solutions[1:],
    )
    examples, dropped = prompt.encode(sliced)
    assert dropped == {}
    assert examples.rows.tolist() == list(range(90))
    asked = [tokenizer.encode(prompt.text(problem)) for problem, _ in texts]
    learned = [tokenizer.encode(solution + "<|eot_id|>") for _, solution in texts]
    both = list(zip(asked, learned, strict=True))
    assert examples.tokens.tolist() == [i for a, b in both for i in (*a, *b)]
    assert examples.lengths.tolist() == [len(a) + len(b) for a, b in both]
    assert examples.spans.tolist() == [[len(a), len(a) + len(b)] for a, b in both]
    assert examples.span_counts.tolist() == [1] * 90
    assert examples.tokens.dtype == examples.spans.dtype == examples.lengths.dtype == np.int32
    assert asked == [prompt.prompt_ids(problem) for problem, _ in texts]


def test_no_rows_no_examples(prompt, tokenizer):
    chat = Prompt.load(PromptConfig(template="chat"), tokenizer)
    for examples, dropped in (prompt.encode(pairs()), chat.encode(pairs()), chat.encode(chats())):
        assert (len(examples), len(examples.tokens), dropped) == (0, 0, {})
        assert examples.spans.shape == (0, 2)


@pytest.mark.parametrize("template", ["llama3-instruct", "chat"])
@pytest.mark.parametrize(
    ("problem", "solution"), [("a <|eot_id|> b", "2"), ("a", "2<|begin_of_text|>")]
)
def test_text_that_spells_a_special_token_is_dropped(tokenizer, template, problem, solution):
    prompt = Prompt.load(PromptConfig(template=template), tokenizer)
    examples, dropped = prompt.encode(pairs(("1?", "2"), (problem, solution), ("3?", "4")))
    assert dropped == {1: SPECIAL_IN_TEXT}
    assert examples.rows.tolist() == [0, 2]
    assert (
        examples.tokens.tolist()
        == prompt.encode(pairs(("1?", "2"), ("3?", "4")))[0].tokens.tolist()
    )
    with pytest.raises(DataError, match=r"dropped \(special token in text\)"):
        prompt.example(Conversation.of(problem, solution))


def mine(tmp_path: Path, tokenizer, **template: object) -> Prompt:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(template), encoding="utf-8")
    return Prompt.load(PromptConfig(template=str(file), instruction=None), tokenizer)


def test_text_that_makes_a_special_token_with_the_markup_is_dropped(tokenizer, tmp_path):
    eot = {"assistant_end": "<|eot_id|>", "stop_phrases": ["<|eot_id|>"]}
    prompt = mine(tmp_path, tokenizer, user_begin="<|eot_", **eot)
    examples, dropped = prompt.encode(pairs(("id|> x", "2"), ("id |> x", "2")))
    assert dropped == {0: SPECIAL_IN_TEXT}
    assert examples.rows.tolist() == [1]


def test_stop_token_is_special_where_the_tokenizer_says_so_or_not(tokenizer, tmp_path):
    prompt = mine(tmp_path, tokenizer, assistant_end="\n", stop_phrases=["\n"])
    _, dropped = prompt.encode(pairs(("1 + 1?", "It is\n2"), ("1 + 1?", "It is 2")))
    assert dropped == {0: SPECIAL_IN_TEXT}  # it would teach to stop in the middle


def test_engine_is_not_given_a_spelt_special_token(prompt):
    with pytest.raises(DataError, match=r"spells the special token <\|eot_id\|>"):
        prompt.prompt_ids("a <|eot_id|> b")


def test_chat_is_the_tokenizers_own_template(tokenizer):
    chat = Prompt.load(PromptConfig(template="chat", instruction=None), tokenizer)
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|>"
    text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert chat.text("1 + 1?") == text
    example = chat.example(Conversation.of("1 + 1?", " 2 "))  # the template trims
    asked = tokenizer.encode(text)
    assert example.tokens.tolist() == asked + tokenizer.encode("2<|eot_id|>")
    assert example.spans.tolist() == [[len(asked), len(example)]]
    assert chat.stop_tokens == ("<|eot_id|>",)


def tokenizer_with(template: str, folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    shutil.copy(FOLDER / "tokenizer.json", folder)
    config = {"bos_token": "<|begin_of_text|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def chat_with(template: str, folder: Path, instruction: str | None = "generic/math") -> Prompt:
    wanted = PromptConfig(template="chat", instruction=instruction)
    return Prompt.load(wanted, tokenizer_with(template, folder))


TURNS = "{% for m in messages %}{{ m.role + ':\n' + m.content + '<|eot_id|>\n' }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"


def test_what_follows_the_stop_token_is_not_part_of_the_example(tmp_path):
    chat = chat_with(TURNS + ASKS, tmp_path)
    example = chat.example(Conversation.of("1 + 1?", "2"))
    assert example.tokens[-1] == chat.stop_ids[0]
    assert example.spans[-1, 1] == len(example)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token to stop at"),
        ("<|begin_of_text|>{{ bos_token }}" + TURNS + ASKS, "begins with two BOS tokens"),
        ("{% if %}", "not valid Jinja"),
        ("{{ raise_exception('no users here') }}", "no users here"),
    ],
)
def test_chat_templates_that_cannot_be_trained_on(template, said, tmp_path):
    with pytest.raises(DataError, match=said):
        chat_with(template, tmp_path)


def test_chat_needs_a_template(tmp_path):
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    with pytest.raises(DataError, match="has no chat template"):
        Prompt.load(PromptConfig(template="chat"), load_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("user_begin: 'Q: '\nassistant_end: '<|eot_id|>'", "stop_phrases is empty"),
        ("assistant_end: x\nstop_phrases: ['<|eot_id|>']", "holds none of the stop_phrases"),
        ("assistant_end: '</end>'\nstop_phrases: ['</end>']", "tokens in this tokenizer, expected"),
        ("assistant_ende: x", r"assistant_ende; did you mean assistant_end\?"),
        ("- 1", "expected keys and values"),
    ],
)
def test_template_files_that_cannot_be_used(lines, said, tokenizer, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        Prompt.load(PromptConfig(template=str(file)), tokenizer)


def test_files_of_ones_own_and_their_description(tokenizer, tmp_path):
    template, instruction = tmp_path / "t.yaml", tmp_path / "i.yaml"
    template.write_text(
        'text_begin: "<|begin_of_text|>"\nuser_begin: "Q: "\nassistant_begin: "\\nA: "\n'
        'assistant_end: "<|eot_id|>"\nstop_phrases: ["<|eot_id|>"]\n',
        encoding="utf-8",
    )
    instruction.write_text('user: "Think. {problem}"\n', encoding="utf-8")
    config = PromptConfig(template=str(template), instruction=str(instruction))
    mine = Prompt.load(config, tokenizer)
    assert mine.text("1 + 1?") == "<|begin_of_text|>Q: Think. 1 + 1?\nA: "
    again = Prompt.restore(json.loads(json.dumps(mine.describe())), tokenizer)
    assert again.prompt_ids("1 + 1?") == mine.prompt_ids("1 + 1?")
    assert again.fingerprint == mine.fingerprint
    template.unlink()  # the description holds the content, not the path
    assert Prompt.restore(mine.describe(), tokenizer).text("x") == mine.text("x")


def test_shipped_names_describe_themselves(prompt, tokenizer):
    assert prompt.describe() == {"template": "llama3-instruct", "instruction": "generic/math"}
    plain = Prompt.load(PromptConfig(instruction=None), tokenizer)
    assert plain.fingerprint != prompt.fingerprint
    known = r"expected chatml, llama3, llama3-instruct, passthrough, chat, or a \.yaml file"
    with pytest.raises(DataError, match=known):
        Prompt.load(PromptConfig(template="llama4"), tokenizer)
    with pytest.raises(DataError, match=r"expected generic/math, nemo_rl/math, or a \.yaml"):
        Prompt.load(PromptConfig(instruction="generic/maths"), tokenizer)


def test_instruction_without_a_place_for_the_problem(tokenizer, tmp_path):
    file = tmp_path / "i.yaml"
    file.write_text("user: Think.", encoding="utf-8")
    with pytest.raises(DataError, match=r"has no \{problem\}"):
        Prompt.load(PromptConfig(instruction=str(file)), tokenizer)


def test_fixed_strings_and_many_turns(prompt, tokenizer):
    talk = said("1?", "one", "2?", "two\n", system="Count.")
    examples, dropped = prompt.encode(chats(talk))
    assert dropped == {}
    begin, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
    user, assistant = begin.format("user"), begin.format("assistant")
    assert pieces(examples, tokenizer) == [
        "<|begin_of_text|>" + begin.format("system") + f"Count.{end}{user}1?{end}{assistant}",
        "one<|eot_id|>",
        f"{user}2?{end}{assistant}",
        "two\n<|eot_id|>",
        "",
    ]
    whole = "".join(pieces(examples, tokenizer))
    assert examples.tokens.tolist() == tokenizer.encode(whole)


def test_single_turn_is_the_same_as_rows_and_as_messages(tokenizer):
    for template in ("llama3-instruct", "chat"):
        prompt = Prompt.load(PromptConfig(template=template, instruction=None), tokenizer)
        row, _ = prompt.encode(pairs(("1 + 1?", "2")))
        talk, _ = prompt.encode(chats(said("1 + 1?", "2")))
        assert row.tokens.tolist() == talk.tokens.tolist()
        assert row.spans.tolist() == talk.spans.tolist()


@pytest.mark.parametrize("template", ["llama3-instruct", "chat"])
def test_conversations_that_are_dropped(tokenizer, template):
    prompt = Prompt.load(PromptConfig(template=template), tokenizer)
    examples, dropped = prompt.encode(
        chats(said("1?", "one", "2?"), [], said("1?", "one"), said("1?", "a", "<|eot_id|>", "b"))
    )
    assert dropped == {0: NO_ANSWER, 1: NO_ANSWER, 3: SPECIAL_IN_TEXT}
    assert examples.rows.tolist() == [2]


@pytest.mark.parametrize(
    ("talk", "error"),
    [
        (
            [*said("1?", "one"), {"role": "tool", "content": "x"}, *said("2?", "b")],
            "have no markup",
        ),
        ([*said("1?"), {"role": "system", "content": "x"}, *said("2?", "b")], "expected it first"),
        ([{"role": "human", "content": "1?"}], "message 1: role 'human', expected one of system"),
        (
            [*said("1?"), {"role": "assistant", "content": " "}],
            "message 2: the assistant says noth",
        ),
    ],
)
def test_conversations_that_fixed_strings_cannot_write(prompt, talk, error):
    with pytest.raises(DataError, match=rf"^a\.jsonl:2: .*{error}"):
        prompt.encode(chats(said("1?", "one"), talk))


def test_answers_of_weight_0_are_read_and_not_trained(prompt, tokenizer):
    talk = said("1?", "one", "2?", "two", "3?", "three", system="Count.")
    whole = pieces(prompt.encode(chats(talk))[0], tokenizer)
    for untrained, wanted in (
        ([2], ["".join(whole[:3]), *whole[3:6], ""]),
        ([4], [*whole[:2], "".join(whole[2:5]), whole[5], ""]),
        ([6], [*whole[:4], ""]),  # nothing is trained after it, so that it ends there
        ([2, 6], ["".join(whole[:3]), whole[3], ""]),
    ):
        weighed = [{**m, "weight": 0} if i in untrained else m for i, m in enumerate(talk)]
        for template in ("llama3-instruct", "chat"):
            made = Prompt.load(PromptConfig(template=template), tokenizer)
            examples, dropped = made.encode(chats(weighed))
            assert (pieces(examples, tokenizer), dropped) == (wanted, {})
            asked = tokenizer.encode(wanted[0])
            assert examples.tokens[: len(asked)].tolist() == asked


def test_templates_are_not_given_weights(tmp_path, tokenizer):
    chat = chat_with(UNMARKED.replace("m.content", "m.content ~ m.weight"), tmp_path, None)
    talk = [*said("1?", "one"), *said("2?", "two")]
    talk[1]["weight"] = 0
    [asked, answer, _] = pieces(chat.encode(chats(talk))[0], tokenizer)
    assert "\n\none<|eot_id|>" in asked
    assert answer == "two<|eot_id|>"


def test_own_chat_template_and_many_turns(tokenizer):
    chat = Prompt.load(PromptConfig(template="chat"), tokenizer)
    talk = said("1? ", "one ", "2?", "two", system="Count.")
    examples, _ = chat.encode(chats(talk))
    found = pieces(examples, tokenizer)
    assert found[1::2] == ["one<|eot_id|>", "two<|eot_id|>"]
    assert "".join(found) == tokenizer.chat_template.render(talk)
    for turns in (2, 4):  # the ids before an answer are those that an engine sends
        asked = tokenizer.chat_template.render(talk[:turns], add_generation_prompt=True)
        end = int(examples.spans[turns // 2 - 1, 0])
        assert examples.tokens[:end].tolist() == tokenizer.encode(asked)


HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


def unmarked(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


UNMARKED = unmarked(HEADERS)


def test_generation_blocks_and_growing_prefixes_say_the_same(tmp_path):
    talk = said("1?", "one", "2?", "two", system="Count.")
    made = []
    for name, template in (("marked", HEADERS), ("unmarked", UNMARKED)):
        (tmp_path / name).mkdir()
        made.append(chat_with(template, tmp_path / name, None).encode(chats(talk))[0])
    assert made[0].tokens.tolist() == made[1].tokens.tolist()
    assert made[0].spans.tolist() == made[1].spans.tolist()


# What was thought is shown in the last answer alone, as reasoning models do it.
FORGETS = HEADERS.replace(
    "{% generation %}", "{% generation %}{% if loop.last %}{{ 'Hm. ' }}{% endif %}"
)


def test_generation_blocks_where_prefixes_do_not_hold(tmp_path, tokenizer):
    chat = chat_with(FORGETS, tmp_path, None)
    examples, _ = chat.encode(chats(said("1?", "one", "2?", "two")))
    assert pieces(examples, tokenizer)[1::2] == ["one<|eot_id|>", "Hm. two<|eot_id|>"]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (FORGETS, "writes the answer of message 2 otherwise once more of the conversation follows"),
        ("{{ messages | length }}" + TURNS + ASKS, "changes the prompt for message 2 once more"),
    ],
)
def test_neither_blocks_nor_prefixes_is_an_error(template, error, tmp_path):
    chat = chat_with(unmarked(template), tmp_path, None)
    talks = chats(said("1?", "one", "2?", "two"), said("1?"))
    with pytest.raises(DataError, match=rf"^a\.jsonl:1: .*{error}"):
        chat.encode(talks)
    unfit: dict[int, str] = {}
    assert len(chat.encode(talks, unfit)[0]) == 0
    assert re.search(error, unfit[0])


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (
            HEADERS.replace("{% generation %}", "A{% generation %}"),
            "do not begin where an assistant is asked to speak",
        ),
        (
            HEADERS.replace("+ '<|eot_id|>' }}{% endg", "}}{% endg", 1),
            "no special token to stop at",
        ),
        (
            HEADERS.replace(
                " + '<|eot_id|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|eot_id|>' }}"
            ),
            r"ends the answer 'forty-two' without <\|eot_id\|>",
        ),
        (
            HEADERS.replace("{{ bos_token }}", "{{ generation_marks[0] | length }}"),
            "does something to",
        ),
    ],
)
def test_generation_blocks_that_cannot_be_used(template, error, tmp_path):
    with pytest.raises(DataError, match=error):
        chat_with(template, tmp_path, None).encode(chats(said("1?", "forty-two")))


def test_token_that_spans_the_end_of_a_prompt_is_an_error(tmp_path):
    chat = chat_with((TURNS + ASKS).replace(":\n", ": "), tmp_path, None)
    error = r"a\.jsonl:1: the token ' has' \(321\) stands for .* near '.*: has 3"
    talks = chats(said("1?", "\n2", "2?", "has 3"), said("1?", "\n2"))
    with pytest.raises(DataError, match=error):
        chat.encode(talks)
    unfit: dict[int, str] = {}
    examples, dropped = chat.encode(talks, unfit)
    assert (examples.rows.tolist(), dropped, list(unfit)) == ([1], {}, [0])
    assert re.match(error, unfit[0])


def test_rows_that_a_template_cannot_write_are_told_apart(tokenizer, tmp_path):
    odd = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    talks = chats(
        said("1?", "one", system="Count."),
        said("1?", "one"),
        [*said("1?"), call],
        [{"role": "gpt", "content": "1"}],
        said("1?"),
    )
    plain = Prompt.load(PromptConfig(instruction=None), tokenizer)
    for prompt, wrong in (
        (plain, {2, 3}),
        (chat_with(odd + TURNS + ASKS, tmp_path, None), {0, 2, 3}),
    ):
        unfit: dict[int, str] = {}
        examples, dropped = prompt.encode(talks, unfit)
        assert (set(unfit), dropped) == (wrong, {4: NO_ANSWER})
        assert examples.rows.tolist() == sorted({0, 1, 2, 3} - wrong)
        assert all(said.startswith(f"a.jsonl:{index + 1}: ") for index, said in unfit.items())
        with pytest.raises(DataError, match=r"^a\.jsonl:"):
            prompt.encode(talks)


def test_bos_may_begin_every_turn(tmp_path, tokenizer):
    template = HEADERS.replace("{{ bos_token }}", "").replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{% endif %}",
    )
    chat = chat_with(template, tmp_path, None)
    examples, _ = chat.encode(chats(said("1?", "one", "2?", "two")))
    assert examples.tokens.tolist().count(tokenizer.bos_id) == 2
    assert pieces(examples, tokenizer)[1::2] == ["one<|eot_id|>", "two<|eot_id|>"]


CALLS = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson + '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ m.role + ':\n' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def test_tools_and_their_calls(tmp_path, tokenizer):
    chat = chat_with(CALLS, tmp_path, None)

    def talk(argument: str) -> list[dict]:
        call = {
            "type": "function",
            "function": {"name": "add", "arguments": f'{{"a": {argument}}}'},
        }
        return [
            {"role": "user", "content": [{"type": "text", "text": "1 + 1"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "It is 2.", "tool_calls": None},
        ]

    tools = [{"type": "function", "function": {"name": "add"}}]
    examples, dropped = chat.encode(chats(talk("1"), talk('"<|eot_id|>"'), tools=[tools, tools]))
    assert dropped == {1: SPECIAL_IN_TEXT}
    assert pieces(examples, tokenizer) == [
        "<|begin_of_text|>" + json.dumps(tools) + "<|eot_id|>user:\n1 + 1<|eot_id|>assistant:\n",
        '{"name": "add", "arguments": {"a": 1}}<|eot_id|>',
        "tool:\n2<|eot_id|>assistant:\n",
        "It is 2.<|eot_id|>",
        "",
    ]
    _, dropped = chat.encode(chats(talk("1"), tools=[[{"name": "<|eot_id|>"}]]))
    assert dropped == {0: SPECIAL_IN_TEXT}


# As Llama 3.1 does it: a system block always, and contents trimmed.
LLAMA_31 = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024' }}"
    "{{ '\n\n<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def test_nemo_rls_own_rendering(tmp_path, tokenizer):
    prompt = chat_with(LLAMA_31, tmp_path, "nemo_rl/math")
    examples, _ = prompt.encode(pairs(("1 + 1?", "2\n")))
    wanted = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024"
        "\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Solve the following math problem. Make sure to put the answer (and only answer) inside "
        "\\\\boxed{}.\n\n1 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert pieces(examples, tokenizer) == [wanted, "2<|eot_id|>", ""]
    assert prompt.prompt_ids("1 + 1?") == tokenizer.encode(wanted)
    assert examples.tokens.tolist().count(tokenizer.bos_id) == 1
    # Its bytes, as they stand before the chat template trims them.
    instruction = read_instruction("nemo_rl/math")
    assert instruction.fill("{}").endswith("inside \\\\boxed{}.\n\n{}\n\n")


def test_passthrough_takes_input_and_output_as_they_are(prompt, tokenizer):
    plain = PromptConfig(template="passthrough", instruction=None)
    as_is = Prompt.load(plain, tokenizer)
    assert as_is.stop_tokens == ("<|eot_id|>", "<|end_of_text|>")
    text = prompt.text("1 + 1?")
    examples, dropped = as_is.encode(
        pairs(
            (text, prompt.answer("1 + 1?", "2")),
            (text, "2"),
            ("<|begin_of_text|>" + text, "2<|eot_id|>"),
            ("no markup", "2<|eot_id|> and on<|end_of_text|>"),
        )
    )
    assert dropped == {1: NO_STOP, 2: MANY_BOS}
    assert examples.rows.tolist() == [0, 3]
    seed, _ = prompt.encode(pairs(("1 + 1?", "2")))
    assert pieces(examples, tokenizer)[:2] == [text, "2<|eot_id|>"]
    assert examples.keep(np.array([True, False])).tokens.tolist() == seed.tokens.tolist()
    assert as_is.prompt_ids(text) == prompt.prompt_ids("1 + 1?")
    with pytest.raises(DataError, match=r"verbatim takes .* prompt\.instruction=null"):
        Prompt.load(PromptConfig(template="passthrough"), tokenizer)


def test_chatml_has_a_system_block_only_for_a_system_message(tmp_path):
    text = (FOLDER / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace("<|start_header_id|>", "<|im_start|>").replace("<|eot_id|>", "<|im_end|>")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    chatml = Prompt.load(PromptConfig(template="chatml", instruction=None), tokenizer)
    assert chatml.text("1?") == "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
    examples, _ = chatml.encode(chats(said("1?", "one", "2?", "two", system="Count.")))
    assert pieces(examples, tokenizer) == [
        "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "one<|im_end|>",
        "\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n",
        "two<|im_end|>",
        "",
    ]


def test_example_of_a_conversation(prompt):
    talk = Conversation(messages=(Message(role="user", content="hi"),))
    with pytest.raises(DataError, match=r"dropped \(no answer at the end\)"):
        prompt.example(talk)


def learned(chat: Prompt, *talks: list, tools: list | None = None) -> list[list[str]]:
    """The trained texts of each conversation."""
    examples, dropped = chat.encode(chats(*talks, tools=tools))
    assert dropped == {}
    return [pieces(examples, chat._tokenizer, k)[1::2] for k in range(len(examples))]


ASKED = "<|start_header_id|>assistant<|end_header_id|>\n\n"
BLOCK = "{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}"


@pytest.mark.parametrize(
    "block",
    [
        "{% generation %}{{ '\n\n' + m.content + '<|eot_id|>' }}{% endgeneration %}",
        "{% generation %}{{ '\n' }}{% endgeneration %}{% generation %}{{ '\n' + m.content }}"
        "{{ '<|eot_id|>\n' }}{% endgeneration %}",
    ],
    ids=["one block", "two blocks"],
)
def test_generation_blocks_may_begin_within_what_asks_for_an_answer(block, tmp_path):
    template = HEADERS.replace(BLOCK, block).replace(
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}",
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' }}"
        "{% if m.role != 'assistant' %}{{ '\n\n' }}{% endif %}",
    )
    talk = said("1?", "one", "2?", "two")
    assert learned(chat_with(template, tmp_path, None), talk) == [
        ["one<|eot_id|>", "two<|eot_id|>"]
    ]


def test_two_blocks_of_one_answer_are_trained_and_not_what_is_between(tmp_path):
    two = (
        "{% generation %}{{ 'Hm. ' }}{% endgeneration %}{{ '<|end_header_id|>' }}"
        "{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}"
    )
    chat = chat_with(HEADERS.replace(BLOCK, two), tmp_path, None)
    talk = said("1?", "one", "2?", "two")
    assert learned(chat, talk) == [["Hm. ", "one<|eot_id|>", "Hm. ", "two<|eot_id|>"]]


@pytest.mark.parametrize("template", [UNMARKED, HEADERS])
def test_prompt_that_opens_the_thoughts_of_every_answer(template, tmp_path):
    chat = chat_with(template.replace(ASKED, ASKED + "<think>"), tmp_path, None)
    talk = said("1?", "<think>so</think>one", "2?", "<think>and</think>two")
    wanted = [["so</think>one<|eot_id|>", "and</think>two<|eot_id|>"]]
    assert learned(chat, talk) == wanted
    with pytest.raises(
        DataError, match="does not write message 2 behind the prompt that asks for it"
    ):
        chat.encode(chats(said("1?", "one")))


@pytest.mark.parametrize("template", [UNMARKED, HEADERS])
def test_assistant_may_speak_first(template, tmp_path):
    looks = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    chat = chat_with(template.replace("{{ bos_token }}", "{{ bos_token }}" + looks), tmp_path, None)
    talk = [{"role": "assistant", "content": "hello"}, *said("1?", "one")]
    assert learned(chat, talk) == [["hello<|eot_id|>", "one<|eot_id|>"]]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_given_under_the_names_that_templates_ask_for(name, tmp_path):
    for asked in ("reasoning_content", "thinking"):
        thinks = f"(m.{asked} + '. ' if m.{asked} else '') + m.content"
        chat = chat_with(UNMARKED.replace("m.content", thinks), tmp_path / asked, None)
        talk = said("1?", "one", "2?", "two")
        talk[3][name] = "Hm"
        assert learned(chat, talk) == [["one<|eot_id|>", "Hm. two<|eot_id|>"]]
    with pytest.raises(
        DataError, match=r"message 4: the chat template makes nothing of its \w*(reas|think)"
    ):
        chat_with(UNMARKED, tmp_path, None).encode(chats(talk))


def test_last_answer_alone_after_what_a_template_forgets(tmp_path):
    talk = said("1?", "one", "2?", "two")
    talk[1]["weight"] = 0
    for template in (FORGETS, unmarked(FORGETS)):
        chat = chat_with(template, tmp_path, None)
        assert learned(chat, talk) == [["Hm. two<|eot_id|>"]]


def test_stop_token_that_only_its_role_makes_special(tmp_path):
    told = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    for token in told["added_tokens"]:
        token["special"] = token["content"] != "<|eot_id|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": UNMARKED,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    chat = Prompt("chat", None, load_tokenizer(tmp_path))
    assert chat.stop_tokens == ("<|eot_id|>",)
    assert chat.encode(chats(said("1?", "a <|eot_id|> b")))[1] == {0: SPECIAL_IN_TEXT}


def test_long_conversations_are_not_written_up_to_each_answer(tmp_path, monkeypatch):
    chat = chat_with(UNMARKED, tmp_path, None)
    talk = said(*(f"{i}? {'so ' * (i % 7)}" for i in range(400)), "end")[:400]
    assert talk[-1]["role"] == "assistant"
    written, render = [], ChatTemplate.render
    monkeypatch.setattr(
        ChatTemplate, "render", lambda *a, **k: written.append(len(a[1])) or render(*a, **k)
    )
    [found] = learned(chat, talk)
    assert found == [f"{said['content']}<|eot_id|>" for said in talk[1::2]]
    assert len(written) < 50


def test_other_ids_than_those_of_transformers_end_the_run(tmp_path, monkeypatch):
    chat = chat_with(UNMARKED, tmp_path, None)
    theirs = chat._tokenizer.hugging_face
    whole = theirs.apply_chat_template
    monkeypatch.setattr(
        theirs,
        "apply_chat_template",
        lambda *a, **k: [*whole(*a, **k)[:-1], 7, *whole(*a, **k)[-1:]],
    )
    error = r"a\.jsonl:1: .*token \d+ is 4 '<\|eot_id\|>' \(expected 7 '.*', as transformers has it"
    with pytest.raises(DataError, match=error):
        chat.encode(chats(said("1?", "one")), {})


# --- what a chat template is given

ASKING = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{% if strftime_now is defined or not lazy %}{{ strftime_now('%d %b %Y') }}{% else %}"
    "{{ '26 Jul 2024' }}{% endif %}{% if greeting %}{{ ' ' + greeting }}{% endif %}"
    "{{ '<|eot_id|>' }}"
) + UNMARKED.replace("{{ bos_token }}", "")


def test_template_is_given_variables_and_a_date_which_the_export_keeps(tmp_path):
    tokenizer = tokenizer_with(ASKING, tmp_path)
    config = PromptConfig(
        template="chat", instruction=None, date="2026-11-09", variables={"greeting": "hi \"{{ 'x"}
    )
    prompt = Prompt.load(config, tokenizer)
    wanted = "\n\n09 Nov 2026 hi \"{{ 'x<|eot_id|>"
    assert wanted in prompt.text("1?")
    described = json.loads(json.dumps(prompt.describe()))
    assert described["date"] == "2026-11-09"
    again = Prompt.restore(described, tokenizer)
    assert (again.text("1?"), again.fingerprint) == (prompt.text("1?"), prompt.fingerprint)
    assert Prompt("chat", None, tokenizer, date=config.date).fingerprint != prompt.fingerprint
    examples, _ = prompt.encode(chats(said("1?", "one")))
    chat_files.save(tokenizer, prompt, tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    ids = theirs.apply_chat_template(said("1?", "one"), return_dict=False)
    assert ids == examples.tokens.tolist()
    other = theirs.apply_chat_template(said("1?"), greeting="bye", tokenize=False)
    assert "09 Nov 2026 bye<|eot_id|>" in other


def test_template_that_asks_for_the_day(tmp_path):
    error = r"asks for today's date.* Fix: prompt\.date=YYYY-MM-DD"
    tokenizer = tokenizer_with(ASKING, tmp_path)
    with pytest.raises(DataError, match=error):
        Prompt("chat", None, tokenizer)
    lazy = Prompt("chat", None, tokenizer, variables={"lazy": True})
    assert "26 Jul 2024" in lazy.text("1?")
    assert lazy.encode(chats(said("1?", "one")))[1] == {}  # and so it is in the export
    with pytest.raises(DataError, match=r"prompt\.variables: 'tools' is not a name of its own"):
        Prompt("chat", None, tokenizer, variables={"tools": []})
    with pytest.raises(ConfigError, match="variables is for a chat template"):
        parse_section(configuration.PromptConfig, {"template": "chatml", "variables": {"a": 1}})


def test_what_no_template_asks_for_is_refused(tmp_path):
    tokenizer, day = tokenizer_with(UNMARKED, tmp_path), datetime.date(2026, 7, 1)
    with pytest.raises(DataError, match=r"prompt\.variables: .* not ask for 'enable_thinkin'"):
        require_asked(tokenizer, {"enable_thinkin": False}, None)
    with pytest.raises(DataError, match=r"prompt\.date: .* take it away$"):
        require_asked(tokenizer, {}, day)
    asks = tokenizer_with("{{ date_string }}" + UNMARKED, tmp_path)
    with pytest.raises(DataError, match=r"prompt\.variables\.date_string$"):
        require_asked(asks, {}, day)
    require_asked(asks, {"date_string": "1 July"}, None)
    require_asked(tokenizer_with(ASKING, tmp_path), {"greeting": "hi"}, day)
    told = parse_section(configuration.PromptConfig, {"variables": {"a": 1}})
    assert told.variables == {"a": 1}  # `chat` is the default


def test_answer_that_does_not_follow_on_its_prompt_is_told_as_such(tmp_path):
    opens = UNMARKED.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt %}X")
    chat = chat_with(opens, tmp_path, None)
    with pytest.raises(
        DataError, match=r"not write message 2 behind the prompt .*Fix: mend the row"
    ):
        chat.encode(chats(said("1?", "one")))
