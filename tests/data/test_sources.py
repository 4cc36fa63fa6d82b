import bz2
import gzip
import json
import lzma
import os
import pickle
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from mcore_sft.config import SourceConfig
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import write_index
from mcore_sft.data.rows import Chats, Pairs, Tokens
from mcore_sft.data.selection.contamination import read_benchmarks
from mcore_sft.data.sources import table_blocks, text_blocks
from mcore_sft.data.sources.find_files import find_files
from mcore_sft.data.sources.open_table import open_table
from mcore_sft.data.sources.source_file import SourceFile
from mcore_sft.data.sources.survey import source_size, survey

TEXT_KINDS = ["a.jsonl", "a.json", "list.json", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz"]
TEXT_KINDS += ["a.jsonl.zst", "list.json.gz"]
TABLE_KINDS = ["a.parquet", "a.arrow", "file.arrow", "a.feather"]
KINDS = TEXT_KINDS + TABLE_KINDS


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def problems_of(folder: Path, **source) -> list[str]:
    benchmark = survey(SourceConfig(**source), root=folder, alone=True)
    return list(read_benchmarks([benchmark]))


def rows(count: int, first: int = 0) -> list[dict]:
    return [
        {"problem": f"{i} + 1?", "generated_solution": str(i + 1), "other": i}
        for i in range(first, first + count)
    ]


def as_lines(some: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in some).encode()


def write(file: Path, some: list) -> Path:
    """Write rows in the format that the name of `file` stands for, tables two rows a batch."""
    if file.suffix in (".parquet", ".arrow", ".feather"):
        write_table(file, pa.Table.from_pylist(some))
        return file
    is_list = file.name.startswith("list")
    data = json.dumps(some, indent=1).encode() if is_list else as_lines(some)
    file.write_bytes(COMPRESS.get(file.suffix, bytes)(data))
    return file


def write_table(file: Path, table: pa.Table) -> None:
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=2)
    elif file.suffix == ".feather":
        pyarrow.feather.write_feather(table, str(file), chunksize=2)
    else:
        new = pa.ipc.new_file if file.name.startswith("file") else pa.ipc.new_stream
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def blocks_of(folder: Path, **source) -> list:
    blocks = survey(SourceConfig(**source), root=folder).blocks()
    return [pickle.loads(pickle.dumps(block)) for block in blocks]


def read(folder: Path, *, skip_bad: bool = False, **source) -> list:
    return [block.read(skip_bad=skip_bad) for block in blocks_of(folder, **source)]


def pairs(folder: Path, **source) -> list[tuple[str, str]]:
    return [
        pair
        for each in read(folder, **source)
        for pair in zip(each.problems.to_pylist(), each.solutions.to_pylist(), strict=True)
    ]


def expected(some: list[dict]) -> list[tuple[str, str]]:
    return [(row["problem"], row["generated_solution"]) for row in some]


@pytest.fixture
def small(monkeypatch):
    """Blocks of a few rows."""
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", 150)
    monkeypatch.setattr(table_blocks, "TABLE_BYTES", 60)


# --- every kind of file ---


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(name, tmp_path):
    file = write(tmp_path / name, rows(5))
    assert pairs(tmp_path, path=name) == expected(rows(5))
    swapped = pairs(tmp_path, path=name, problem="generated_solution", solution="problem", limit=1)
    assert swapped == [("1", "0 + 1?")]
    (only,) = read(tmp_path, path=name)
    assert isinstance(only, Pairs)
    assert (only.name, only.numbers.tolist(), only.votes) == (str(file), [1, 2, 3, 4, 5], None)
    assert problems_of(tmp_path, path=name, solution="none") == [row["problem"] for row in rows(5)]


