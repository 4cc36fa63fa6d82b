import shutil
from collections import namedtuple

import pytest

from mcore_sft.data.encode import disk
from mcore_sft.data.errors import DataError
from mcore_sft.data.prepare import merge, prepare_shard
from tests.data.test_prepare import ROWS, config, job, run, write_rows

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Two sources of several blocks, of which one has longer solutions and a limit."""
    monkeypatch.setattr(disk, "_SMALL", 0)
    monkeypatch.setattr("mcore_sft.data.sources.text_blocks.BLOCK_BYTES", 20_000)
    write_rows(tmp_path / "a.jsonl", ROWS[:1500])
    long = [{**row, "generated_solution": row["generated_solution"] * 20} for row in ROWS[1500:]]
    write_rows(tmp_path / "b.jsonl", long)
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl", "limit": 100}]
    return config(tmp_path, train=sources, sequence_length=4096, filters={"deduplicate": False})


def free(monkeypatch, size: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(size, 0, size))


def test_disk_is_said_before_the_work_begins(rows, tmp_path, monkeypatch):
    free(monkeypatch, 10**9)
    made, said = run(rows, tmp_path / "packed")
    (line,) = (line for line in said.splitlines() if "of disk are needed" in line)
    guessed = 1000 * float(line.partition(" kB in the end")[0].rpartition(" ")[2])
    encoded = 2 * made["splits"]["train"]["tokens"] + 70 * 1600  # tokens, and columns of all rows
    assert 0.7 < guessed / encoded < 1.4, line
    assert line.endswith("1.0 GB are free")


def test_disk_that_cannot_do_ends_the_run_before_it_begins(rows, tmp_path, monkeypatch):
    free(monkeypatch, 300_000)
    with pytest.raises(
        DataError, match=r"packed: about \d.* are needed.*; 300\.0 kB are free\. Fix"
    ):
        run(rows, tmp_path / "packed")
    free(monkeypatch, 100_000)
    with pytest.raises(DataError, match=r"shard-0-of-2: about .*100\.0 kB are free"):
        prepare_shard(job(rows), tmp_path / "packed", index=0, count=2)
    assert not list(tmp_path.glob("*packed*"))


def test_merge_asks_for_what_it_writes(rows, tmp_path, monkeypatch):
    prepare_shard(job(rows), tmp_path / "packed", index=0, count=1)
    free(monkeypatch, 100_000)
    with pytest.raises(DataError, match=r"are needed to put examples in order, and 100\.0 kB"):
        merge(job(rows), tmp_path / "packed", count=1)
    assert not (tmp_path / "packed").exists()
