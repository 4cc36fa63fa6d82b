import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from mcore_sft.base.terminal import Console
from mcore_sft.config import DataConfig, PromptConfig
from mcore_sft.data.encode.job import Job
from mcore_sft.data.errors import DataError
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.prepare import prepare
from mcore_sft.data.rows import Chats, Pairs
from mcore_sft.data.sources.conversation import UnfitRow, checked
from mcore_sft.data.text.answers import divided, reasoning_in
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer

TAGS = ("<think>", "</think>")
TALK = checked(
    [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "two", "weight": 0},
        {"role": "user", "content": "3?"},
        {"role": "assistant", "content": "three"},
    ]
)


def shown(talks):
    """Of each conversation how long it is, and which of its answers are trained."""
    return [
        (len(talk), [m["content"] for m in talk if m["role"] == "assistant" and "weight" not in m])
        for talk in talks
    ]


def test_each_trained_answer_makes_an_example_that_ends_with_it():
    assert divided(TALK, "all") == [TALK]
    assert shown(divided(TALK, "last")) == [(6, ["three"])]
    assert shown(divided(TALK, "each")) == [(2, ["one"]), (6, ["three"])]
    assert shown(divided(TALK[:4], "last")) == [(2, ["one"])]
    assert "weight" not in TALK[1], "the row itself is not changed"


@pytest.mark.parametrize(
    ("answer", "said", "reasoning"),
    [
        ("It is 5.", {}, []),
        ("<think>\na\n</think>\n\nIt is 5.", {}, ["<think>\na\n</think>"]),
        ("a</think>It is 5.", {}, ["a</think>"]),  # the prompt has opened it
        ("<think>a</think>x<think>b</think>y", {}, ["<think>a</think>", "<think>b</think>"]),
        ("<think>a</think>the tag </think> ends it", {}, ["<think>a</think>"]),
        ("<think>\na\n</think>\n\nx", {"reasoning_content": " a\n"}, ["<think>\na\n</think>"]),
        ("analysis: a, final: a", {"thinking": "a"}, ["a"]),
        ("<think>a <think> b</think>x", {"reasoning_content": ""}, ["<think>a <think> b</think>"]),
    ],
)
def test_reasoning_is_found_by_its_key_or_by_the_tags(answer, said, reasoning):
    assert [answer[a:b] for a, b in reasoning_in(answer, said, TAGS)] == reasoning


@pytest.mark.parametrize(
    ("answer", "said", "error"),
    [
        ("<think>a", {}, "an answer has <think> and no </think> behind it"),
        ("<think>a</think>x<think>b", {}, "has <think> and no </think> behind it"),
        ("A", {"reasoning_content": "a"}, "writes the reasoning 'a' otherwise than it is"),
    ],
)
def test_reasoning_that_cannot_be_told_apart_is_an_error(answer, said, error):
    with pytest.raises(UnfitRow, match=error):
        reasoning_in(answer, said, TAGS)