@pytest.mark.parametrize("name", KINDS)
def test_endings_in_upper_case(name, tmp_path):
    file = write(tmp_path / name, rows(5))
    file.rename(tmp_path / name.upper())
    assert pairs(tmp_path, path=name.upper()) == expected(rows(5))
    with pytest.raises(DataError, match="no such file \\("):
        survey(SourceConfig(path=f"absent{file.suffix.upper()}"), root=tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_change_nothing(name, small, tmp_path):
    write(tmp_path / name, rows(23))
    blocks = blocks_of(tmp_path, path=name)
    assert len(blocks) > 3
    assert pairs(tmp_path, path=name) == expected(rows(23))
    numbers = [block.read(skip_bad=False).numbers for block in blocks]
    assert np.concatenate(numbers).tolist() == list(range(1, 24))
    seen = survey(SourceConfig(path=name), root=tmp_path)
    assert sum(block.size for block in blocks) == seen.size == (tmp_path / name).stat().st_size


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("limit", [1, 9, 10, 11, 22, 40])
def test_limit_counts_over_all_files(name, limit, small, tmp_path):
    write(tmp_path / name, rows(10))
    write(tmp_path / f"b{name}", rows(10, first=10)) if "list" not in name else None
    write(tmp_path / "c.jsonl", rows(3, first=20 if "list" not in name else 10))
    every = pairs(tmp_path, path="*")
    assert len(every) in (23, 13)
    assert pairs(tmp_path, path="*", limit=limit) == every[:limit]


def test_limit_counts_rows_and_not_blank_lines(small, tmp_path):
    lines = as_lines(rows(6)).replace(b"\n", b"\n\n \n")
    (tmp_path / "a.jsonl").write_bytes(lines)
    assert pairs(tmp_path, path="a.jsonl", limit=4) == expected(rows(4))
    assert read(tmp_path, path="a.jsonl", limit=4)[-1].numbers[-1] == 10


def test_glob_reads_files_in_order_of_name(tmp_path):
    write(tmp_path / "part-2.jsonl", rows(2, first=2))
    write(tmp_path / "part-1.parquet", rows(2))
    assert pairs(tmp_path, path="part-*") == expected(rows(4))


def test_large_row_group_is_cut(monkeypatch, tmp_path):
    monkeypatch.setattr(table_blocks, "TABLE_BYTES", 100)
    pq.write_table(pa.Table.from_pylist(rows(50)), tmp_path / "a.parquet")
    blocks = blocks_of(tmp_path, path="a.parquet")
    assert len(blocks) > 2
    assert sum(block.size for block in blocks) == (tmp_path / "a.parquet").stat().st_size
    assert pairs(tmp_path, path="a.parquet") == expected(rows(50))
    assert pairs(tmp_path, path="a.parquet", limit=33) == expected(rows(33))


def test_dictionaries_bytes_and_large_strings_are_texts(tmp_path):
    problems = pa.array(["p", "q", "p"]).dictionary_encode()
    for solutions in (pa.array([b"a", b"b", b"c"]), pa.array(["a", "b", "c"], pa.large_string())):
        for name in TABLE_KINDS:
            write_table(tmp_path / name, pa.table({"problem": problems, "s": solutions}))
            got = pairs(tmp_path, path=name, solution="s")
            assert got == [("p", "a"), ("q", "b"), ("p", "c")]


def test_description_has_a_checksum_of_each_file(tmp_path):
    file = write(tmp_path / "a.jsonl", rows(2))
    write(tmp_path / "b.parquet", rows(2))
    counted = []
    seen = survey(SourceConfig(path="*"), root=tmp_path, advance=counted.append)
    assert [each["name"] for each in seen.description["files"]] == ["a.jsonl", "b.parquet"]
    checksum = seen.description["files"][0]["sha256"]
    assert checksum == sha256(file.read_bytes()).hexdigest()
    assert sum(counted) == seen.size == source_size(SourceConfig(path="*"), root=tmp_path)
    assert survey(SourceConfig(path="*", limit=1), root=tmp_path).description == seen.description


@pytest.mark.parametrize("name", KINDS)
def test_no_rows_are_no_blocks(name, tmp_path):
    if name in TABLE_KINDS:
        write_table(tmp_path / name, pa.Table.from_pylist(rows(1)).slice(0, 0))
    else:
        write(tmp_path / name, [])
    seen = survey(SourceConfig(path=name), root=tmp_path)
    assert seen.size == os.stat(tmp_path / name).st_size
    with pytest.raises(DataError, match=rf"source '{name}': it holds no row"):
        list(seen.blocks())


# --- columns ---


@pytest.mark.parametrize("name", KINDS)
def test_votes_and_answers(name, tmp_path):
    some = [
        {**row, "majority_votes": votes, "total_votes": 8, "expected_answer": answer}
        for row, votes, answer in zip(rows(3), [5, None, 2.5], ["x", None, "z"], strict=True)
    ]
    write(tmp_path / name, some)
    (got,) = read(tmp_path, path=name)
    np.testing.assert_array_equal(got.votes, [[5, 8], [np.nan, np.nan], [2.5, 8]])
    assert got.answers.to_pylist() == ["x", None, "z"]


@pytest.mark.parametrize("name", KINDS)
def test_numbers_as_answers(name, tmp_path):
    write(tmp_path / name, [{**row, "expected_answer": 36.0} for row in rows(2)])
    (got,) = read(tmp_path, path=name)
    assert got.answers.to_pylist() == ["36.0", "36.0"]


@pytest.mark.parametrize("name", KINDS)
def test_messages_and_tools(name, tmp_path):
    talk = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    call = [*talk, {"role": "tool", "content": "x", "name": "f"}]
    some = [{"talk": talk, "tools": None}, {"talk": call, "tools": [{"name": "f", "x": {"y": 1}}]}]
    write(tmp_path / name, some)
    (got,) = read(tmp_path, path=name, messages="talk", tools="tools")
    assert isinstance(got, Chats)
    assert got.messages == [talk, call]
    assert got.tools == [None, [{"name": "f", "x": {"y": 1}}]]
    (got,) = read(tmp_path, path=name, messages="talk")
    assert got.tools is None


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_messages_as_text(name, tmp_path):
    talk = [{"role": "user", "content": "\u00e9"}]
    write(tmp_path / name, [{"talk": json.dumps(talk)}])
    assert read(tmp_path, path=name, messages="talk")[0].messages == [talk]


def test_keys_that_the_source_ignores_are_not_read(tmp_path):
    write(tmp_path / "a.jsonl", [{"talk": [{"from": "human", "value": "x", "score": 1}]}])
    (got,) = read(tmp_path, path="a.jsonl", messages="talk", ignore_keys=["score"])
    assert got.messages == [[{"role": "user", "content": "x"}]]


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        (None, "'talk' holds nothing, expected a list of messages"),
        ([], "'talk' holds nothing, expected a list of messages"),
        ("hi", "'talk' holds 'hi', expected a list of messages"),
        ([1], r"'talk' holds \[1\], expected a list of messages"),
        ([{"content": "x"}], "'talk': message 1: role None, expected one of system, user"),
        ([{"from": "nobody", "value": "x"}], "'talk': message 1: it is from 'nobody', expected"),
        ([{"role": "user", "content": "\ud800"}], "'talk' is not valid Unicode"),
    ],
)
def test_messages_that_are_none(talk, said, tmp_path):
    write(tmp_path / "a.jsonl", [{"talk": [{"role": "user", "content": "x"}]}, {"talk": talk}])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{said}"):
        read(tmp_path, path="a.jsonl", messages="talk")
    (got,) = read(tmp_path, path="a.jsonl", messages="talk", skip_bad=True)
    assert (len(got), list(got.bad)) == (1, [2])


