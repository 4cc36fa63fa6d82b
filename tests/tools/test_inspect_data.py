import json
import random
import re
import shutil
import sys
from pathlib import Path

import inspect_data
import numpy as np
import pytest

from mcore_sft import command
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.text.tokenizer import Tokenizer, load_tokenizer
from tests import runs

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOKENIZER = ("--tokenizer", FIXTURES / "tokenizer")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    validation = [{"path": "rows.jsonl", "limit": 9}]
    runs.pack_rows(runs.experiment(made, made, data__validation=validation))
    return made / "packed"


@pytest.fixture
def inspect(monkeypatch, capsys):
    """Runs the command; gives the exit code, what it said on stdout, and on stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command.run(inspect_data.main)
        return (stopped.value.code, *capsys.readouterr())

    return run


def test_summary_has_counts_and_a_chart_for_every_split(packed, inspect):
    code, shown, _ = inspect(packed)
    assert code == 0
    counts = PackedDataset(packed).counts
    share = counts["supervised_tokens"] / counts["tokens"]
    assert "packing efficiency" in shown
    assert f"train: {share:.1%} of the tokens are supervised" in shown
    assert "validation: " in shown
    _, shown, _ = inspect(packed, "--split", "validation")
    assert "of the tokens" in shown
    assert "train: " not in shown


def test_pack_shows_all_its_examples_as_text(packed, inspect):
    dataset, tokenizer = PackedDataset(packed), load_tokenizer(FIXTURES / "tokenizer")
    pack = dataset.pack(0)
    code, shown, _ = inspect(packed, "--pack", 0, *TOKENIZER)
    assert code == 0
    assert f"pack 0 of {len(dataset)}: {pack.tokens} of 512 tokens" in shown
    assert f"examples: {len(pack.examples)}" in shown
    position = 0
    for example in pack.examples:
        assert f"{len(example)} tokens at {position} to {position + len(example) - 1}, " in shown
        assert tokenizer.decode(example.tokens.tolist()) in shown
        position += len(example)


def test_colours_tell_supervised_and_special_tokens(packed, inspect, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    _, shown, _ = inspect(packed, "--example", 0, *TOKENIZER)
    assert "\x1b[1m<|begin_of_text|>" in shown
    assert "\x1b[2msystem" in shown
    assert "\x1b[1;32m<|eot_id|>" in shown
    assert any("\\boxed" in line and "\x1b[32m" in line for line in shown.splitlines())


def test_example_says_in_which_pack_it_lies(packed, inspect):
    packs = np.load(packed / "train.packs.npy")
    offsets = np.load(packed / "train.pack_offsets.npy")
    last_of_first = int(packs[offsets[1] - 1])
    _, shown, _ = inspect(packed, "--example", last_of_first)
    assert "train: pack 0\n" in shown
    assert f"example {last_of_first}: " in shown


def test_without_a_tokenizer_ids_and_how_to_get_text(packed, inspect):
    example = PackedDataset(packed).example(7)
    _, shown, _ = inspect(packed, "--example", 7)
    assert " ".join(map(str, example.tokens.tolist())) in shown
    assert "give the tokenizer that made the dataset (--tokenizer DIR)" in shown


def test_ids_beside_text_a_line_a_token(packed, inspect):
    example = PackedDataset(packed).example(7)
    tokenizer = load_tokenizer(FIXTURES / "tokenizer")
    _, shown, _ = inspect(packed, "--example", 7, "--ids", *TOKENIZER)
    lines = [line.split() for line in shown.splitlines() if line.split()[:1] != ["example"]]
    rows = [line for line in lines if len(line) > 1 and line[0].isdigit()]
    assert [int(row[1]) for row in rows] == example.tokens.tolist()
    assert rows[0][:3] == ["0", str(tokenizer.bos_id), "'<|begin_of_text|>'"]
    supervised = [number for number, row in enumerate(rows) if row[-1] == "yes"]
    assert supervised == [i for start, end in example.spans.tolist() for i in range(start, end)]


def test_random_pack_is_drawn_by_the_seed(packed, inspect):
    drawn = random.Random(5).randrange(len(PackedDataset(packed)))
    assert f": pack {drawn} of" in inspect(packed, "--random", 5)[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pack", 999), "--pack 999: expected 0 to "),
        (("--pack", -1), "--pack -1: expected 0 to "),
        (("--example", 999), "--example 999: expected 0 to "),
        (("--split", "test"), "no split 'test', only train, validation"),
        (("--pack", 0, "--tokenizer", "nowhere"), "one of these files (--tokenizer DIR)"),
    ],
)
def test_what_is_not_there(packed, inspect, arguments, said):
    code, _, error = inspect(packed, *arguments)
    assert (code, error.startswith("error: ")) == (2, True)
    assert said in error


def test_another_tokenizer_is_refused(packed, inspect, tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "tokenizer", tmp_path / "tokenizer"))
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    code, _, error = inspect(packed, "--pack", 0, "--tokenizer", folder)
    assert code == 2
    assert "not the tokenizer that made this dataset (fingerprint" in error


def test_verify_passes_what_is_sound_and_names_damage(packed, inspect, tmp_path):
    code, shown, _ = inspect(packed, "--verify")
    assert (code, "sound (20 files, train, validation)" in shown) == (0, True)
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    spans = np.load(folder / "train.spans.npy")
    spans[3] = (5, 9999)
    np.save(folder / "train.spans.npy", spans)
    code, shown, error = inspect(folder, "--verify")
    assert code == 2
    assert "train.spans.npy: corrupt: SHA-256" in shown
    assert "train.spans.npy: example 3: trained span 0 goes from 5 to 9999" in shown
    assert "damaged, see above; run preprocess again" in error
    for arguments in ((), ("--example", 3)):
        code, _, error = inspect(folder, *arguments)
        assert (code, "--verify lists all" in error) == (2, True)


def test_verify_compares_ids_with_those_of_the_text(packed, inspect, monkeypatch, tmp_path):
    code, shown, _ = inspect(packed, "--verify", *TOKENIZER)
    assert (code, "; every example has the ids of its text" in shown) == (0, True)

    def letter_by_letter(self, texts):
        """As a fast tokenizer that knows no merges might have it, of one solution."""
        made = [self.encode(text) for text in texts.to_pylist()]
        if len(texts) > 3:
            letters = texts[3].as_py().removesuffix("<|eot_id|>")
            made[3] = [i for letter in letters for i in self.encode(letter)] + made[3][-1:]
        return np.concatenate(made).astype(np.int32), np.cumsum([0, *map(len, made)])

    monkeypatch.setattr(Tokenizer, "encode_turns", letter_by_letter)
    runs.pack_rows(runs.experiment(tmp_path, tmp_path, data__workers=1))
    code, shown, error = inspect(tmp_path / "packed", "--verify", *TOKENIZER)
    assert code == 2
    assert re.search(r"train\.bin: example 1: token \d+ is \d+ '.' \(expected \d+ '..", shown)
    assert "1 examples have other ids than their text" in error


def test_any_damaged_byte_is_met_with_a_sentence(packed, inspect, tmp_path):
    """Whatever is broken, by whatever value: never a traceback, and --verify never passes."""
    folder = tmp_path / "packed"
    draw = random.Random(0)
    names = sorted(file.name for file in packed.iterdir() if file.name != "manifest.json")
    for name in names:
        shutil.copytree(packed, folder)
        raw = bytearray((folder / name).read_bytes())
        for place in (draw.randrange(len(raw)), draw.randrange(min(128, len(raw)))):
            raw[place] ^= draw.randrange(1, 256)
        (folder / name).write_bytes(raw)
        assert inspect(folder, "--verify")[0] == 2, name
        for arguments in ((), ("--pack", 0, *TOKENIZER), ("--example", 1, "--ids")):
            assert inspect(folder, *arguments)[0] in (0, 2), name
        shutil.rmtree(folder)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"x"', "7", '{"format": 1}', "\x00"])
def test_foreign_folder(inspect, tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    for arguments in ((), ("--verify",), ("--pack", 0)):
        code, _, error = inspect(tmp_path, *arguments)
        assert (code, error.startswith("error: ")) == (2, True)
    assert inspect(tmp_path / "nowhere")[0] == 2