HEAD = "<|start_header_id|>"
# As Qwen3's: only the last turn has its thoughts, which stand in content or beside it.
FORGETFUL = (
    "{% for m in messages %}" + HEAD + "{{ m.role }}<|end_header_id|>"
    "{% set said = m.content.split('</think>')[-1] %}{% set thought = m.reasoning_content or "
    "m.content.split('<think>')[-1].split('</think>')[0] if '</think>' in m.content else "
    "m.reasoning_content or '' %}{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ thought }}</think>{% endif %}{{ said }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}" + HEAD + "assistant<|end_header_id|>{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


THOUGHTFUL = [
    user("1?"),
    assistant("one", reasoning_content="a"),
    user("2?"),
    assistant("<think>b</think>two"),
    user("3?"),
    assistant("three", thinking="c"),
]
ANSWERS = [
    f"<think>{thought}</think>{said}<|eot_id|>"
    for thought, said in (("a", "one"), ("b", "two"), ("c", "three"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    fixture = Path(__file__).parent.parent / "fixtures" / "tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fixture / name, made)
    (made / "chat_template.jinja").write_text(FORGETFUL)
    return made


def encoded(folder, talk, train_on="all", unfit=None, **prompt):
    """The row of each example, its trained texts, and the text before the first of them."""
    tokenizer = load_tokenizer(folder)
    config = PromptConfig(template="chat", instruction=None, **prompt)
    rows = Chats(name="a.jsonl", numbers=np.ones(1, np.int64), messages=[talk])
    made, dropped = Prompt.load(config, tokenizer).encode(rows, unfit, train_on)
    assert not dropped
    found, token, span = [], 0, 0
    for row, length, count in zip(made.rows, made.lengths, made.span_counts, strict=True):
        ids, spans = made.tokens[token : token + length], made.spans[span : span + count].tolist()
        texts = [tokenizer.decode(ids[begin:end].tolist()) for begin, end in spans]
        found.append((int(row), tokenizer.decode(ids[: spans[0][0]].tolist()), texts))
        token, span = token + length, span + count
    return found


def test_a_template_that_forgets_thoughts_is_trained_one_answer_at_a_time(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    asked = [
        theirs.apply_chat_template(THOUGHTFUL[:i], tokenize=False, add_generation_prompt=True)
        for i in (1, 3, 5)
    ]
    each = [(0, before, [answer]) for before, answer in zip(asked, ANSWERS, strict=True)]
    assert encoded(folder, THOUGHTFUL, "each") == each
    assert encoded(folder, THOUGHTFUL, "last") == each[2:]
    some = [{**said, "weight": 0} if i in (1, 3) else said for i, said in enumerate(THOUGHTFUL)]
    for train_on in ("all", "each"):
        assert encoded(folder, some, train_on) == each[2:]


def test_all_answers_are_refused_where_the_template_forgets(folder):
    said = "a.jsonl:1: .*once more of the conversation follows.*data.train_on=each"
    with pytest.raises(DataError, match=said):
        encoded(folder, THOUGHTFUL)
    unfit = {}
    assert encoded(folder, THOUGHTFUL, unfit=unfit) == []
    assert list(unfit) == [0], "on_bad_row: skip reaches it"


def test_what_is_forgotten_of_a_user_is_still_an_error(folder):
    with pytest.raises(DataError, match="message 1: the chat template leaves out its content"):
        encoded(folder, [user("a</think>b"), *THOUGHTFUL[1:]], "last")


def test_masked_reasoning_is_read_and_not_trained(folder):
    found = encoded(folder, THOUGHTFUL, "each", mask_reasoning=True)
    assert [(before[-8:], texts) for _, before, texts in found] == [
        ("</think>", [f"{said}<|eot_id|>"]) for said in ("one", "two", "three")
    ]
    (one,) = encoded(
        folder, [user("1?"), assistant("[a] x [b] y")], mask_reasoning=True,
        reasoning_tags=["[", "]"],
    )  # fmt: skip
    assert one[2] == ["<think></think>", " x ", " y<|eot_id|>"]


@pytest.mark.parametrize("template", ["llama3-instruct", "chat"])
def test_reasoning_of_solutions_is_masked_too(folder, template):
    tokenizer = load_tokenizer(folder)
    prompt = Prompt(template, None, tokenizer, mask_reasoning=True)
    texts = [("1?", "<think>a</think>one"), ("2?", "two"), ("<|eot_id|>", "x"), ("3?", "<think>")]
    problems, solutions = (
        pa.array(column, pa.large_string()) for column in zip(*texts, strict=True)
    )
    rows = Pairs(name="a", numbers=np.arange(4), problems=problems, solutions=solutions)
    unfit = {}
    made, dropped = prompt.encode(rows, unfit)
    assert (list(dropped), list(unfit)) == ([2], [3])
    ids = np.split(made.tokens, np.cumsum(made.lengths)[:-1])
    assert [
        tokenizer.decode(some[begin:end].tolist())
        for some, (begin, end) in zip(ids, made.spans.tolist(), strict=True)
    ] == ["one<|eot_id|>", "two<|eot_id|>"]


def test_options_of_reasoning_come_back_from_a_description(folder):
    tokenizer = load_tokenizer(folder)
    plain = Prompt("chat", None, tokenizer)
    assert plain.describe().keys() == {"template", "instruction"}
    for given in ({"mask_reasoning": True}, {"reasoning_tags": ["[", "]"]}):
        one = Prompt("chat", None, tokenizer, **given)
        told = json.loads(json.dumps(one.describe()))
        assert Prompt.restore(told, tokenizer).fingerprint == one.fingerprint != plain.fingerprint


def test_examples_of_one_row_stay_together(folder, tmp_path):
    """Each is counted, none is a duplicate of another, and a split never separates them."""
    talks = [[user(f"{n}?"), *THOUGHTFUL[1:]] for n in range(20)]
    lines = [json.dumps({"talk": talk}) for talk in [*talks, talks[0]]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = load_tokenizer(folder)
    for by in ("row", "problem"):
        data = DataConfig.model_validate(
            {
                "root": tmp_path,
                "train": [{"path": "a.jsonl", "messages": "talk"}],
                "sequence_length": 128,
                "workers": 1,
                "train_on": "each",
                "holdout": {"fraction": 0.3, "by": by},
            }
        )
        prompt = Prompt("chat", None, tokenizer)
        console = Console(file=io.StringIO(), width=200)
        work = Job(config=data, prompt=prompt, tokenizer=tokenizer, console=console)
        prepare(work, tmp_path / by)
        problems = []
        for split in ("train", "validation"):
            dataset = PackedDataset(tmp_path / by, split)
            texts = [
                tokenizer.decode(dataset.example(i).tokens.tolist())
                for i in range(dataset.num_examples)
            ]
            first = [text.split("<|eot_id|>")[0] for text in texts]
            assert len(texts) == len(set(texts)) == 3 * len(set(first))
            problems.append(set(first))
        assert not problems[0] & problems[1]
        assert len(problems[0] | problems[1]) == 20
        assert dataset.manifest["splits"]["train"]["dropped"] == {"duplicate": 3}
