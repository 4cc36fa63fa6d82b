import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_sft.config import SourceConfig
from mcore_sft.data.conversation import read_chunks, read_source, source_files
from mcore_sft.data.errors import DataError


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    file = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def rows(count: int, first: int = 0) -> list[dict]:
    return [
        {"problem": f"{i} + 1?", "generated_solution": str(i + 1), "other": i}
        for i in range(first, first + count)
    ]


def read(folder: Path, **source) -> list[tuple[str, str]]:
    talks = read_source(SourceConfig(**source), root=folder)
    return [(t.messages[0].content, t.messages[1].content) for t in talks]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_become_conversations(name, tmp_path):
    write(tmp_path, name, rows(3))
    assert read(tmp_path, path=name) == [("0 + 1?", "1"), ("1 + 1?", "2"), ("2 + 1?", "3")]
    assert read(tmp_path, path=name, problem="generated_solution", solution="problem", limit=1) == [
        ("1", "0 + 1?")
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_glob_reads_files_in_order_of_name(ending, tmp_path):
    write(tmp_path, f"part-2.{ending}", rows(2, first=2))
    write(tmp_path, f"part-1.{ending}", rows(2))
    got = read(tmp_path, path=f"part-*.{ending}")
    assert [solution for _, solution in got] == ["1", "2", "3", "4"]
    assert len(read(tmp_path, path=f"part-*.{ending}", limit=3)) == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_chunks_hold_few_rows_and_all_bytes(name, tmp_path):
    file = write(tmp_path, name, rows(10))
    chunks = list(read_chunks(SourceConfig(path=name), root=tmp_path, rows=4))
    assert [len(chunk.rows) for chunk in chunks] == [4, 4, 2]
    assert sum(chunk.size for chunk in chunks) == pytest.approx(file.stat().st_size, abs=3)
    limited = read_chunks(SourceConfig(path=name, limit=6), root=tmp_path, rows=4)
    assert [len(chunk.rows) for chunk in limited] == [4, 2]


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '\n{"problem": "a", "generated_solution": "b"}\n\n', encoding="utf-8"
    )
    assert read(tmp_path, path="a.jsonl") == [("a", "b")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"problem": ', r"a\.jsonl:3: broken JSON"),
        ("[1]", r"a\.jsonl:3: expected a JSON object, found list"),
        ('{"problem": "a", "generated_solution": null}', r"a\.jsonl:3: .*holds nothing"),
        ('{"problem": "a", "generated_solution": "  "}', r"a\.jsonl:3: .*holds only blanks"),
        ('{"problem": "a", "generated_solution": 5}', r"a\.jsonl:3: .*holds 5"),
        ('{"problem": "\\ud800", "generated_solution": "b"}', r"a\.jsonl:3: .*not valid Unicode"),
        (
            '{"problem": "a", "generated_solutions": "b"}',
            r"a\.jsonl:3: no column 'generated_solution' for the solution; columns: problem, "
            r"generated_solutions; did you mean solution: generated_solutions\?",
        ),
        (
            '{"question": "a", "answer": "b"}',
            r"a\.jsonl:3: no column 'problem' .*columns: question, answer; name it with problem:",
        ),
    ],
)
def test_bad_row_is_named_with_its_line(line, said, tmp_path):
    good = json.dumps(rows(1)[0])
    (tmp_path / "a.jsonl").write_text(f"{good}\n{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read(tmp_path, path="a.jsonl")


def test_bad_row_of_parquet_is_named(tmp_path):
    write(tmp_path, "a.parquet", [*rows(2), {"problem": "x", "generated_solution": None}])
    with pytest.raises(DataError, match=r"a\.parquet:3: column 'generated_solution' holds nothing"):
        read(tmp_path, path="a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet:1: .*columns: problem, generated_solution, oth"
    ):
        read(tmp_path, path="a.parquet", solution="answer")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"b\.parquet: not a Parquet file"):
        read(tmp_path, path="b.parquet")


@pytest.mark.parametrize("path", ["absent.jsonl", "part-*.jsonl", "./absent"])
def test_absent_files_are_named(path, tmp_path):
    with pytest.raises(DataError, match="no such file under"):
        read(tmp_path, path=path)


def test_name_of_a_hugging_face_dataset(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(path, *, split, streaming):
        asked.append((path, split, streaming))
        return iter(rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read(tmp_path, path="owner/name", split="train_1M", limit=2)) == 2
    assert asked == [("owner/name", "train_1M", True)]


def test_dataset_that_cannot_be_had_is_named(monkeypatch, tmp_path):
    import datasets

    def load_dataset(path, *, split, streaming):
        raise datasets.exceptions.DatasetNotFoundError("it is not on the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/name.*neither a file nor.*not on the hub"):
        read(tmp_path, path="owner/name")


def test_a_glob_under_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "sp ace [x]"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"problem": "p", "generated_solution": "s"}\n')
    found = source_files(SourceConfig(path="*.jsonl"), root=folder)
    assert found == [folder / "a.jsonl"]


def test_a_folder_is_no_source(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match=r"is a folder; name its files, such as rows/\*\.jsonl"):
        source_files(SourceConfig(path="rows"), root=tmp_path)