# --- rows that cannot be used ---

BAD = [
    (b'{"problem": ', "broken JSON"),
    (b"null", "expected a JSON object, found NoneType"),
    (b"[1]", "expected a JSON object, found list"),
    (b'{"problem": "a", "generated_solution": null}', "'generated_solution' holds nothing"),
    (b'{"problem": "", "generated_solution": "b"}', "'problem' holds only blanks"),
    ('{"problem": "a", "generated_solution": " \u3000\\n"}'.encode(), "holds only blanks"),
    (b'{"problem": "a", "generated_solution": 5}', "holds 5, expected the text of the solution"),
    (b'{"problem": ["a"], "generated_solution": "b"}', r"holds \['a'\], expected the text"),
    (b'{"problem": "\\ud800", "generated_solution": "b"}', "not valid Unicode"),
    (b'{"problem": "a\xff", "generated_solution": "b"}', r"not UTF-8 \(byte 15 .* 0xff\)"),
    (b'{"problem": "a", "generated_solution": "b", "x": "\xff"}', "not UTF-8"),
    (b'{"problem": "a\0", "generated_solution": "b"}', r"a NUL byte \(byte 15 of the line\)"),
    (b'{"problem": "a", "generated_solution": "b"}{}', "broken JSON"),
    (b'{"x":' * 5000 + b"1" + b"}" * 5000, "broken JSON"),
    (
        b'{"problem": "a", "generated_solutions": "b"}',
        "no column 'generated_solution' for the solution; columns: problem, "
        r"generated_solutions; did you mean solution: generated_solutions\?",
    ),
    (b'{"problem": "a", "generated_solution": "b", "total_votes": "8"}', "'total_votes' holds '8'"),
    (b'{"question": "a"}', "no column 'problem' .*columns: question; name it with problem:"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_row_is_named_with_its_line_or_skipped(line, said, tmp_path):
    good = as_lines(rows(2))
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(DataError, match=rf"a\.jsonl:4: .*{said}"):
        read(tmp_path, path="a.jsonl")
    (got,) = read(tmp_path, path="a.jsonl", skip_bad=True)
    assert (got.numbers.tolist(), list(got.bad), got.read) == ([1, 2, 5, 6], [4], 5)
    assert got.bad[4].startswith(f"{tmp_path}/a.jsonl:4: ")
    assert got.problems.to_pylist() == [row["problem"] for row in rows(2)] * 2


def test_column_missing_from_the_first_row_on_is_never_skipped(tmp_path):
    write(tmp_path / "a.jsonl", rows(3))
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'answer' for the solution"):
        read(tmp_path, path="a.jsonl", solution="answer", skip_bad=True)


def test_value_of_an_array_that_is_no_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([*rows(1), 5]))
    with pytest.raises(DataError, match=r"a\.json:2: expected a JSON object, found int"):
        read(tmp_path, path="a.json")
    (got,) = read(tmp_path, path="a.json", skip_bad=True)
    assert (len(got), list(got.bad)) == (1, [2])


@pytest.mark.parametrize("name", TABLE_KINDS)
def test_bad_row_of_a_table_is_named_or_skipped(name, tmp_path):
    some = [*rows(2), {"problem": "x", "generated_solution": None}, *rows(1)]
    write(tmp_path / name, some)
    with pytest.raises(DataError, match=rf"{name}:3: column 'generated_solution' holds nothing"):
        read(tmp_path, path=name)
    (got,) = read(tmp_path, path=name, skip_bad=True)
    assert (got.numbers.tolist(), list(got.bad)) == ([1, 2, 4], [3])
    with pytest.raises(DataError, match=rf"{name}:1: .*columns: problem, generated_solution, oth"):
        read(tmp_path, path=name, solution="answer", skip_bad=True)
    write(tmp_path / name, [{"problem": 1, "generated_solution": "x"}])
    with pytest.raises(DataError, match=rf"{name}:1: column 'problem' holds 1"):
        read(tmp_path, path=name)


@pytest.mark.parametrize("name", TABLE_KINDS)
def test_table_that_is_not_utf8(name, tmp_path):
    wrong = pa.array([b"a", b"\xff"]).view(pa.string())
    write_table(tmp_path / name, pa.table({"problem": wrong, "s": ["x", "y"]}))
    with pytest.raises(DataError, match=rf"{name}:2: column 'problem' is not UTF-8"):
        read(tmp_path, path=name, solution="s")
    (got,) = read(tmp_path, path=name, solution="s", skip_bad=True)
    assert (got.problems.to_pylist(), list(got.bad)) == (["a"], [2])


@pytest.mark.parametrize("name", KINDS)
def test_row_of_more_than_10_mb(name, tmp_path):
    huge = {"problem": "x" * 10_000_001, "generated_solution": "y", "other": 0}
    write(tmp_path / name, [*rows(1), huge, *rows(1)])
    with pytest.raises(DataError, match=rf"{name}:2: a row of more than 10 MB"):
        read(tmp_path, path=name)
    got = read(tmp_path, path=name, skip_bad=True)
    assert sum(map(len, got)) == 2
    assert [number for each in got for number in each.bad] == [2]


def test_line_far_longer_than_a_block_is_alone_and_not_held(tmp_path):
    good = as_lines(rows(2))
    (tmp_path / "a.jsonl").write_bytes(good + b"[" * 50_000_000 + b"\n" + good)
    blocks = blocks_of(tmp_path, path="a.jsonl")
    assert [block.size for block in blocks] == [len(good), 50_000_001, len(good)]
    got = [block.read(skip_bad=True) for block in blocks]
    assert [each.numbers.tolist() for each in got] == [[1, 2], [], [4, 5]]
    assert list(got[1].bad) == [3]


def test_line_longer_than_a_block_is_a_row(small, tmp_path):
    some = [*rows(2), {"problem": "x" * 2000, "generated_solution": "y"}, *rows(2)]
    write(tmp_path / "a.jsonl", some)
    assert pairs(tmp_path, path="a.jsonl") == expected(some)


# --- files that cannot be read, or change ---


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "file.arrow", "a.feather"])
def test_damaged_tables_are_named(name, tmp_path):
    file = write(tmp_path / name, rows(100))
    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], b"PAR1 and no more", b"ARROW1 and no more"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name}: not an? (Parquet|Arrow) file"):
            read(tmp_path, path=name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"])
def test_damaged_compressed_files_are_named(name, tmp_path):
    file = write(tmp_path / name, rows(100))
    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], data[:1], b"", b"not compressed at all"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*damaged"):
            read(tmp_path, path=name)


