"""What was trained is what is asked, exported and tokenized: numbers 1 and 2, and the tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from mcore_sft.config import PromptConfig
from mcore_sft.data import chat_files
from mcore_sft.data.prompt import Prompt
from mcore_sft.data.rows import Chats, Pairs
from mcore_sft.data.tokenizer import load_tokenizer
from tests.runs import FIXTURES

# --- 2: the exported folder chats as it was trained ---

OWN = {
    "text_begin": "<|begin_of_text|>{{ not jinja }} ",
    "system_begin": 'System "\\": {% ',
    "system_end": "\n\n",
    "system_optional": True,
    "user_begin": "Q: Ł😀\u2028 ",
    "user_end": "\n",
    "assistant_begin": "A:",
    "assistant_end": " #} <|eot_id|> \r\n",
    "stop_phrases": ["<|eot_id|>"],
}
TEMPLATES = ["llama3-instruct", "chatml", "own", "chat"]


def base(folder: Path, **config: Any) -> Path:
    """A tokenizer whose chat template and eos token are of another kind than what is trained."""
    text = (FIXTURES / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace("<|start_header_id|>", "<|im_start|>").replace(
        "<|end_header_id|>", "<|im_end|>"
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "chat_template": "{% for m in messages %}"
        "<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told | config), encoding="utf-8")
    return folder


def exported(folder: Path, template: str, instruction: str | None = None) -> tuple[Prompt, Any]:
    """A prompt, and the tokenizer that transformers loads from the export."""
    if template == "own":
        template = str(folder / "own.yaml")
        Path(template).write_text(json.dumps(OWN), encoding="utf-8")
    shipped = FIXTURES / "tokenizer" if template == "llama3-instruct" else base(folder / "base")
    tokenizer = load_tokenizer(shipped)
    prompt = Prompt.load(PromptConfig(template=template, instruction=instruction), tokenizer)
    chat_files.save(tokenizer, prompt, folder / "hf")
    return prompt, AutoTokenizer.from_pretrained(folder / "hf")


def said(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


TALKS = [
    said("What is 1 + 1?", "It is 2."),
    said("What is 1 + 1?", "It is 2.", system="Count."),
    said("What is 1 + 1?", "It is 2.", system=""),
    said("1?", "one", "2?", "two", "Ł😀?", "three"),
    said("1?", "one", "2?", "two", system="Count."),
    [
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "one", "tool_calls": None},
    ],
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_02_exported_folder_renders_the_ids_that_were_trained(
    tmp_path: Path, template: str
) -> None:
    prompt, hf = exported(tmp_path, template)
    # the list of text parts is joined before a chat template of the base's own sees it
    talks = TALKS if template != "chat" else TALKS[:-1]
    rows = Chats(name="a.jsonl", numbers=np.arange(len(talks)) + 1, messages=talks)
    examples, dropped = prompt.encode(rows)
    assert dropped == {}
    ends, spans = np.cumsum(examples.lengths), np.cumsum(examples.span_counts)
    for number, talk in enumerate(talks):
        tokens = examples.tokens[ends[number] - examples.lengths[number] : ends[number]].tolist()
        first = spans[number] - examples.span_counts[number]
        answers = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
        for answer, (begin, _) in zip(answers, examples.spans[first : spans[number]], strict=True):
            asked = hf.apply_chat_template(
                talk[:answer], add_generation_prompt=True, return_dict=False
            )
            assert asked == tokens[:begin]
        assert hf.apply_chat_template(talk, return_dict=False) == tokens
    assert hf.eos_token_id in prompt.stop_ids


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("instruction", ["generic/math", None])
def test_02_exported_folder_renders_problems_under_their_instruction(
    tmp_path: Path, template: str, instruction: str | None
) -> None:
    prompt, hf = exported(tmp_path, template, instruction)
    rows = Pairs(
        name="a.jsonl",
        numbers=np.arange(1) + 1,
        problems=pa.array(["1 + 1?"], pa.large_string()),
        solutions=pa.array(["It is 2."], pa.large_string()),
    )
    examples, _ = prompt.encode(rows)
    asked = "1 + 1?"
    if instruction:
        asked = (
            "Solve the following math problem. Make sure to put the answer (and only answer) "
            "inside \\boxed{}.\n\n1 + 1?"
        )
    talk = said(asked, "It is 2.")
    ids = hf.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    assert ids == prompt.prompt_ids("1 + 1?")
    assert hf.apply_chat_template(talk, return_dict=False) == examples.tokens.tolist()


@pytest.mark.parametrize("template", ["llama3-instruct", "chatml", "own"])
def test_02_what_a_template_cannot_express_raises_in_jinja_too(
    tmp_path: Path, template: str
) -> None:
    _, hf = exported(tmp_path, template)
    talk, tools = said("1?", "one"), [{"type": "function", "function": {"name": "add"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    for messages, options in (
        (talk, {"tools": tools}),
        (talk, {"documents": [{"text": "a"}]}),
        ([*talk, {"role": "tool", "content": "2"}], {}),
        ([*talk, {"role": "system", "content": "Count."}], {}),
        ([talk[0], call], {}),
        ([talk[0], {**talk[1], "reasoning_content": "so"}], {}),
        ([{"role": "user", "content": [{"type": "image"}]}], {}),
        ([{"role": "user", "content": None}], {}),
    ):
        with pytest.raises(Exception, match=r"has no markup|have no markup|no content|it first"):
            hf.apply_chat_template(messages, tokenize=False, **options)


def test_02_verbatim_exports_no_chat_template(tmp_path: Path) -> None:
    prompt, hf = exported(tmp_path, "passthrough")
    assert prompt.chat_template is None
    assert hf.chat_template is None


def test_02_chat_keeps_its_own_template_and_files(tmp_path: Path) -> None:
    named = [
        {
            "name": "default",
            "template": "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}",
        }
    ]
    named.append({"name": "rag", "template": "x"})
    tokenizer = load_tokenizer(base(tmp_path / "base", chat_template=named))
    chat_files.save(tokenizer, Prompt("chat", None, tokenizer), tmp_path / "hf")
    told = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert told["chat_template"] == named
    assert told["eos_token"] == "<|eot_id|>"


def test_02_the_export_can_be_trained_on_with_its_own_template(tmp_path: Path) -> None:
    prompt, _ = exported(tmp_path, "chatml", "generic/math")
    again = Prompt("chat", "generic/math", load_tokenizer(tmp_path / "hf"))
    assert again.prompt_ids("1 + 1?") == prompt.prompt_ids("1 + 1?")
    assert again.stop_ids == prompt.stop_ids
