import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mcore_sft.base.terminal import Console
from mcore_sft.data.encode.block import Sample
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum, write_index
from mcore_sft.data.packs.dataset import Arrays
from mcore_sft.data.packs.proof import prove
from mcore_sft.data.packs.row_names import shown
from mcore_sft.data.report.page import _contamination
from mcore_sft.data.report.report import show_manifest, write_report
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from tests.prompts import MathPrompt

TOKENIZER = load_tokenizer(Path(__file__).parent.parent / "fixtures" / "tokenizer")
PROMPT = Prompt.load(MathPrompt(), TOKENIZER)
BOS, STOP = TOKENIZER.token_id("<|begin_of_text|>"), TOKENIZER.token_id("<|eot_id|>")
VOCAB = {"<think>": 290, "</think>": 291, "<tool_call>": 292, "</tool_call>": 293}
EVIL = "<script>alert('x')</script> & \ud800"


def write(folder: Path, examples: list[tuple[list[int], list[list[int]]]], packs: list[list[int]]):
    """The files of the split train, of (tokens, spans) each."""
    folder.mkdir(exist_ok=True)
    prefix = folder / "train"
    lengths = np.array([len(tokens) for tokens, _ in examples], dtype=np.int32)
    tokens = np.concatenate([tokens for tokens, _ in examples]).astype(np.uint16)
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    write_index(prefix.with_suffix(".idx"), lengths, np.dtype(np.uint16))
    spans = [span for _, own in examples for span in own]
    arrays = {
        "spans": np.array(spans, np.int32).reshape(-1, 2),
        "span_offsets": running_sum(np.array([len(own) for _, own in examples])),
        "packs": np.array([i for pack in packs for i in pack], np.int64),
        "pack_offsets": running_sum(np.array([len(pack) for pack in packs])),
        "supervised": np.zeros(len(packs), np.int32),
    }
    for name, array in arrays.items():
        np.save(prefix.with_suffix(f".{name}.npy"), array)


def proved(folder: Path, **settings):
    options = {"sequence_length": 10, "stop_ids": (STOP,), "bos_id": BOS, "vocab": VOCAB} | settings
    return prove(Arrays.open(folder, "train"), **options)


GOOD = [
    ([BOS, 300, 301, 302, STOP], [[3, 5]]),
    ([300, 301, STOP], [[0, 1], [2, 3]]),
    ([BOS, 300, 301, STOP], [[2, 4]]),
]


