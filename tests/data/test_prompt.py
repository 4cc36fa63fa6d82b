import json
import shutil
from pathlib import Path

import pytest

from mcore_sft.config import PromptConfig
from mcore_sft.data.conversation import Conversation, Message
from mcore_sft.data.errors import DataError
from mcore_sft.data.prompt import SPECIAL_IN_TEXT, Dropped, Prompt
from mcore_sft.data.tokenizer import load_tokenizer

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


def test_many_are_one_by_one(prompt):
    talks = [Conversation.of(f"What is {i % 9} + 1?", f"It is {i % 9 + 1}.") for i in range(90)]
    for made, talk in zip(prompt.examples(talks), talks, strict=True):
        alone = prompt.example(talk)
        assert made.tokens.tolist() == alone.tokens.tolist()
        assert made.spans.tolist() == alone.spans.tolist()


@pytest.mark.parametrize(
    ("problem", "solution"), [("a <|eot_id|> b", "2"), ("a", "2<|begin_of_text|>")]
)
def test_text_that_spells_a_special_token_is_dropped(prompt, problem, solution):
    talks = [Conversation.of("1 + 1?", "2"), Conversation.of(problem, solution)]
    kept, dropped = prompt.examples(talks)
    assert dropped == Dropped(reason=SPECIAL_IN_TEXT)
    assert kept.tokens.tolist() == prompt.example(talks[0]).tokens.tolist()


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


def chat_with(template: str, folder: Path) -> Prompt:
    shutil.copy(FOLDER / "tokenizer.json", folder)
    config = {"bos_token": "<|begin_of_text|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Prompt.load(PromptConfig(template="chat"), load_tokenizer(folder))


TURNS = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|eot_id|>\n' }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}assistant: {% endif %}"


def test_what_follows_the_stop_token_is_not_part_of_the_example(tmp_path):
    chat = chat_with(TURNS + ASKS, tmp_path)
    example = chat.example(Conversation.of("1 + 1?", "2"))
    assert example.tokens[-1] == chat.stop_ids[0]
    assert example.spans[-1, 1] == len(example)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token to stop at"),
        ("{{ messages | length }}" + TURNS + ASKS, "changes the prompt once an answer follows"),
        ("<|begin_of_text|>{{ bos_token }}" + TURNS + ASKS, "2 BOS tokens, expected one"),
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
    with pytest.raises(DataError, match=r"expected llama3-instruct, chat, or a \.yaml file"):
        Prompt.load(PromptConfig(template="llama4"), tokenizer)
    with pytest.raises(DataError, match="expected generic/math"):
        Prompt.load(PromptConfig(instruction="generic/maths"), tokenizer)


def test_instruction_without_a_place_for_the_problem(tokenizer, tmp_path):
    file = tmp_path / "i.yaml"
    file.write_text("user: Think.", encoding="utf-8")
    with pytest.raises(DataError, match=r"has no \{problem\}"):
        Prompt.load(PromptConfig(instruction=str(file)), tokenizer)


def test_only_one_turn_for_now(prompt):
    talk = Conversation(messages=(Message(role="user", content="hi"),), where="a.jsonl:3")
    with pytest.raises(DataError, match=r"a\.jsonl:3: expected one user message and one assistant"):
        prompt.example(talk)