def test_a_long_window_of_zstd_is_named(tmp_path):
    """A frame that asks for 2 GB, as `zstd --long=31` writes it, with one byte of text."""
    frame = bytes.fromhex("28b52ffd 00 a8 09 0000 0a")
    (tmp_path / "a b.jsonl.zst").write_bytes(frame)
    with pytest.raises(DataError, match=r"`zstd -d --long=31 'a b\.jsonl\.zst'`") as told:
        survey(SourceConfig(path="a b.jsonl.zst"), root=tmp_path)
    assert "damaged" not in str(told.value)


@pytest.mark.parametrize("ending", COMPRESS)
def test_streams_end_to_end_are_one_file(ending, small, tmp_path):
    """As pbzip2, pigz, `xz` by several threads and `cat` leave them."""
    first, second, third = (COMPRESS[ending](as_lines(rows(5, first=i))) for i in (0, 5, 10))
    file, name = tmp_path / f"a.jsonl{ending}", f"a.jsonl{ending}"
    whole = [first + second + third]
    if ending in (".gz", ".xz"):  # in which zeros may stand between streams and at the end
        zeros = bytes(4), bytes(40_000)
        whole += [first + zero + second + third + zero for zero in zeros]
    for data in whole:
        file.write_bytes(data)
        assert pairs(tmp_path, path=name) == expected(rows(15))
    for damaged in (
        first + b"x" + second[1:] + third,
        first + second[:-1] + third,
        first + second + b"x" * 10_000,
        first + second + bytes(8) + b"x",
        first + second + third[:1],
        first + second + third[:-1],
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*damaged"):
            read(tmp_path, path=name)
    if ending in (".bz2", ".zst"):
        file.write_bytes(first + bytes(4) + second)
        with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*damaged"):
            read(tmp_path, path=name)


@pytest.mark.parametrize("replaced", [False, True])
def test_arrow_stream_that_is_cut_short_is_named(replaced, tmp_path):
    """Wherever it is cut; between two messages, Arrow takes what is left for a whole stream."""
    schema = pa.schema([("problem", pa.string()), ("s", pa.dictionary(pa.int8(), pa.string()))])
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), schema) as writer:
        for i in range(2):
            solutions = (
                pa.array(["x", f"y{i * replaced}"]).dictionary_encode().cast(schema.types[1])
            )
            writer.write_batch(pa.record_batch([pa.array(["p", "q"]), solutions], schema=schema))
    data = (tmp_path / "a.arrow").read_bytes()
    assert len(pairs(tmp_path, path="a.arrow", solution="s")) == 4
    marked = 0
    for end in range(len(data)):
        (tmp_path / "a.arrow").write_bytes(data[:end])
        with pytest.raises(DataError, match=r"a\.arrow: not an Arrow file or stream") as refused:
            survey(SourceConfig(path="a.arrow", solution="s"), root=tmp_path)
        marked += "without the end-of-stream marker" in str(refused.value)
    assert marked == 4 + replaced  # after the schema, each dictionary and each batch
    (tmp_path / "a.arrow").write_bytes(data + data)
    with pytest.raises(DataError, match=rf"{len(data)} bytes follow the end of its stream"):
        survey(SourceConfig(path="a.arrow", solution="s"), root=tmp_path)
    (tmp_path / "a.arrow").write_bytes(data[:-8] + bytes(4))  # as Arrow wrote it before 0.15
    assert len(pairs(tmp_path, path="a.arrow", solution="s")) == 4


