"""The same rows in every form in which files hold them: JSON lines, Parquet, Arrow, datasets."""

import io
import json
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_sft.base.terminal import Console
from mcore_sft.config import DataConfig, PromptConfig, SourceConfig
from mcore_sft.data.encode.job import Job
from mcore_sft.data.errors import DataError
from mcore_sft.data.prepare import prepare
from mcore_sft.data.rows import Chats, Pairs
from mcore_sft.data.sources.arrow_sizes import row_sizes
from mcore_sft.data.sources.arrow_values import json_values
from mcore_sft.data.sources.survey import survey
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
MIXED = [
    {
        "messages": [
            {"role": "user", "content": 'Say "hi"\nnow'},
            {"role": "assistant", "content": "42"},
            {"role": "user", "content": "null"},
            {"role": "assistant", "content": '{"a": 1.50}'},
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            {"role": "user", "content": "Add"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "[1, 2]"},
        ],
        "tools": [{"name": "g", "parameters": {"properties": {"b": {"enum": ["x", None, 3]}}}}],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Again"}]},
            {"role": "assistant", "content": "true"},
        ],
        "tools": [],
    },
]
"""Messages and tools whose keys and types differ from row to row, and texts that spell JSON."""

ALIKE = [
    {
        "messages": [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": "é" * i + "!", "tool_calls": [CALL] if i else None},
        ],
        "tools": [{"name": "f", "parameters": {"a": f"{i}"}}] if i % 2 else None,
    }
    for i in range(5)
]
"""Messages and tools of one type."""


def chats(folder: Path, path: str) -> list[tuple[Any, Any]]:
    found = []
    for block in survey(SourceConfig(path=path), root=folder).blocks():
        rows = block.read(skip_bad=False)
        assert isinstance(rows, Chats)
        found += zip(rows.messages, rows.tools or [None] * len(rows), strict=True)
    return found


def as_lines(folder: Path, rows: list[dict[str, Any]]) -> str:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    return "rows.jsonl"


def as_array(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return "rows.json"


def as_dataset(folder: Path, rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, on_mixed_types="use_json")


def as_json_parquet(folder: Path, rows: list[dict[str, Any]]) -> str:
    as_dataset(folder, rows).to_parquet(folder / "json.parquet")
    return "json.parquet"


def saved(folder: Path, rows: list[dict[str, Any]]) -> str:
    as_dataset(folder, rows).save_to_disk(folder / "saved", num_shards=2)
    return "saved/*.arrow"


def whole_messages_as_json(folder: Path, rows: list[dict[str, Any]]) -> str:
    """As `datasets` reads JSON lines whose messages have different keys."""
    texts = [json.dumps(one) for row in rows for one in row["messages"]]
    ends = np.cumsum([0, *(len(row["messages"]) for row in rows)])
    messages = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(texts, pa.json_()))
    tools = pa.array([json.dumps(row["tools"]) for row in rows], pa.json_())
    return stream(folder, pa.table({"messages": messages, "tools": tools}))


def unregistered(folder: Path, rows: list[dict[str, Any]]) -> str:
    """An arrow.json that Arrow gives as its storage, with a name in the field's metadata."""
    told = {"ARROW:extension:name": "arrow.json", "ARROW:extension:metadata": ""}
    fields = [pa.field(name, pa.string(), metadata=told) for name in ("messages", "tools")]
    texts = [pa.array([json.dumps(row[field.name]) for row in rows]) for field in fields]
    pq.write_table(pa.table(texts, schema=pa.schema(fields)), folder / "plain.parquet")
    return "plain.parquet"


def stream(folder: Path, table: pa.Table) -> str:
    with pa.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return "rows.arrow"


@pytest.mark.parametrize(
    "form", [as_array, as_json_parquet, saved, whole_messages_as_json, unregistered]
)
def test_rows_of_mixed_shape_are_those_of_their_lines(form: Callable, tmp_path: Path) -> None:
    expected = chats(tmp_path, as_lines(tmp_path, MIXED))
    assert expected[0][0][3]["content"] == '{"a": 1.50}'
    assert expected[2][1] is None  # no tools are as good as none
    assert chats(tmp_path, form(tmp_path, MIXED)) == expected


TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


