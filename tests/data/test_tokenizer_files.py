import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import Chats
from mcore_sft.data.text import chat_files
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer

FOLDER = Path(__file__).parent.parent / "fixtures" / "tokenizer"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
TEXT = "<|eot_id|> a<|user|>The <think>\n b<|end|>the <call>x<pad>The"


def write(folder, vocabulary=FOLDER / "tokenizer.json", **files):
    """A folder of the vocabulary and of these files, named with __ for their dot."""
    folder.mkdir(exist_ok=True)
    shutil.copy(vocabulary, folder)
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


def numbered(*tokens, first=701, **changes):
    """added_tokens_decoder, or a part of it."""
    return {
        str(first + i): {"content": token, "special": True, **FLAGS, **changes}
        for i, token in enumerate(tokens)
    }


CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>"}
FORMS = {
    "added_tokens.json": {
        "tokenizer_config__json": {**CONFIG, "additional_special_tokens": ["<|user|>"]},
        "added_tokens__json": {"<think>": 702, "<|user|>": 701},
    },
    "added_tokens_decoder": {
        "tokenizer_config__json": {
            **CONFIG,
            "added_tokens_decoder": {
                **numbered("<|user|>", rstrip=True),
                **numbered("<think>", first=702, special=False, lstrip=True),
            },
        },
        "added_tokens__json": {"<call>": 703},  # not read beside the other
        "special_tokens_map__json": {"eos_token": "<|end_of_text|>"},  # nor this
    },
    "a token with other flags": {
        "tokenizer_config__json": {
            **CONFIG,
            "added_tokens_decoder": numbered("<|eot_id|>", first=4, special=False, rstrip=True),
        }
    },
    "special_tokens_map.json": {
        "tokenizer_config__json": {**CONFIG, "bos_token": "<|end|>"},
        "special_tokens_map__json": {
            "bos_token": {"content": "<|begin_of_text|>", **FLAGS},
            "pad_token": {"content": "<pad>", **FLAGS, "lstrip": True},
            "extra_special_tokens": ["<|user|>", {"content": "<call>", **FLAGS}],
        },
    },
    "tokens of a model's own": {
        "tokenizer_config__json": {
            **CONFIG,
            "call_token": "<call>",
            "extra_special_tokens": {"user_token": "<|user|>"},
        }
    },
    "a word of the vocabulary": {"tokenizer_config__json": {**CONFIG, "eos_token": "The"}},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tokens_of_the_files_beside_a_vocabulary_are_those_of_transformers(form, tmp_path):
    folder = write(tmp_path / "made", **form)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert ours.encode_batch([TEXT] * 64) == [ours.encode(TEXT)] * 64
    assert ours.decode(ours.encode(TEXT)) == theirs.decode(ours.encode(TEXT))
    assert ours.vocab_size == len(theirs)
    assert ours.eos_id == theirs.eos_token_id
    assert theirs.pad_token_id in (None, ours.named_pad_id)
    added = theirs.added_tokens_decoder.items()
    assert set(ours.special_ids) == {number for number, token in added if token.special}
    alone = load_tokenizer(FOLDER / "tokenizer.json")
    assert (alone.encode(TEXT), alone.special_ids) != (ours.encode(TEXT), ours.special_ids)

    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.encode(TEXT, add_special_tokens=False) == ours.encode(TEXT)
    assert again.special_tokens_map == theirs.special_tokens_map


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    rows = (FOLDER.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(json.loads(row)["generated_solution"] for row in rows),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.mark.parametrize(
    "form",
    [
        {"added_tokens__json": {"<|user|>": 400, "<think>": 401}},
        {"tokenizer_config__json": {"added_tokens_decoder": numbered("<|user|>", first=400)}},
        {"special_tokens_map__json": {"pad_token": "<|user|>"}},
    ],
)
def test_tokens_beside_a_sentencepiece_model_have_ids_of_their_own(form, pieces, tmp_path):
    config = {"tokenizer_class": "LlamaTokenizer", **form.pop("tokenizer_config__json", {})}
    folder = write(tmp_path / "made", pieces, tokenizer_config__json=config, **form)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert ours.token_id("<|user|>") == theirs.convert_tokens_to_ids("<|user|>") == 400
    assert ours.vocab_size == len(theirs)
    assert [i for i in ours.encode("a<|user|>b") if i >= 400] == [400]
    assert ours.decode([400], skip_special=True) == theirs.decode([400], skip_special_tokens=True)
    assert ours.decode([400]) == "<|user|>"
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    assert load_tokenizer(pieces).fingerprint != ours.fingerprint


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"added_tokens__json": {"<think>": 800}}, "added_tokens.json: .*'<think>' has the id 800"),
        ({"added_tokens__json": {"<|eot_id|>": 9}}, r"has the id 9 \(expected 4"),
        ({"added_tokens__json": {"<think>": "x"}}, "transformers cannot load it"),
        (
            {"tokenizer_config__json": {"added_tokens_decoder": numbered("<think>", first=702)}},
            r"tokenizer_config.json: the token '<think>' has the id 702 \(expected 701",
        ),
    ],
)
def test_files_that_disagree_with_the_vocabulary_are_named(files, said, tmp_path):
    with pytest.raises(DataError, match=said):
        load_tokenizer(write(tmp_path / "made", **files))