@pytest.mark.parametrize("name", TABLE_KINDS[:3])
@pytest.mark.parametrize("twice", ["problem", "generated_solution", "total_votes"])
def test_column_that_is_there_twice_is_named(name, twice, tmp_path):
    names = ["problem", "generated_solution", "total_votes"]
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names)
    unread = table.append_column("x", table[twice]).append_column("x", table[twice])
    write_table(tmp_path / name, unread)
    assert pairs(tmp_path, path=name) == [("a", "b")]
    write_table(tmp_path / name, table.append_column(twice, table[twice]))
    assert_named_twice(name, twice, tmp_path)


@pytest.mark.parametrize("name", TABLE_KINDS[:3])
def test_column_of_megatron_bridge_that_is_there_twice_is_named(name, tmp_path):
    table = pa.table({"input_ids": [[5]], "loss_mask": [[1]], "seq_start_id": [[0]]})
    write_table(tmp_path / name, table.append_column("input_ids", table["input_ids"]))
    assert_named_twice(name, "input_ids", tmp_path)


def assert_named_twice(name, twice, tmp_path):
    with pytest.raises(DataError, match=rf"{name}:1: 2 columns are named '{twice}', expected one"):
        read(tmp_path, path=name)


def test_broken_array_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"problem": "a", "generated_solution": "b"}, {"prob')
    with pytest.raises(DataError, match=r"a\.json:2: broken JSON"):
        read(tmp_path, path="a.json", skip_bad=True)


@pytest.mark.parametrize("name", [*KINDS, "a.idx"])
def test_file_that_changes_is_named(name, tmp_path):
    source = SourceConfig(path=name, mask="all" if name == "a.idx" else None)
    file = tmp_path / name
    if name == "a.idx":
        write_tokens(file)
    else:
        write(file, rows(4))
    data = file.read_bytes()
    for changed in (data[:-1] + b"\0", data + b"\n", data[:-9]):
        file.write_bytes(data)
        seen = survey(source, root=tmp_path)
        file.write_bytes(changed)
        with pytest.raises(DataError, match=rf"{name}: it changed while it was read"):
            [block.read(skip_bad=True) for block in seen.blocks()]
    file.unlink()
    with pytest.raises(DataError, match=rf"{name}: (it changed|cannot be read)"):
        [block.read(skip_bad=True) for block in seen.blocks()]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "list.json"])