def test_every_form_is_prepared_to_the_same_bytes(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent.parent / "fixtures" / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    prompt = Prompt.load(PromptConfig(), tokenizer)
    console = Console(file=io.StringIO())
    made = set()
    for form in (as_lines, as_json_parquet, saved, whole_messages_as_json):
        sources = [{"path": form(tmp_path, MIXED)}]
        data = DataConfig.model_validate({"root": tmp_path, "train": sources, "workers": 1})
        job = Job(config=data, prompt=prompt, tokenizer=tokenizer, console=console)
        manifest = prepare(job, tmp_path / f"packed-{form.__name__}")
        assert manifest["splits"]["train"]["examples"] == len(MIXED)
        made.add(manifest["fingerprint"])
    assert len(made) == 1


def typed(message: pa.DataType, many: Callable = pa.list_) -> pa.Schema:
    arguments = pa.map_(pa.string(), pa.int32())
    function = pa.struct([("name", pa.string()), ("arguments", arguments)])
    call = pa.struct([("type", pa.string()), ("function", function)])
    said = pa.struct([("role", message), ("content", message), ("tool_calls", pa.list_(call))])
    tool = pa.struct([("name", message), ("parameters", pa.map_(pa.string(), pa.string()))])
    return pa.schema([("messages", many(said)), ("tools", many(tool))])


@pytest.mark.parametrize(
    "schema",
    [
        typed(pa.string()),
        typed(pa.large_string(), pa.large_list),
        typed(pa.string_view(), pa.list_view),
        typed(pa.binary(), pa.large_list_view),
        typed(pa.dictionary(pa.int8(), pa.string())),
    ],
    ids=["plain", "large", "views", "bytes", "dictionary"],
)
def test_rows_of_one_type_are_those_of_their_lines(schema: pa.Schema, tmp_path: Path) -> None:
    expected = chats(tmp_path, as_lines(tmp_path, ALIKE))
    table = pa.Table.from_pylist(ALIKE, schema)
    assert chats(tmp_path, stream(tmp_path, table)) == expected
    if "view" not in str(schema):  # which Arrow does not write into Parquet
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
        assert chats(tmp_path, "rows.parquet") == expected


def test_a_column_of_text_and_numbers_is_the_text_that_lines_have(tmp_path: Path) -> None:
    rows = [{"question": "1?", "answer": "42"}, {"question": '"x"?', "answer": '"y"'}]
    table = pa.table(
        {
            "question": pa.array([json.dumps(row["question"]) for row in rows], pa.json_()),
            "answer": pa.array(["42", json.dumps('"y"')], pa.json_()),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    for path in (as_lines(tmp_path, rows), "rows.parquet"):
        (block,) = survey(SourceConfig(path=path), root=tmp_path).blocks()
        got = block.read(skip_bad=False)
        assert isinstance(got, Pairs)
        assert got.problems.to_pylist() == ["1?", '"x"?']
        assert got.solutions.to_pylist() == ["42", '"y"']


def moments(unit: str, zone: str | None = None) -> pa.Array:
    return pa.array([1_000_000_000, None], pa.int64()).cast(pa.timestamp(unit, zone))


ARRAYS = [
    (pa.array([{"a": 1, "b": {"c": [1, None]}}, None, {"b": None}]), None),
    (pa.array([[("a", 1)], None, [("b", None)]], pa.map_(pa.string(), pa.int8())), None),
    (pa.array([[(1, "x")]], pa.map_(pa.int8(), pa.string())), [{"1": "x"}]),
    (pa.array([["a", "bb"], None, ["c", "d"]], pa.list_(pa.string(), 2)), None),
    (pa.RunEndEncodedArray.from_arrays([2, 3, 5], ["a", None, "bb"]), ["a", "a", None, "bb", "bb"]),
    (
        pa.UnionArray.from_dense(
            pa.array([0, 1, 0], pa.int8()),
            pa.array([0, 0, 1], pa.int32()),
            [pa.array(["x", "yy"]), pa.array([5])],
        ),
        ["x", 5, "yy"],
    ),
    (
        pa.UnionArray.from_sparse(
            pa.array([1, 0], pa.int8()), [pa.array(["x", "yy"]), pa.array([5, 6])]
        ),
        [5, "yy"],
    ),
    (
        pa.DictionaryArray.from_arrays(pa.array([1, None, 0]), pa.array([{"a": 1}, {"a": 2}])),
        [{"a": 2}, None, {"a": 1}],
    ),
    (pa.array([b"ab", None], pa.binary(2)), ["ab", None]),
    (moments("us"), ["1970-01-01T00:16:40", None]),
    (moments("ns", "Europe/Berlin"), ["1970-01-01T00:00:01+00:00", None]),
    (pa.array([1, None], pa.date32()), ["1970-01-02", None]),
    (pa.array([Decimal("1.50"), None, Decimal(3)]), [1.5, None, 3.0]),
    (pa.array([Decimal(7)], pa.decimal128(5, 0)), [7]),
    (pa.array([b"\0" * 16, None], pa.uuid()), ["00000000-0000-0000-0000-000000000000", None]),
    (pa.array([1, 0, None], pa.bool8()), [True, False, None]),
    (pa.array([None, None]), [None, None]),
]


@pytest.mark.parametrize(
    ("array", "expected"), ARRAYS, ids=lambda one: str(getattr(one, "type", ""))
)
def test_values_of_an_array_and_of_every_slice_of_it(array: pa.Array, expected: Any) -> None:
    field = pa.field("x", array.type)
    if expected is None:  # nested: as Python sees it, without what is null in a struct
        plain = pa.types.is_map(array.type) or pa.types.is_fixed_size_list(array.type)
        expected = array.to_pylist(maps_as_pydicts="strict")
        expected = expected if plain else [{"a": 1, "b": {"c": [1, None]}}, None, {}]
    sizes = row_sizes(pa.table([array], ["x"]))
    for start in range(len(array)):
        for stop in range(start, len(array) + 1):
            part = array.slice(start, stop - start)
            assert json_values(part, field) == expected[start:stop]
            assert row_sizes(pa.table([part], ["x"])).tolist() == sizes[start:stop].tolist()
    json.dumps(expected)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (pa.array([b"\xff"]), "utf-8"),
        (pa.array([2**62], pa.timestamp("s")), "out of bounds"),
        (pa.array(["{"], pa.json_()), "broken JSON"),
        (pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int8())), "a key twice"),
        (pa.array([[(b"\xff", 1)]], pa.map_(pa.binary(), pa.int8())), "utf-8"),
        (pa.array([[(1.5, 1)]], pa.map_(pa.float32(), pa.int8())), "the key 1.5, expected text"),
        (pa.array([b"x"], pa.opaque(pa.binary(), "polygon", "a database")), "arrow.opaque, which"),
    ],
)
def test_what_has_no_value_in_json_is_named(array: pa.Array, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        json_values(array, pa.field("x", array.type))


@pytest.mark.parametrize(
    "extra",
    [
        pa.array([b"\xff", None]),
        pa.array([2**62, None], pa.timestamp("s")),
        pa.array([b"x", None], pa.opaque(pa.binary(), "polygon", "a database")),
    ],
    ids=lambda array: str(array.type),
)
def test_a_row_whose_message_has_no_value_in_json_is_named_or_left_out(extra, tmp_path) -> None:
    talk = ["role", "content", "id"], [pa.array(["assistant"] * 2), pa.array(["a", "b"]), extra]
    messages = pa.StructArray.from_arrays(talk[1], talk[0])
    table = pa.table({"messages": pa.ListArray.from_arrays([0, 1, 2], messages)})
    stream(tmp_path, table)
    (block,) = survey(SourceConfig(path="rows.arrow"), root=tmp_path).blocks()
    with pytest.raises(DataError, match=r"rows\.arrow:1: column 'messages': |not UTF-8"):
        block.read(skip_bad=False)
    got = block.read(skip_bad=True)
    assert isinstance(got, Chats)
    if "opaque" in str(extra.type):  # which no row of it can be read of
        assert len(got.bad) == 2
    else:
        assert (list(got.bad), [said[0]["content"] for said in got.messages]) == ([1], ["b"])


def test_sizes_count_a_repeated_text_each_time() -> None:
    texts = pa.array(["x" * 100, "y", None, "x" * 100])
    for array in (texts, texts.dictionary_encode(), texts.cast(pa.string_view())):
        assert row_sizes(pa.table([array], ["x"])).tolist() == [100, 1, 0, 100]
    held = pa.ListArray.from_arrays([0, 2, 2, 4], texts.dictionary_encode())
    assert row_sizes(pa.table([held, pa.array([1, 2, 3])], ["a", "b"])).tolist() == [109, 8, 108]
    assert row_sizes(pa.table({"x": pa.chunked_array([texts, texts])})).sum() == 402
    assert row_sizes(pa.table({"x": pa.array([], pa.string())})).dtype == np.int64


def test_a_long_number_is_read_beside_messages_and_refused_in_them(tmp_path: Path) -> None:
    talk = '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "id": 1}]'
    for form in ('{"n": %s, "messages": %s}', '[{"n": %s, "messages": %s}]'):
        (tmp_path / "rows.json").write_text(form % ("9" * 5000, talk))
        assert chats(tmp_path, "rows.json")[0][0][1]["content"] == "y"
        (tmp_path / "rows.json").write_text(form % (1, talk.replace("1}", "9" * 5000 + "}")))
        with pytest.raises(DataError, match="holds a number of 5,000 digits, which cannot be wri"):
            chats(tmp_path, "rows.json")


def test_tool_calls_may_be_json_text(tmp_path: Path) -> None:
    rows = json.loads(json.dumps(MIXED))
    expected = chats(tmp_path, as_lines(tmp_path, rows))
    rows[1]["messages"][1]["tool_calls"] = json.dumps(rows[1]["messages"][1]["tool_calls"])
    rows[0]["messages"][1]["tool_calls"] = ""
    assert chats(tmp_path, as_lines(tmp_path, rows)) == expected
    for wrong in ("[", "5", {"name": "f"}):
        rows[0]["messages"][1]["tool_calls"] = wrong
        with pytest.raises(DataError, match=r"message 2: tool_calls .*, expected a list of calls"):
            chats(tmp_path, as_lines(tmp_path, rows))
