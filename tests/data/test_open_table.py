"""Blocks of tables: as large as the rows are once they are read, and read in one pass."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_sft.config import SourceConfig
from mcore_sft.data.sources import open_table, table_blocks
from mcore_sft.data.sources.open_table import OpenTable
from mcore_sft.data.sources.survey import survey

LONG = "x" * 1000
KINDS = ["parquet", "stream", "file"]


def write(folder: Path, kind: str, table: pa.Table, rows: int) -> str:
    """Write `table`, so many rows a row group or record batch."""
    if kind == "parquet":
        pq.write_table(table, folder / "a.parquet", row_group_size=rows)
        return "a.parquet"
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return "a.arrow"


def blocks_of(folder: Path, path: str) -> list[Any]:
    return list(survey(SourceConfig(path=path), root=folder).blocks())


def numbered(count: int) -> pa.Table:
    texts = [f"{i}?" for i in range(count)]
    return pa.table({"question": texts, "answer": [str(i) for i in range(count)]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [False, True])
def test_blocks_hold_what_is_read_and_not_what_is_stored(kind, nested, monkeypatch, tmp_path):
    """A text that each row repeats is stored once, by dictionaries of Parquet or of Arrow."""
    monkeypatch.setattr(table_blocks, "TABLE_BYTES", 20_000)
    texts = pa.array([LONG] * 300)
    texts = texts if kind == "parquet" else texts.dictionary_encode()
    talk = pa.StructArray.from_arrays([pa.array(["assistant"] * 300), texts], ["role", "content"])
    columns = {"messages": pa.ListArray.from_arrays(list(range(301)), talk)}
    table = pa.table(columns if nested else {"question": texts, "answer": ["y"] * 300})
    path = write(tmp_path, kind, table, 300)
    assert (tmp_path / path).stat().st_size < 20_000
    blocks = blocks_of(tmp_path, path)
    assert [block.rows for block in blocks] == [19] * 15 + [15]
    assert sum(block.size for block in blocks) == (tmp_path / path).stat().st_size


def test_rows_of_different_sizes_are_cut_where_they_are_large(monkeypatch, tmp_path):
    monkeypatch.setattr(table_blocks, "TABLE_BYTES", 3000)
    texts = ["s"] * 200 + [LONG] * 4 + ["x" * 9000] + ["s"] * 200
    table = pa.table({"question": texts, "answer": ["y"] * len(texts)})
    for rows in (len(texts), 7, 100):
        blocks = blocks_of(tmp_path, write(tmp_path, "parquet", table, rows))
        read = [block.read(skip_bad=False) for block in blocks]
        sizes = [sum(map(len, rows.problems.to_pylist())) + len(rows) for rows in read]
        assert sorted(sizes)[-2] <= 3000 < sorted(sizes)[-1] == 9001  # one row, alone
        assert [text for rows in read for text in rows.problems.to_pylist()] == texts
        assert [n for rows in read for n in rows.numbers.tolist()] == list(range(1, 406))


@pytest.fixture
def decoded(monkeypatch) -> dict[str, int]:
    """Counts the rows that are decoded, and the tables that are opened."""
    counts = {"rows": 0, "opened": 0}
    for table in (open_table.Parquet, open_table.Arrow):

        def batches(self, part, columns, *end, own=table.batches):
            for batch in own(self, part, columns, *end):
                counts["rows"] += len(batch)
                yield batch

        monkeypatch.setattr(table, "batches", batches)
    own = open_table._open

    def opening(*given):
        counts["opened"] += 1
        return own(*given)

    monkeypatch.setattr(open_table, "_open", opening)
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 30, 2000], ids=["small", "middle", "one"])
def test_a_process_reads_its_blocks_in_one_pass(kind, rows, decoded, monkeypatch, tmp_path):
    """However many row groups or batches there are, and however large: not once for each block."""
    monkeypatch.setattr(table_blocks, "TABLE_BYTES", 200)
    path = write(tmp_path, kind, numbered(2000), rows)
    blocks = blocks_of(tmp_path, path)
    assert len(blocks) > 50
    for share in (1, 3):
        got = []
        for process in range(share):
            decoded.update(rows=0, opened=0)
            table = OpenTable()
            for block in blocks[process::share]:
                got.append(block.read(skip_bad=False, table=table))
            assert decoded["opened"] == 1
            assert decoded["rows"] <= 2000 + (0 if share == 1 else len(blocks) * 64 // rows)
        got.sort(key=lambda one: one.numbers[0])
        numbers = [n for one in got for n in one.numbers.tolist()]
        assert numbers == list(range(1, 2001))
        assert [q for one in got for q in one.problems.to_pylist()][777] == "777?"


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_read_in_any_order(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(table_blocks, "TABLE_BYTES", 100)
    blocks = blocks_of(tmp_path, write(tmp_path, kind, numbered(300), 40))
    random.Random(3).shuffle(blocks)
    table = OpenTable()
    for block in blocks:
        got = block.read(skip_bad=False, table=table)
        assert got.problems.to_pylist() == [f"{n - 1}?" for n in got.numbers.tolist()]


def test_the_name_of_a_column_may_hold_dots_and_begin_another(monkeypatch, tmp_path):
    monkeypatch.setattr(table_blocks, "TABLE_BYTES", 100)
    both = pa.StructArray.from_arrays([pa.array(["no"] * 90)], ["text"])
    texts = pa.array([f"{i}?" for i in range(90)])
    table = pa.table({"q": both, "q.text": texts, "a": texts, "a.b": texts})
    write(tmp_path, "parquet", table, 30)
    source = SourceConfig(path="a.parquet", problem="q.text", solution="a")
    blocks = list(survey(source, root=tmp_path).blocks())
    assert len(blocks) > 3
    read = [block.read(skip_bad=False).problems.to_pylist() for block in blocks]
    assert [text for some in read for text in some] == texts.to_pylist()