def test_file_that_changes_while_it_is_cut_is_named(name, small, tmp_path):
    file = write(tmp_path / name, rows(20))
    blocks = survey(SourceConfig(path=name), root=tmp_path).blocks()
    next(blocks)
    os.utime(file, (1, 1))
    with pytest.raises(DataError, match=rf"{name}: it changed while it was read"):
        list(blocks)


@pytest.mark.parametrize("name", ["list.json", "a.json", "list.json.gz"])
def test_what_was_broken_by_a_change_is_not_called_broken(name, monkeypatch, tmp_path):
    monkeypatch.setattr(text_blocks, "BLOCK_BYTES", 10_000)  # more than is read ahead
    file = write(tmp_path / name, rows(5000))
    blocks = survey(SourceConfig(path=name), root=tmp_path).blocks()
    next(blocks).read(skip_bad=False)
    with file.open("r+b") as opened:
        opened.seek(1000)
        opened.write(b"[{" * 10_000)
    os.utime(file, (1, 1))
    with pytest.raises(DataError, match=rf"{name}: it changed while it was read"):
        [block.read(skip_bad=False) for block in blocks]


@pytest.mark.parametrize("name", TABLE_KINDS)
def test_bad_row_of_a_table_that_changes_is_blamed_on_the_change(name, tmp_path):
    path = write(tmp_path / name, rows(2))
    file = SourceFile.of(path)

    def read_a_bad_row():
        with open_table(file):
            os.utime(path, (1, 1))
            raise DataError("a bad row")

    with pytest.raises(DataError, match=rf"{name}: it changed while it was read"):
        read_a_bad_row()


