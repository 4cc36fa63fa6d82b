import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mcore_sft.base.terminal import Console
from mcore_sft.config import DataConfig
from mcore_sft.data import manifest as manifests
from mcore_sft.data.encode.job import Job
from mcore_sft.data.packs import damage
from mcore_sft.data.packs.damage import find_damage, find_structural_damage
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.prepare import prepare
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from tests.prompts import MathPrompt

FIXTURES = Path(__file__).parent.parent / "fixtures"
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Packs of 512 of the first 40 rows, most of them with several examples."""
    folder = tmp_path_factory.mktemp("data") / "packed"
    tokenizer = load_tokenizer(FIXTURES / "tokenizer")
    rows = {"path": "rows.jsonl", "limit": 40}
    data = {"root": FIXTURES, "train": [rows], "sequence_length": 512, "workers": 1}
    prompt = Prompt.load(MathPrompt(), tokenizer)
    config = DataConfig.model_validate(data)
    prepare(Job(config=config, prompt=prompt, tokenizer=tokenizer, console=QUIET), folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "packed"))


def structural(folder):
    return list(find_structural_damage(folder, manifests.read(folder), "train"))


def change(folder, name, edit):
    """Load an array of the split, let `edit` change or replace it, and save it."""
    file = folder / f"train.{name}.npy"
    array = np.load(file)
    changed = edit(array)
    np.save(file, array if changed is None else changed)


def put(index, value):
    def edit(array):
        array[index] = value

    return edit


def test_sound(sound):
    assert find_damage(sound, console=QUIET) == []


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("spans", put((3, 1), 9999), r"spans\.npy: example 3: trained span 0 goes .* to 9999"),
        ("spans", put((3, 0), -1), r"example 3: trained span 0 goes from -1 to"),
        ("spans", lambda a: a[:, ::-1], r"example 0: trained span 0"),
        ("spans", lambda a: a[:, :1], r"rows of 1 numbers, expected start and end"),
        ("spans", lambda a: a.astype(np.int64), r"holds int64 \[40, 2\], expected int32 with 2"),
        ("span_offsets", put(5, 30), r"example 5: goes from 30 to 6, expected not backwards"),
        ("span_offsets", put(0, 1), r"example 0: begins at 1, expected 0"),
        ("span_offsets", put(-1, 39), r"example 39: ends at 39, expected 40, the length of"),
        ("span_offsets", lambda a: a[:-1], r"40 offsets, expected 41 \(one more than examples\)"),
        ("packs", put(0, 40), r"packs\.npy: pack 0: holds example 40, expected 0 to 39"),
        ("packs", put(0, -1), r"pack 0: holds example -1"),
        ("pack_offsets", put(2, 1), r"pack 1: goes from \d+ to 1, expected at least one more"),
        ("supervised", put(4, 1), r"pack 4: 1 supervised tokens, expected the \d+ of its spans"),
    ],
)
def test_broken_array_is_named(folder, name, edit, said):
    change(folder, name, edit)
    found = structural(folder)
    assert found
    assert found[0].startswith(str(folder / f"train.{name}.npy"))
    assert re.search(said, found[0]), found


def test_example_in_no_pack(folder):
    packs = np.load(folder / "train.packs.npy")
    lost, twice = int(packs[0]), int(packs[-1])
    change(folder, "packs", put(0, twice))
    [found, *_] = structural(folder)
    assert found.endswith(f"packs.npy: example {lost}: is in no pack, expected in one or more")


def test_example_that_an_epoch_shows_twice(folder):
    """One more pack, of the first example alone."""
    dataset, manifest = PackedDataset(folder), manifests.read(folder)
    first = dataset.example(0)
    (start, end), tokens = first.spans[0].tolist(), len(first)
    change(folder, "packs", lambda a: np.append(a, 0))
    change(folder, "pack_offsets", lambda a: np.append(a, 41))
    change(folder, "supervised", lambda a: np.append(a, np.int32(end - start)))
    said = manifest["splits"]["train"]
    more = {"visits": 1, "tokens": tokens, "supervised_tokens": end - start, "packs": 1}
    found = list(find_structural_damage(folder, manifest, "train"))
    for line, (name, number) in zip(found, more.items(), strict=True):
        assert f"train.{name} is {said[name]}, expected the {said[name] + number} of" in line
        said[name] += number
    assert list(find_structural_damage(folder, manifest, "train")) == []


def test_pack_longer_than_the_sequence(folder):
    manifest, dataset = manifests.read(folder), PackedDataset(folder)
    packs = [dataset.pack(index) for index in range(len(dataset))]
    longest = max(pack.tokens for pack in packs)
    manifest["sequence_length"] = longest
    assert list(find_structural_damage(folder, manifest, "train")) == []
    manifest["sequence_length"] = longest - 1
    found = list(find_structural_damage(folder, manifest, "train"))
    assert f"{longest} tokens, expected at most {longest - 1}" in found[0]


def test_token_beyond_the_vocabulary_is_found_in_its_example(folder, monkeypatch):
    monkeypatch.setattr(damage, "_CHUNK", 50)
    raw = np.fromfile(folder / "train.bin", dtype=np.uint16)
    raw[-1] = 701
    raw.tofile(folder / "train.bin")
    [found] = structural(folder)
    assert "train.bin: example 39: token " in found
    assert "has id 701, expected one of the vocabulary, 0 to 700" in found
    raw[:] = 701
    raw.tofile(folder / "train.bin")
    first, _, _, last = structural(folder)
    assert "example 0: token 0 has id 701" in first
    assert last.endswith(f"... and {len(raw) - 3} more")


def test_index_whose_sequences_overlap(folder):
    header, count = 34, 40
    raw = bytearray((folder / "train.idx").read_bytes())
    offset = header + 4 * count + 8 * 7
    raw[offset : offset + 8] = (12).to_bytes(8, "little")
    (folder / "train.idx").write_bytes(raw)
    [found] = structural(folder)
    assert "train.idx: example 7: begins at byte 12, expected" in found


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", bytes(200), b"\x93NUMPY\x01\x00v\x00{" * 9])
def test_file_that_is_no_array(folder, content):
    (folder / "train.packs.npy").write_bytes(content)
    [found] = structural(folder)
    assert "train.packs.npy: not an array file" in found


def test_every_damaged_file_is_listed_and_the_example_where_it_can_be(folder):
    change(folder, "spans", put((3, 1), 9999))
    (folder / "train.supervised.npy").unlink()
    raw = bytearray((folder / "train.bin").read_bytes())
    raw[0] ^= 1  # another id of the vocabulary: only the checksum knows
    (folder / "train.bin").write_bytes(raw)
    found = find_damage(folder, console=QUIET)
    for said in ("train.bin: corrupt: SHA-256", "train.spans.npy: corrupt", "supervised.npy: miss"):
        assert any(said in line for line in found), said


@pytest.mark.parametrize("name", ["supervised.npy", "bin", "idx"])
def test_missing_file_is_said_once(folder, name):
    (folder / f"train.{name}").unlink()
    [found] = find_damage(folder, console=QUIET)
    assert f"train.{name}: missing" in found


def test_manifest_that_counts_otherwise(folder):
    manifest = manifests.read(folder)
    manifest["splits"]["train"]["packs"] += 1
    manifest["files"]["train.bin"]["sha256"] = "0" * 64
    manifests.write(folder, manifest)
    found = "\n".join(find_damage(folder, console=QUIET))
    packs = manifest["splits"]["train"]["packs"]
    assert f"train.packs is {packs}, expected the {packs - 1} of the files" in found
    assert "train.bin: corrupt: SHA-256" in found
