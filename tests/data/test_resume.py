"""Runs that are killed in any stage: the next one goes on, and writes what an undisturbed one does.

They kill themselves, as kill -9 does, where one of their functions is called once more.
"""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.base import files
from mcore_sft.data import finish
from mcore_sft.data import manifest as manifests
from mcore_sft.data.encode import block_files, store
from mcore_sft.data.encode.block import Encoder
from mcore_sft.data.packs import gather
from mcore_sft.data.prepare import merge, prepare, prepare_shard
from mcore_sft.data.text.tokenizer import load_tokenizer
from tests.data.test_prepare import FIXTURES, ROWS, config, contents, job, write_rows

SETTINGS: dict[str, Any] = {
    "filters": {"order": "nemo_skills"},
    "holdout": {"fraction": 0.1},
    "sequence_length": 116,
    "contamination": {"against": [{"path": "test.jsonl"}]},
}
BLOCKS = 7


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Rows in BLOCKS blocks, and a benchmark; what is gathered goes to several files."""
    folder = tmp_path_factory.mktemp("sources")
    write_rows(folder / "rows.jsonl", ROWS[:900])
    write_rows(folder / "test.jsonl", [{"problem": f"what is {i} + 1?"} for i in range(0, 90, 7)])
    with pytest.MonkeyPatch.context() as patch:
        size = (folder / "rows.jsonl").stat().st_size
        patch.setattr("mcore_sft.data.sources.text_blocks.BLOCK_BYTES", size // BLOCKS + 1)
        patch.setattr(gather, "STRETCH", 40_000)
        patch.setattr(gather, "_TOGETHER", 50_000)
        yield folder


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed") / "packed"
    prepare(job(config(sources, **SETTINGS)), place)
    return contents(place)


@pytest.fixture
def encoded(monkeypatch):
    """Counts the blocks that are encoded."""
    count, encode = [], Encoder.encode

    def counted(self, *block, **settings):
        count.append(block)
        return encode(self, *block, **settings)

    monkeypatch.setattr(Encoder, "encode", counted)
    return count


def killed(work: Callable[[], object], owner: Any, name: str, calls: int = 0) -> None:
    """Run `work` in a process that dies when it calls a function once more than `calls` times."""
    fork = multiprocessing.get_context("fork")

    def run() -> None:
        function, left = getattr(owner, name), iter(range(calls))

        def call(*arguments, **options):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        setattr(owner, name, call)
        work()

    process = fork.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it did not come so far"


STAGES = {  # what is called, how often before, and how many blocks are left to encode
    "half a block": (Path, "rename", 3, BLOCKS - 3),
    "encoding": (block_files, "write", 5, BLOCKS - 5),
    "dividing": (finish, "divide", 0, 0),
    "scattering": (gather, "_scatter", 1, 0),
    "ordering": (gather, "_order", 1, 0),
    "packing": (finish, "pack_split", 1, 0),
    "reporting": (finish, "write_report", 0, 0),
    "whole": (manifests, "write", 0, 0),
    "named": (files, "rename", 0, 0),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_goes_on(stage, sources, undisturbed, encoded, tmp_path):
    *where, left = STAGES[stage]
    data, place = config(sources, **SETTINGS), tmp_path / "packed"
    killed(lambda: prepare(job(data), place), *where)
    assert not place.exists()
    assert (tmp_path / "packed.unfinished").is_dir()
    prepare(job(data), place)
    assert len(encoded) == left
    assert contents(place) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_what_is_left_by_a_run_killed_when_all_was_whole_is_removed(sources, undisturbed, tmp_path):
    data, place = config(sources, **SETTINGS), tmp_path / "packed"
    killed(lambda: prepare(job(data), place), shutil, "rmtree", 3)  # which is then at the blocks
    assert contents(place) == undisturbed
    assert (tmp_path / "packed.unfinished").is_dir()
    work = job(data)
    prepare(work, place)
    assert "it is reused" in work.console.file.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_workers_and_the_sequence_length_may_be_others(sources, encoded, tmp_path):
    place = tmp_path / "packed"
    killed(lambda: prepare(job(config(sources, **SETTINGS)), place), block_files, "write", 4)
    other = {**SETTINGS, "sequence_length": 200}
    prepare(job(config(sources, **other)), tmp_path / "alone")
    del encoded[:]
    prepare(job(config(sources, **other, workers=2)), place)
    assert encoded == []  # the processes did the rest
    assert contents(place) == contents(tmp_path / "alone")


def other_filters(folder, _):
    return job(config(folder, **{**SETTINGS, "filters": {"trim_prefix": True}}))


def other_source(folder, _):
    rows, stat = folder / "rows.jsonl", (folder / "rows.jsonl").stat()
    rows.write_bytes(rows.read_bytes().replace(b"(7).", b"(8)."))
    os.utime(rows, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return job(config(folder, **SETTINGS))


def other_tokenizer(folder, _):
    slow = load_tokenizer(FIXTURES / "tokenizer", gigatoken=False)
    return job(config(folder, **SETTINGS), tokenizer=slow)


def other_code(folder, monkeypatch):
    monkeypatch.setattr(store, "code", lambda: "of another day")
    return job(config(folder, **SETTINGS))


def other_cut(folder, monkeypatch):
    monkeypatch.setattr("mcore_sft.data.sources.text_blocks.BLOCK_BYTES", 9000)
    return job(config(folder, **SETTINGS))


@pytest.mark.parametrize(
    "change", [other_filters, other_source, other_tokenizer, other_code, other_cut]
)
def test_nothing_is_taken_from_a_run_of_other_things(
    change, sources, encoded, tmp_path, monkeypatch
):
    folder, place = Path(shutil.copytree(sources, tmp_path / "sources")), tmp_path / "packed"
    killed(lambda: prepare(job(config(folder, **SETTINGS)), place), finish, "divide")
    prepare(change(folder, monkeypatch), place)
    assert len(encoded) >= BLOCKS
    prepare(change(folder, monkeypatch), tmp_path / "alone")
    assert contents(place) == contents(tmp_path / "alone")
    assert not (tmp_path / "packed.unfinished").exists()


@pytest.mark.parametrize("cut", [0, 10, -3])
def test_damaged_block_is_encoded_again(cut, sources, undisturbed, encoded, tmp_path):
    data, place = config(sources, **SETTINGS), tmp_path / "packed"
    killed(lambda: prepare(job(data), place), finish, "divide")
    blocks = sorted((tmp_path / "packed.unfinished").glob("*.block"))
    raw = bytearray(blocks[2].read_bytes())
    raw[50] ^= 1
    blocks[2].write_bytes(raw[:cut] if cut else raw)
    prepare(job(data), place)
    assert len(encoded) == 1
    assert contents(place) == undisturbed


def test_killed_shard_goes_on(sources, undisturbed, encoded, tmp_path):
    data, place = config(sources, **SETTINGS), tmp_path / "packed"
    killed(lambda: prepare_shard(job(data), place, index=0, count=2), block_files, "write", 2)
    for index in range(2):
        prepare_shard(job(data), place, index=index, count=2)
    assert len(encoded) == BLOCKS - 2
    merge(job(data), place, count=2)
    assert contents(place) == undisturbed