@pytest.mark.parametrize("path", ["absent.jsonl", "part-*.jsonl", "./absent", "a.jsonl.zst"])
def test_absent_files_are_named(path, tmp_path):
    with pytest.raises(DataError, match="no such file \\("):
        survey(SourceConfig(path=path), root=tmp_path)


def test_a_glob_under_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "sp ace [x]"
    folder.mkdir()
    file = write(folder / "a.jsonl", rows(1))
    assert find_files("*.jsonl", root=folder) == [file]


def test_a_folder_is_no_source(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match=r"is a folder; name its files, such as rows/\*\.jsonl"):
        find_files("rows", root=tmp_path)


# --- tokens ---


def write_tokens(file: Path, documents: int = 3) -> None:
    """Documents 0, 0 1, 0 1 2, ... in Megatron's format."""
    lengths = np.arange(1, documents + 1, dtype=np.int32)
    write_index(file, lengths, np.dtype(np.int32))
    tokens = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    file.with_suffix(".bin").write_bytes(tokens.tobytes())


def test_tokens_of_megatron(small, tmp_path):
    write_tokens(tmp_path / "a.idx", 20)
    got = read(tmp_path, path="a.idx", mask="all")
    assert len(got) > 1
    assert all(isinstance(each, Tokens) for each in got)
    assert np.concatenate([each.numbers for each in got]).tolist() == list(range(1, 21))
    assert np.concatenate([each.examples.lengths for each in got]).tolist() == list(range(1, 21))
    assert sum(map(len, read(tmp_path, path="a.idx", mask="all", limit=7))) == 7
    files = survey(SourceConfig(path="a.idx", mask="all"), root=tmp_path).description["files"]
    assert [file["name"] for file in files] == ["a.idx", "a.bin"]
    with pytest.raises(DataError, match="it holds tokens, expected the texts of problems"):
        problems_of(tmp_path, path="a.idx", mask="all")


def test_tokens_of_megatron_need_a_mask(tmp_path):
    write_tokens(tmp_path / "a.idx")
    with pytest.raises(DataError, match=r"a\.idx: .*do not say which of them are trained.*mask"):
        survey(SourceConfig(path="a.idx"), root=tmp_path)
    with pytest.raises(DataError, match=r"a\.bin: .*give the \.idx"):
        survey(SourceConfig(path="a.bin"), root=tmp_path)
    source = SourceConfig(path="a.idx", mask="mask.idx")
    for look in (survey, source_size):
        with pytest.raises(DataError, match=r"mask\.idx: cannot be read \(No such file"):
            look(source, root=tmp_path)
    write_tokens(tmp_path / "mask.idx", 2)
    with pytest.raises(DataError, match=r"mask\.idx: 2 sequences, but .*a\.idx has 3"):
        read(tmp_path, path="a.idx", mask="mask.idx")


@pytest.mark.parametrize("path", [*KINDS, "*", "a.bin", "owner/name"])
@pytest.mark.parametrize("mask", ["all", "mask.idx"])
def test_mask_without_tokens_of_megatron_is_refused(path, mask, tmp_path):
    write_tokens(tmp_path / "a.idx")
    if path in KINDS:
        write(tmp_path / path, rows(2))
    with pytest.raises(
        DataError, match=rf"mask: {mask} says .* of Megatron's tokens.*take it away"
    ):
        survey(SourceConfig(path=path, mask=mask), root=tmp_path)


@pytest.mark.parametrize("name", TABLE_KINDS)
def test_packs_of_megatron_bridge(name, small, tmp_path):
    pack = {"input_ids": [5, 6, 7, 8], "loss_mask": [1, 0, 1, 0], "seq_start_id": [0, 2]}
    write(tmp_path / name, [pack] * 7)
    got = read(tmp_path, path=name)
    assert len(got) > 1
    assert np.concatenate([each.numbers for each in got]).tolist() == list(range(1, 8))
    assert got[0].examples.lengths[:2].tolist() == [2, 2]