def says(name):
    return (
        "{% for t in tools or [] %}{{ t.name }}{% endfor %}{% for m in messages %}"
        "<|start_header_id|>{{ m.role }}" + name + " {{ mood }}<|end_header_id|>"
        "{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant" + name + " {{ mood }}"
        "<|end_header_id|>{% endif %}"
    )


LISTED = [{"name": name, "template": says(name)} for name in ("default", "tool_use")]
TEMPLATES = {
    "text": ({"tokenizer_config__json": {**CONFIG, "chat_template": says("default")}}, {}),
    "list": ({"tokenizer_config__json": {**CONFIG, "chat_template": LISTED}}, {}),
    "file over a list": (
        {
            "tokenizer_config__json": {**CONFIG, "chat_template": LISTED},
            "chat_template__jinja": says("file"),
        },
        {},
    ),
    "folder": (
        {"tokenizer_config__json": CONFIG, "chat_template__jinja": says("file")},
        {"tool_use": says("folder"), "rag": says("rag")},
    ),
}


@pytest.mark.parametrize(("files", "more"), TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_by_name_are_those_of_transformers(files, more, tmp_path):
    folder = write(tmp_path / "made", **files)
    for name, source in more.items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(source)
    load_tokenizer(folder).save(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        theirs, ours = AutoTokenizer.from_pretrained(place), load_tokenizer(place)
        named = theirs.chat_template
        named = named if isinstance(named, dict) else {"default": named}
        assert {name: one.source for name, one in ours.chat_templates.items()} == named
    assert ours.fingerprint == load_tokenizer(folder).fingerprint
    for variables in ({}, {"mood": "dull"}):  # an export gives each template its variables
        prompt = Prompt("chat", None, ours, variables=variables)
        chat_files.save(ours, prompt, tmp_path / "hf")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
        for tools in (None, [{"name": "add"}]):
            talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
            rows = Chats(name="a", numbers=np.ones(1, np.int64), messages=[talk], tools=[tools])
            made, dropped = prompt.encode(rows)
            assert not dropped
            assert made.tokens.tolist() == theirs.apply_chat_template(
                talk, tools=tools, return_dict=False
            )


def test_an_export_with_other_markup_holds_none_of_them(tmp_path):
    folder = write(tmp_path / "made", chat_template__jinja=says("file"))
    shutil.copy(FOLDER / "tokenizer_config.json", folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(says("folder"))
    tokenizer = load_tokenizer(folder)
    chat_files.save(tokenizer, Prompt("llama3-instruct", None, tokenizer), tmp_path / "hf")
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template, str)


def test_a_template_that_is_not_there_or_cannot_be_used_is_named(tmp_path):
    folder = write(tmp_path, tokenizer_config__json={**CONFIG, "chat_template": LISTED[1:]})
    assert load_tokenizer(folder).chat_template is None
    write(tmp_path, tokenizer_config__json={**CONFIG, "chat_template": [{"name": "default"}]})
    with pytest.raises(DataError, match=r"tokenizer_config.json: chat_template is \[.*expected te"):
        load_tokenizer(folder).chat_templates  # noqa: B018
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template.jinja: not UTF-8"):
        load_tokenizer(folder).chat_templates  # noqa: B018


def test_templates_are_given_what_the_files_name_and_no_more(tmp_path):
    """A BOS that generation_config.json has alone is no `bos_token` in transformers either."""
    folder = write(
        tmp_path,
        tokenizer_config__json={**CONFIG, "bos_token": None, "call_token": "<|end_of_text|>"},
        generation_config__json={"bos_token_id": 0},
        chat_template__jinja="{{ bos_token }}{{ call_token }}{{ messages[0].content }}",
    )
    talk = [{"role": "user", "content": "1"}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(talk, tokenize=False)
    assert load_tokenizer(folder).chat_template.render(talk) == theirs == "<|end_of_text|>1"
