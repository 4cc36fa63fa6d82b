"""Chat templates of some 30 families in, what is prepared with each of them out.

    python -m tests.data.catalogue    writes the table into docs/data.md

The templates are in TRL's wheel: those of the models as they are published, and variants of them
for training, in which `{% generation %}` marks the answers. They are read as files; TRL itself is
never imported. What is right is what transformers makes of the same folder.
"""

import datetime
import json
import re
from importlib.metadata import distribution
from itertools import groupby, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import sentencepiece
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from mcore_sft.base import files
from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import Chats
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "data.md"
FIXTURES = ROOT / "tests" / "fixtures"
BEGIN, END = "<!-- catalogue -->\n", "<!-- end of the catalogue -->\n"

SPECIAL = re.compile(
    r"<[|\uff5c][^\s<>'\"{}|\uff5c]+[|\uff5c]?>|<[a-z_]+\|>|</?s>|<(?:start|end)_of_\w+>"
    r"|<sop>|\[/?[A-Za-z]+\]"
)
ORDINARY = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
"""Markup that tokenizers have as tokens; the others call these special, and not those."""

DAY = datetime.datetime(2026, 1, 4, 9, 30)
"""What a template is told where it asks for today."""

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

Talk = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(name: str) -> dict[str, Any]:
    numbers = {key: {"type": "number", "description": f"Number {key}."} for key in "ab"}
    parameters = {"type": "object", "properties": numbers, "required": ["a", "b"]}
    told = {"name": name, "description": f"{name.title()} a and b.", "parameters": parameters}
    return {"type": "function", "function": told}


def call(number: int, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": {"a": 2, "b": 3}}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def result(number: int, name: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05}", "name": name, "content": text}


ASKED = user("What is 2 + 3?")
CALLS = assistant("", tool_calls=[call(1, "add"), call(2, "multiply")])
RESULTS = [result(1, "add", "5"), result(2, "multiply", "6")]
TOOLS = [tool("add"), tool("multiply")]
TALKS: dict[str, Talk] = {
    "turn": ([ASKED, assistant("It is 5.")], None),
    "turns": ([ASKED, assistant("It is 5."), user("Sure?"), assistant("Yes.")], None),
    "system": ([{"role": "system", "content": "Be brief."}, ASKED, assistant("It is 5.")], None),
    "empty": ([user(""), assistant("Ask me.")], None),
    "tags": ([ASKED, assistant("<think>\n2 + 3 = 5.\n</think>\n\nIt is 5.")], None),
    "thoughts": ([ASKED, assistant("It is 5.", reasoning_content="2 + 3 = 5.")], None),
    "thoughts, turns": (
        [
            ASKED,
            assistant("It is 5.", reasoning_content="2 + 3 = 5."),
            user("Sure?"),
            assistant("Yes.", reasoning_content="5 - 3 = 2."),
        ],
        None,
    ),
    "calls": ([ASKED, CALLS], TOOLS),
    "results": ([ASKED, CALLS, *RESULTS, assistant("They are 5 and 6.")], TOOLS),
}
"""One conversation for each column of the table."""


def templates() -> dict[str, str]:
    """The source of each template, by name."""
    folder = Path(str(distribution("trl").locate_file("trl/chat_templates")))
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}