@pytest.mark.parametrize("name", TABLE_KINDS)
def test_padding_of_megatron_bridge_is_the_end_of_a_sequence(name, tmp_path):
    pack = {"input_ids": [5, 6, 6, 9, 9, 9], "loss_mask": [1] * 6, "seq_start_id": [0, 3]}
    write(tmp_path / name, [pack])
    (block,) = blocks_of(tmp_path, path=name)
    for eos, lengths in ((9, [3, 1]), (6, [2, 3]), (7, [3, 3]), (None, [3, 3])):
        examples = block.read(skip_bad=False, eos=eos).examples
        assert examples.lengths.tolist() == lengths


# --- datasets of Hugging Face ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub that gives `hub["dataset"]` and notes what it was asked for."""
    import datasets

    said: dict = {"asked": []}

    def load_dataset(path, name, *, split):
        said["asked"].append((path, name, split))
        return said["dataset"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return said


def test_dataset_of_the_hub(hub, small, tmp_path):
    import datasets

    hub["dataset"] = datasets.Dataset.from_list(rows(12))
    source = {"path": "owner/name", "name": "main", "split": "train_1M"}
    assert len(blocks_of(tmp_path, **source)) > 1
    assert pairs(tmp_path, **source, limit=7) == expected(rows(7))
    assert pairs(tmp_path, **source) == expected(rows(12))
    assert set(hub["asked"]) == {("owner/name", "main", "train_1M")}
    seen = survey(SourceConfig(**source), root=tmp_path)
    assert seen.size == sum(block.size for block in seen.blocks()) > 0
    columns = {"problem": "problem", "generated_solution": "solution"}
    described = {**source, "rows": 12, "revision": None, "columns": columns}
    assert seen.description == described
    with pytest.raises(DataError, match=r"owner/name\[train_1M\]:1: no column 'answer'"):
        read(tmp_path, **source, solution="answer")


def test_dataset_that_is_kept_in_files_is_read_from_them(hub, small, tmp_path):
    import datasets

    folder = tmp_path / ("0123456789" * 4)
    datasets.Dataset.from_list(rows(9)).save_to_disk(folder, num_shards=2)
    hub["dataset"] = datasets.load_from_disk(folder)
    assert len(hub["dataset"].cache_files) == 2
    blocks = blocks_of(tmp_path, path="owner/name")
    assert {type(block).__name__ for block in blocks} == {"FileBlock"}
    assert pairs(tmp_path, path="owner/name") == expected(rows(9))
    assert [n for b in blocks for n in b.read(skip_bad=False).numbers] == list(range(1, 10))
    seen = survey(SourceConfig(path="owner/name"), root=tmp_path)
    assert seen.description["revision"] == "0123456789" * 4
    assert pairs(tmp_path, path=f"{folder.name}/*.arrow") == expected(rows(9))
    hub["dataset"] = hub["dataset"].select([8, 1])
    assert pairs(tmp_path, path="owner/name") == [expected(rows(9))[8], expected(rows(9))[1]]


def test_dataset_that_cannot_be_had_is_named(monkeypatch, tmp_path):
    import datasets

    def load_dataset(path, name, *, split):
        raise datasets.exceptions.DatasetNotFoundError("it is not on the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = rf"neither a file \({tmp_path}/owner/name\) nor a Hugging Face dataset .*not on the hub"
    with pytest.raises(DataError, match=said):
        survey(SourceConfig(path="owner/name"), root=tmp_path)
    with pytest.raises(DataError, match=r"split 'train\[:5%\]' is not the name of one split"):
        survey(SourceConfig(path="owner/name", split="train[:5%]"), root=tmp_path)


def test_configurations_of_a_dataset_are_all_named(monkeypatch, tmp_path):
    import datasets

    names = [f"config-{i}" for i in range(200)]

    def load_dataset(path, name, *, split):
        raise ValueError(
            f"Config name is missing.\nPlease pick one among the available configs: {names}\n"
            "Example of usage:\n\t`load_dataset('owner/name', 'config-0')`"
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as told:
        survey(SourceConfig(path="owner/name"), root=tmp_path)
    assert str(told.value).endswith(
        f"missing. Please pick one among the available configs: {names}"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [("a.csv", "csv is not read; expected .jsonl"), ("a.parquet.gz", "unpack it")],
)
def test_forms_that_are_not_read_are_named(name, said, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=said):
        survey(SourceConfig(path=name), root=tmp_path)
