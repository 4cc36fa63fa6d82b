"""Every kind of tokenizer has the ids of transformers, and trains the text to the letter."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from mcore_sft.config import PromptConfig
from mcore_sft.data.rows import Chats, Pairs
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from tests.data.kinds import KINDS, folder_of

TEXTS = (
    *("The sum is 5.", "It is  so,\n\n and 12 apples.", " 7 ", "e\u0301 \ufb01 \u0958 caf\u00e9"),
    *("\u4e2d\U0001f600\u00a0x", "\t{1}", "The"),
)
END = "<|im_end|>"


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# Where an answer begins or ends with white space, a token may be of both sides.
TALKS = [
    *(said("What is 2+3?", text) for text in TEXTS if text == text.strip()),
    said("1?", "The sum is 5.", "2?", "\u4e2d\U0001f600 so", TEXTS[1], "12 apples."),
]


@pytest.mark.parametrize("gigatoken", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_conversation_has_the_ids_of_transformers(kind, gigatoken, tmp_path):
    folder = folder_of(kind, tmp_path / "t")
    theirs = AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, gigatoken=gigatoken)
    prompt = Prompt.load(PromptConfig(template="chat", instruction=None), tokenizer)
    talks = TALKS * (64 // len(TALKS) + 1)
    rows = Chats(name="a.jsonl", numbers=np.arange(len(talks)) + 1, messages=talks)
    examples, dropped = prompt.encode(rows)
    assert dropped == {}
    assert len(examples) == len(talks)
    ends, runs = np.cumsum(examples.lengths), np.cumsum(examples.span_counts)
    end = theirs.convert_tokens_to_ids(END)
    for k, talk in enumerate(TALKS):
        tokens = examples.tokens[ends[k] - examples.lengths[k] : ends[k]].tolist()
        whole = theirs.apply_chat_template(talk, return_dict=False)
        assert tokens == whole[: len(whole) - whole[::-1].index(end)]
        spans = examples.spans[runs[k] - examples.span_counts[k] : runs[k]].tolist()
        for turn, (first, last) in enumerate(spans):
            before = talk[: 2 * turn + 1]
            asked = theirs.apply_chat_template(
                before, add_generation_prompt=True, return_dict=False
            )
            assert tokens[:first] == asked
            assert tokens[last - 1] == end
            if "NF" not in kind:
                assert (
                    theirs(tokenizer.text_of(tokens), add_special_tokens=False).input_ids == tokens
                )
                learned = tokenizer.spell(tokens[first:last])
                assert learned.strip() == talk[2 * turn + 1]["content"] + END


@pytest.mark.parametrize("kind", KINDS)
def test_solution_goes_on_where_the_prompt_ends(kind, tmp_path):
    tokenizer = load_tokenizer(folder_of(kind, tmp_path / "t"))
    prompt = Prompt.load(PromptConfig(template="chatml", instruction=None), tokenizer)
    problems = [f"{i} + {text}?" for i in range(12) for text in TEXTS]
    solutions = [text for _ in range(12) for text in TEXTS]
    rows = Pairs(
        name="a.jsonl",
        numbers=np.arange(len(problems)) + 1,
        problems=pa.array(problems, pa.large_string()),
        solutions=pa.array(solutions, pa.large_string()),
    )
    examples, dropped = prompt.encode(rows)
    assert dropped == {}
    starts = np.append(0, np.cumsum(examples.lengths))
    for k, (start, end) in enumerate(pairwise(starts.tolist())):
        [first, last] = examples.spans[k].tolist()
        tokens = examples.tokens[start:end].tolist()
        assert tokens[:first] == prompt.prompt_ids(problems[k])
        assert last == end - start
        if "NF" not in kind:
            assert tokenizer.spell(tokens[first:]) == solutions[k] + END


@pytest.mark.parametrize("kind", KINDS)
def test_located_tokens_tile_what_they_spell(kind, tmp_path):
    tokenizer = load_tokenizer(folder_of(kind, tmp_path / "t"), gigatoken=False)
    texts = ["", *TEXTS, *(f"<|im_start|>user\n{text}<|im_end|>\n{text}" for text in TEXTS)]
    column = pa.array(["cut off", *texts], pa.large_string()).slice(1)
    found = tokenizer.locate_column(column)
    assert [found.of(i).tolist() for i in range(len(texts))] == list(map(tokenizer.encode, texts))
    assert (np.diff(found.begins) >= 0).all()
    for i, text in enumerate(texts):
        this = slice(found.offsets[i], found.offsets[i + 1])
        places = np.stack([found.begins[this], found.ends[this]], axis=1) - found.starts[i]
        for number, (begin, end) in zip(found.of(i).tolist(), places.tolist(), strict=True):
            spelt = tokenizer.spell([number])
            exact = (
                "NF" not in kind and "\ufffd" not in spelt and len(spelt.encode()) == end - begin
            )
            put_before = spelt == " " and text.encode()[begin:end] != b" "
            assert not exact or put_before or text.encode()[begin:end].decode() == spelt
        assert bytes(found.data[found.starts[i] : found.starts[i + 1]]).decode() == text


def test_sentencepiece_model_of_which_transformers_makes_something_else_is_told(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    assert load_tokenizer(folder_of("spm", tmp_path / "t")).caveat is None
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((tmp_path / "t" / "tokenizer.model").read_bytes())
    model.pieces[-1].piece, model.pieces[-1].score = "\u2581\u2581", 1.0  # last, and merged first
    (tmp_path / "t" / "tokenizer.model").write_bytes(model.SerializeToString())
    said = load_tokenizer(tmp_path / "t").caveat
    assert said is not None
    assert "than the sentencepiece model itself" in said