def byte_level() -> dict[str, Any]:
    """The tokenizer.json of the fixture."""
    text = (FIXTURES / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def metaspace(folder: Path) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of a sentencepiece model, as Llama 2 has it."""
    rows = (FIXTURES / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(json.loads(row)["generated_solution"] for row in rows),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "fast")
    return dict(json.loads((folder / "fast" / "tokenizer.json").read_text(encoding="utf-8")))


def write_folder(vocabulary: dict[str, Any], source: str, folder: Path) -> Path:
    """A tokenizer with `source` as its chat template, and all markup that it spells as tokens."""
    added = list(vocabulary["added_tokens"])
    known = {token["content"] for token in added}
    spelt = re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)
    found = dict.fromkeys(SPECIAL.findall(spelt), True) | dict.fromkeys(ORDINARY.findall(spelt))
    found |= dict.fromkeys(("<|begin_of_text|>", "<|end_of_text|>"), True)
    size = 1 + max(*vocabulary["model"]["vocab"].values(), *(token["id"] for token in added))
    for number, token in enumerate((name for name in found if name not in known), size):
        added.append({"id": number, "content": token, "special": bool(found[token]), **FLAGS})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
    }
    folder.mkdir(parents=True)
    whole = vocabulary | {"added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return folder


def outcome(prompt: Prompt, theirs: Any, talk: Talk) -> str | None:
    """Why a conversation is refused; None where its ids and its mask are right.

    EACH where they are right in an example for each answer. AssertionError where they are wrong.
    """
    messages, tools = talk
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    reasons: list[str] = []
    for train_on in ("all", "each"):
        rows = Chats(name="row", numbers=np.ones(1, np.int64), messages=[messages], tools=[tools])
        try:
            examples, dropped = prompt.encode(rows, train_on=train_on)
        except DataError as error:
            reasons.append(str(error))
            continue
        if dropped:
            reasons.append(dropped[0])
            continue
        lengths, spans = np.cumsum(examples.lengths)[:-1], np.cumsum(examples.span_counts)[:-1]
        made = zip(np.split(examples.tokens, lengths), np.split(examples.spans, spans), strict=True)
        parts = [said] if train_on == "all" else [[i] for i in said]
        for (ids, runs), trained in zip(made, parts, strict=True):
            _require_right(prompt, theirs, messages, tools, trained, ids, runs)
        return None if train_on == "all" else EACH
    return reasons[0]


def _require_right(
    prompt: Prompt, theirs: Any, messages: Any, tools: Any, trained: list[int], ids: Any, runs: Any
) -> None:
    """AssertionError unless an example of the answers `trained` is what transformers makes."""
    messages = messages[: trained[-1] + 1]
    marks = "endgeneration" in theirs.chat_template
    told = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=marks, tools=tools
    )
    whole = theirs.apply_chat_template(messages, tokenize=False, tools=tools)
    offsets = told.encodings[0].offsets
    assert ids.tolist() == told["input_ids"][: len(ids)], "ids"
    left = whole[offsets[len(ids) - 1][1] :]
    assert not SPECIAL.sub("", left).strip(), f"left out: {left!r}"
    asked = [
        theirs.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=True, tools=tools
        )
        for i in trained
    ]
    ends = [len(text) for text in asked if whole.startswith(text)]
    if marks:
        blocks = _stretches(told["assistant_masks"], offsets)
        blocks = [block for block in blocks if block[1] > ends[0]] if len(trained) == 1 else blocks
    else:
        assert len(ends) == len(trained), "a prompt that the whole text does not begin with"
        blocks = list(pairwise([*ends, len(whole)]))
    spans = [_trained(whole, block, ends, prompt.stop_tokens) for block in blocks]
    expected = [span for span in spans if span]
    mask = np.zeros(len(ids), np.bool_)
    for begin, end in runs.tolist():
        mask[begin:end] = True
    found = _stretches(mask, offsets)
    assert found == expected, [[whole[a:b] for a, b in some] for some in (found, expected)]


def _trained(
    whole: str, block: tuple[int, int], prompts: list[int], stops: tuple[str, ...]
) -> tuple[int, int] | None:
    """What is trained of a block: what follows a generation prompt in it, up to the stop token.

    prompts: where they end.
    """
    begin, end = block
    begin = next((asked for asked in prompts if begin < asked < end), begin)
    found = [
        whole.index(stop, begin, end) + len(stop) for stop in stops if stop in whole[begin:end]
    ]
    return (begin, min(found)) if found else None


def _stretches(mask: Any, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The stretches of text whose tokens are marked."""
    found = []
    for marked, some in groupby(zip(mask, offsets, strict=False), key=lambda pair: bool(pair[0])):
        places = [place for _, place in some]
        if marked:
            found.append((places[0][0], places[-1][1]))
    return found


EACH = "each"
WORDS = {
    r"makes nothing of its tool_calls|leaves out the tool": "no tools",
    r"makes nothing of its reasoning_content": "no thoughts",
    r"ends (an|the) answer .*(without|no special token)": "no stop",
    r"once more of the conversation follows|behind the prompt that asks for it": "other prompt",
    r"does not write what the assistant says|has no attribute 'text'": "parts",
    r"refuses messages": "refused",
    EACH: "`each`",
}
"""How a reason is told, and the word for it in the table."""


def survey(folder: Path) -> dict[str, dict[str, str | None]]:
    """Why each conversation is refused with each template; None where it is prepared.

    AssertionError where ids or mask are wrong, or where it depends on the kind of the tokenizer.
    """
    made: dict[str, dict[str, str | None]] = {}
    for kind, vocabulary in (("bytes", byte_level()), ("pieces", metaspace(folder))):
        for name, source in templates().items():
            here = write_folder(vocabulary, source, folder / kind / name)
            found = of_template(here, source)
            first = made.setdefault(name, found)
            different = [column for column in TALKS if bool(first[column]) != bool(found[column])]
            assert not different, f"{name}, {kind}: {found}, with the other tokenizer {first}"
    return made


def of_template(folder: Path, source: str) -> dict[str, str | None]:
    """Why each conversation is refused with the tokenizer and the template `source` in `folder`."""
    theirs = AutoTokenizer.from_pretrained(folder)
    try:
        tokenizer = load_tokenizer(folder)
        prompt = Prompt(
            "chat", None, tokenizer, date=DAY.date() if "strftime_now" in source else None
        )
    except DataError as error:
        return dict.fromkeys(TALKS, str(error))
    found = {}
    for column, talk in TALKS.items():
        try:
            with mock.patch.object(chat_template_utils, "datetime") as clock:
                clock.now.return_value = DAY
                found[column] = outcome(prompt, theirs, talk)
        except AssertionError as error:
            raise AssertionError(f"{folder}, {column}: {error}") from None
    return found


def table(made: dict[str, dict[str, str | None]]) -> str:
    """The table of docs/data.md: a line for all templates of which the same is prepared."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, found in made.items():
        lines.setdefault(tuple(map(_cell, found.values())), []).append(name)
    rows = [[", ".join(names), *cells] for cells, names in lines.items()]
    head = ["template", *TALKS]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def _cell(reason: str | None) -> str:
    if reason is None:
        return "yes"
    found = [said for pattern, said in WORDS.items() if re.search(pattern, reason)]
    assert found, f"a reason that the table has no word for: {reason}"
    return found[0]


def main() -> None:
    """Write the table into the page."""
    with TemporaryDirectory() as folder:
        made = table(survey(Path(folder)))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    files.replace(PAGE, before + BEGIN + made + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
