import json
import shutil
from pathlib import Path

import pytest

from mcore_sft.data.encode.block import Encoder
from mcore_sft.data.errors import DataError
from mcore_sft.data.prepare import prepare, prepare_shard
from mcore_sft.data.text.tokenizer import load_tokenizer
from tests.data.test_prepare import FIXTURES, config, contents, job, solved, write_rows


@pytest.fixture
def folder(tmp_path):
    """Rows, a contamination file that holds one of their problems, and a tokenizer."""
    write_rows(tmp_path / "rows.jsonl", [solved("1 + 1?", "2"), solved("2 + 2?", "4")])
    write_rows(tmp_path / "known.jsonl", [{"problem": "1 + 1?", "contaminated": True}])
    shutil.copytree(FIXTURES / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


def of(folder: Path):
    filters = {"remove_contaminated": True, "contamination_file": "known.jsonl"}
    tokenizer = load_tokenizer(folder / "tokenizer")
    return job(config(folder, filters=filters), tokenizer=tokenizer)


def whole(job, folder):
    prepare(job, folder)


def shard(job, folder):
    prepare_shard(job, folder, index=0, count=1)


@pytest.mark.parametrize("work", [whole, shard])
@pytest.mark.parametrize("name", ["known.jsonl", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_the_manifest_names_is_what_was_used(work, name, when, folder, monkeypatch):
    encode = Encoder.encode

    def encode_while_it_changes(self, *block, **settings):
        made = None if when == "before" else encode(self, *block, **settings)
        with (folder / name).open("a", encoding="utf-8") as file:
            row = {"problem": "2 + 2?", "contaminated": True}
            file.write(json.dumps(row) + "\n" if name == "known.jsonl" else "\n")
        return made or encode(self, *block, **settings)

    monkeypatch.setattr(Encoder, "encode", encode_while_it_changes)
    with pytest.raises(DataError, match=r"(known\.jsonl|tokenizer): it changed while it was read"):
        work(of(folder), folder / "packed")
    assert not list(folder.glob("*packed*"))


def test_what_is_not_touched_is_no_change(folder):
    whole(of(folder), folder / "one")
    whole(of(folder), folder / "two")
    assert contents(folder / "one") == contents(folder / "two")


def test_deeply_nested_contamination_file_is_one_sentence(folder):
    (folder / "known.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"known\.jsonl:1: the contamination file is not valid"):
        whole(of(folder), folder / "packed")