@pytest.fixture(params=[1 << 21, 4])
def chunk(request, monkeypatch):
    """Everything at once, and in pieces."""
    monkeypatch.setattr("mcore_sft.data.packs.proof._TOKENS_AT_ONCE", request.param)
    monkeypatch.setattr("mcore_sft.data.packs.proof._PACKS_AT_ONCE", 1 + request.param // 4)


@pytest.mark.usefixtures("chunk")
def test_what_is_proved_is_counted(tmp_path):
    write(tmp_path, GOOD, [[2, 1], [0, 2]])
    found = proved(tmp_path)
    assert found.examples == 3
    assert found.lengths.tolist() == [0, 0, 0, 1, 1, 1]
    # Nothing predicts the first token, so that a span of it alone teaches nothing.
    assert found.supervised.tolist() == [0, 1, 2, 0, 0, 0]
    assert (found.tokens, found.supervised_tokens) == (4 + 3 + 5 + 4, 2 + 1 + 2 + 2)
    assert found.with_bos == 2
    assert proved(tmp_path, stop_ids=(STOP, BOS)).with_bos == 2
    assert proved(tmp_path, stop_ids=None).with_bos is None
    assert found.parts == {"answers": 4, "answers that stop": 3, "reasoning": 0, "tool calls": 0}


@pytest.mark.usefixtures("chunk")
def test_trained_tokens_that_reason_or_call_tools_are_counted(tmp_path):
    """From the tag that opens them, wherever it stands, to the one that closes them or the end."""
    examples = [
        ([BOS, 290, 300, 301, 291, 302, STOP], [[2, 7]]),  # the prompt opens the thoughts
        ([290, 300, 291, 300, 290, 301, 291, STOP], [[4, 8]]),  # earlier ones are not trained
        ([300, 290, 301, STOP, 300, STOP], [[1, 4], [5, 6]]),  # never closed
        ([300, 292, 301, 302, 293, 292, 301, 293, STOP], [[1, 9]]),
    ]
    write(tmp_path, examples, [[i] for i in range(4)])
    found = proved(tmp_path).parts
    assert found == {
        "answers": 5,
        "answers that stop": 5,
        "reasoning": 3 + 3 + 4,
        "tool calls": 4 + 3,
    }
    python = {"<|python_tag|>": 300}  # which the end of the answer closes
    assert proved(tmp_path, vocab=python).parts == {
        "answers": 5,
        "answers that stop": 5,
        "tool calls": 4 + 3 + 2 + 7,
    }


BROKEN = {
    "no supervised token": ([300, STOP], []),
    "no supervised token, so": ([STOP], [[0, 1]]),
    "ends with token 301, trained; expected a stop token": ([BOS, 300, 301], [[1, 3]]),
    f"ends with token {STOP}, not trained": ([BOS, 300, STOP], [[1, 2]]),
    "begins with two BOS tokens": ([BOS, BOS, 300, STOP], [[3, 4]]),
    "11 tokens, expected at most 10": ([300] * 10 + [STOP], [[3, 11]]),
}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("said", BROKEN)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_what_must_not_be_is_named(said, place, tmp_path):
    examples = [*GOOD[:place], BROKEN[said], *GOOD[place:]]
    write(tmp_path, examples, [[i] for i in range(4)])
    with pytest.raises(DataError, match=rf"train\..*(example|pack) {place}: .*{said}"):
        proved(tmp_path)


def test_example_in_no_pack_is_named(tmp_path):
    write(tmp_path, GOOD, [[0], [2]])
    with pytest.raises(DataError, match="example 1: is in no pack"):
        proved(tmp_path)


# --- the report

INPUTS = {
    "data": {"sequence_length": 64, "contamination": {"threshold": 0.9, "remove": True}},
    "prompt": {**PROMPT.describe(), "fingerprint": PROMPT.fingerprint},
    "tokenizer": {"fingerprint": TOKENIZER.fingerprint, "vocab_size": 701, "pad_id": 0},
    "sources": {
        "train": [
            {"path": "rows.jsonl", "files": []},
            {"path": "org/name", "name": "main", "split": "train", "rows": 4},
        ],
        "against": [{"path": "math/test.jsonl", "files": []}],
    },
}
PAIRS = [
    {
        "problem": f"p{i}",
        "benchmark_problem": EVIL,
        "kind": kind,
        "overlap": 0.9,
        "where": f"rows.jsonl:{i + 1}",
        "benchmark": "math/test.jsonl:17",
    }
    for i, kind in enumerate(["13-gram"] * 30 + ["8-gram", "exact"])
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of five examples, and the counts of it."""
    folder = tmp_path_factory.mktemp("data") / "packed"
    examples = []
    for number in (1, 22, 333, 4444, 55555):
        prompt = TOKENIZER.encode(f"<|begin_of_text|>What is {number}? </pre><b>x")
        answer = TOKENIZER.encode(f"It is {number}.<|eot_id|>")
        examples.append(([*prompt, *answer], [[len(prompt), len(prompt) + len(answer)]]))
    write(folder, examples, [[0], [1], [2], [3], [4]])
    lines = [json.dumps(pair) + "\n" for pair in PAIRS]
    (folder / "train.contamination.jsonl").write_text("".join(lines), encoding="utf-8")
    tokens = sum(len(tokens) for tokens, _ in examples)
    counts = {
        "rows": 9,
        "dropped": {"bad row": 1, "duplicate": 3},
        "contaminated_problems": 32,
        "contaminated_by": {"math/test.jsonl": 32},
        "source_rows": [5, 4],
        "source_examples": [5, 0],
        "source_visits": [5, 0],
        "tokenized_elsewhere": False,
        "examples": 5,
        "visits": 5,
        "tokens": tokens,
        "supervised_tokens": sum(spans[0][1] - spans[0][0] for _, spans in examples),
        "longest": max(len(tokens) for tokens, _ in examples),
        "packs": 5,
        "packing_efficiency": round(tokens / 5 / 64, 6),
        "examples_per_pack": 1.0,
    }
    return folder, counts


def report(folder: Path, counts: dict) -> dict:
    dropped = {"train": {"duplicate": [{"where": "rows.jsonl:7", "text": EVIL}]}}
    write_report(
        folder,
        counts={"train": counts},
        inputs=INPUTS,
        sequence_length=64,
        dropped=dropped,
        tokenizer=TOKENIZER,
        prompt=PROMPT,
    )
    return json.loads((folder / "report.json").read_bytes())


def test_report_tells_what_the_files_hold(made):
    folder, counts = made
    found = report(folder, counts)
    assert found["prompt"]["text"] == PROMPT.text("{problem}")
    assert found["inputs"] == INPUTS
    train = found["splits"]["train"]
    assert train["counts"] == counts
    trained = {"answers": 5, "answers that stop": 5}  # the tokenizer has no tags for the rest
    assert train["proof"] == {"examples": 5, "stops": True, "with_bos": 5, "trained": trained}
    assert train["supervised_share"] == round(counts["supervised_tokens"] / counts["tokens"], 6)
    lengths = Arrays.open(folder, "train").tokens.lengths
    of = train["lengths"]["tokens"]
    assert (of["shortest"], of["longest"]) == (lengths.min(), lengths.max())
    assert (of["median"], of["mean"]) == (np.median(lengths), round(float(lengths.mean()), 1))
    steps = np.bincount((np.array(lengths) - 1) // of["step"]).tolist()
    assert of["histogram"] == steps
    assert list(train["dropped"].items()) == [
        ("bad row", []),
        ("duplicate", [{"where": "rows.jsonl:7", "text": EVIL}]),
    ]
    assert train["sources"] == [
        {"source": "rows.jsonl", "rows": 5, "examples": 5, "visits": 5},
        {"source": "org/name [main, train]", "rows": 4, "examples": 0, "visits": 0},
    ]
    contamination = train["contamination"]
    assert contamination["kinds"] == {"exact": 1, "8-gram": 1, "13-gram": 30}
    assert contamination["pairs"] == [PAIRS[31], PAIRS[30], *PAIRS[:18]]


def test_examples_are_whole_and_say_what_is_trained(made):
    train = report(*made)["splits"]["train"]
    assert [example["example"] for example in train["examples"]] == [0, 2, 4]
    runs = train["examples"][1]["runs"]
    assert runs == [
        ["<|begin_of_text|>", False, True],
        ["What is 333? </pre><b>x", False, False],
        ["It is 333.", True, False],
        ["<|eot_id|>", True, True],
    ]


def test_same_dataset_gives_the_same_bytes_wherever_it_lies(made, tmp_path):
    folder, counts = made
    report(folder, counts)
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    report(elsewhere, counts)
    for name in ("report.json", "report.html"):
        raw = (folder / name).read_bytes()
        assert raw == (elsewhere / name).read_bytes()
        assert str(folder).encode() not in raw


@pytest.mark.parametrize("name", ["examples", "tokens", "supervised_tokens"])
def test_counts_that_the_files_do_not_hold(name, made, tmp_path):
    folder, counts = made
    folder = Path(shutil.copytree(folder, tmp_path / "packed"))
    (folder / "report.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match=rf"{counts[name] + 1} {name} were counted, but the files"):
        report(folder, {**counts, name: counts[name] + 1})
    assert not (folder / "report.json").exists()


def test_rows_are_named_without_the_folders_of_this_machine(made):
    folder, counts = made
    samples = {
        "bad row": [Sample("/here/data/math/rows.jsonl:4", "/here/data/math/rows.jsonl:4: broken")],
        "duplicate": [
            Sample("/elsewhere/rows.jsonl:5", ""),
            Sample(
                "org/name[train]:6",
                "",
                same_as="/here/data/math/rows.jsonl:4",
                tokens=TOKENIZER.encode("as before"),
            ),
        ],
    }
    write_report(
        folder,
        counts={"train": counts},
        inputs=INPUTS,
        sequence_length=64,
        dropped={"train": shown(samples, Path("/here/data"), TOKENIZER.decode)},
        tokenizer=TOKENIZER,
        prompt=PROMPT,
    )
    dropped = json.loads((folder / "report.json").read_bytes())["splits"]["train"]["dropped"]
    assert dropped == {
        "bad row": [{"where": "math/rows.jsonl:4", "text": "broken"}],
        "duplicate": [
            {"where": "elsewhere/rows.jsonl:5", "text": ""},
            {
                "where": "org/name[train]:6",
                "text": "as before",
                "same_as": "math/rows.jsonl:4",
            },
        ],
    }


class Page(HTMLParser):
    """What a browser would see: tags, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_page_escapes_every_text_of_a_row_and_needs_nothing_beside_itself(made):
    report(*made)
    raw = (made[0] / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(raw)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert not any(
        key in ("src", "href") or key.startswith("on") for _, a in page.tags for key in a
    )
    assert "http" not in raw
    assert "url(" not in raw
    assert page.text.count("<script>alert('x')</script> & \\ud800") == 1 + 20
    assert page.text.count("</pre><b>x") == 3
    for told in (
        "rows.jsonl:7",
        "duplicate 3 rows, 33.33%",
        "every message of its user, with math/test.jsonl.",
        "Pairs: 1 exact, 1 8-gram, 30 13-gram",
        "90% of math/test.jsonl:17 is in rows.jsonl:32",
        "org/name [main, train]400",
    ):
        assert told in page.text
    assert TOKENIZER.fingerprint in page.text
    trained = "".join(re.findall(r"<ins>(.*?)</ins>", raw))
    assert "It is 333." in trained
    assert "What is 333" not in trained
    bars = re.findall(r"<title>([\d,]+) to ([\d,]+) tokens: (\d+)", raw)
    assert sum(int(count) for _, _, count in bars) == 2 * 5
    assert len(raw) < 40_000


def test_page_says_when_nothing_was_compared():
    for sources, told in (
        ({"train": INPUTS["sources"]["train"]}, "names no benchmark"),
        (INPUTS["sources"], "None is alike"),
    ):
        inputs = {**INPUTS, "sources": sources}
        report = {"inputs": inputs, "splits": {"train": {"contamination": {"pairs": []}}}}
        assert told in _contamination(report)


def test_table_of_counts(made):
    _, counts = made
    twice = {**counts, "visits": 10, "dropped": {"longer than the sequence": 2}, "held_out": 3}
    splits = {"train": counts, "validation": {**twice, "shared_problems": 4}}
    console = Console(file=io.StringIO(), width=100)
    told = {"splits": splits, "sequence_length": 64, "fingerprint": "abcdef" * 8}
    show_manifest(told, Path("packed"), console=console)
    shown = [re.split(r"\s{2,}", line.strip()) for line in console.file.getvalue().splitlines()]
    assert ["rows read", "9", "9"] in shown
    labels = [line[0] for line in shown]
    dropped = [label for label in labels if label.startswith("dropped: ")]
    assert dropped == [
        f"dropped: {x}" for x in ("bad row", "duplicate", "longer than the sequence")
    ]
    assert ["dropped: duplicate", "3 (33.3%)", "0 (0.0%)"] in shown
    assert ["held out for validation", "0 (0.0%)", "3 (33.3%)"] in shown
    assert labels.index("examples") < labels.index("an epoch") < labels.index("tokens")
    assert ["examples shown", "5", "10"] in shown
    assert ["problems that share words with math/test.jsonl", "32", "32"] in shown
    assert ["problems in train and validation", "4"] in shown
    assert ["packed", "abcdefabcdef"] in shown
