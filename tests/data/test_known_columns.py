"""Which columns of a source are read, by their names or by the keys of the configuration."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_sft.config import SourceConfig
from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import Chats, Pairs
from mcore_sft.data.sources.survey import Survey, peek, survey

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FORMS = ["rows.jsonl", "rows.parquet"]
USING = "using column messages, and tools where a row has any"


def write(file: Path, rows: list[dict]) -> None:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(lines if file.suffix == ".jsonl" else json.dumps(rows))


def seen(folder: Path, form: str, row: dict, **keys) -> Survey:
    write(folder / form, [row, row])
    source = SourceConfig(path=form, **keys)
    assert peek(source, root=folder).using == survey(source, root=folder).using
    return survey(source, root=folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("row", "keys", "using"),
    [
        ({"problem": "p", "generated_solution": "s"}, {}, "columns problem and generated_solution"),
        ({"problem": "p", "solution": "s", "level": 3}, {}, "columns problem and solution"),
        ({"prompt": "p", "completion": "s"}, {}, "columns prompt and completion"),
        ({"instruction": "p", "output": "s"}, {}, "columns instruction and output"),
        ({"question": "p", "answer": "s"}, {}, "columns question and answer"),
        ({"question": "p", "x": "s"}, {"solution": "x"}, "columns question and x"),
        ({"x": "p", "answer": "s"}, {"problem": "x"}, "columns x and answer"),
        ({"x": "p", "y": "s", "question": "?"}, {"problem": "x", "solution": "y"}, ""),
    ],
)
def test_problem_and_solution_are_recognised(form, row, keys, using, tmp_path):
    found = seen(tmp_path, form, row, **keys)
    assert found.using == (f"using {using}" if using else "")
    (block,) = found.blocks()
    rows = block.read(skip_bad=False)
    assert isinstance(rows, Pairs)
    assert (rows.problems.to_pylist(), rows.solutions.to_pylist()) == (["p", "p"], ["s", "s"])


@pytest.mark.parametrize("form", [*FORMS, "rows.json", "rows.arrow"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prompt": "p", "prompt_id": "x"},
        {"problem": "p", "solution": "s"},
        {"tools": [{"name": "f"}]},
    ],
)
def test_conversations_are_recognised_before_anything_else(form, more, tmp_path):
    found = seen(tmp_path, form, {**more, "messages": TALK})
    assert found.using == USING
    (block,) = found.blocks()
    rows = block.read(skip_bad=False)
    assert isinstance(rows, Chats)
    assert (rows.messages, rows.tools is not None) == ([TALK, TALK], "tools" in more)
    found = seen(tmp_path, form, {**more, "messages": TALK}, messages="messages")
    assert found.using == ""
    assert next(found.blocks()).read(skip_bad=False).tools is None  # only what is named


@pytest.mark.parametrize("form", FORMS)
def test_conversations_of_sharegpt_are_recognised(form, tmp_path):
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    found = seen(tmp_path, form, {"id": "1", "conversations": talk})
    assert found.using == USING.replace("messages", "conversations")
    (block,) = found.blocks()
    read = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert block.read(skip_bad=False).messages == [read, read]
    assert seen(tmp_path, form, {"conversations": 3, "messages": TALK}).using == USING


@pytest.mark.parametrize("keys", [{}, {"messages": "messages", "tools": "tools"}])
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "arrow"])
def test_some_rows_have_tools(form, keys, tmp_path):
    tools = [{"name": "f"}]
    rows = [{"messages": TALK}, {"messages": TALK, "tools": tools}, {"messages": TALK, "tools": []}]
    if form in ("parquet", "arrow"):
        rows[0]["tools"] = None  # or Arrow makes no column of it
    write(tmp_path / f"a.{form}", rows)
    (block,) = survey(SourceConfig(path=f"a.{form}", **keys), root=tmp_path).blocks()
    assert block.read(skip_bad=False).tools == [None, tools, None]
    write(tmp_path / f"0.{form}", [{"messages": TALK}])  # the first file tells which are read
    found = survey(SourceConfig(path=f"*.{form}"), root=tmp_path)
    assert [block.read(skip_bad=False).tools for block in found.blocks()] == [
        None,
        [None, tools, None],
    ]


@pytest.mark.parametrize("form", FORMS)
def test_tools_that_no_row_has_are_an_error(form, tmp_path):
    write(tmp_path / form, [{"messages": TALK, "tools": []}])
    source = SourceConfig(path=form, messages="messages", tools="tool")

    def read() -> None:
        for block in survey(source, root=tmp_path).blocks():
            block.read(skip_bad=True)

    with pytest.raises(DataError, match=r"no column 'tool' .* did you mean tools: tools\?"):
        read()


@pytest.mark.parametrize("nothing", ["", "[]", "null", None, []])
def test_no_tools_may_be_written_in_any_way(nothing, tmp_path):
    write(tmp_path / "a.jsonl", [{"messages": TALK, "tools": nothing}])
    (block,) = survey(SourceConfig(path="a.jsonl"), root=tmp_path).blocks()
    assert block.read(skip_bad=False).tools is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        ({"talk": TALK, "id": "1"}, {}, "name the conversations with messages: talk"),
        ({"talk": json.dumps(TALK)}, {}, "name the conversations with messages: talk"),
        ({"c": [{"from": "human", "value": "x"}]}, {}, "conversations with messages: c"),
        ({"query": "a", "reply": "b"}, {}, "name them with problem: query and solution: reply"),
        ({"a": "a", "b": "b", "c": "c"}, {}, "problem: COLUMN and solution: COLUMN, or messages"),
        ({"question": "a", "n": 5}, {}, "columns: question, n; name them with problem: COLUMN"),
        ({"question": "a", "n": 5}, {"problem": "question"}, "name the solution with solution: "),
        ({"question": "a"}, {"problem": "questions"}, r"did you mean problem: question\?"),
        ({"talk": TALK}, {"messages": "chat"}, r"no column 'chat' for the messages; columns: talk"),
        ({"instruction": "a", "input": "b", "output": "c"}, {}, "the input would be left out"),
        ({"system": "a", "messages": TALK}, {}, "the system text would be left out"),
    ],
)
def test_the_key_that_fits_is_proposed(form, row, keys, said, tmp_path):
    with pytest.raises(DataError, match=rf"{form}:1: .*{said}"):
        [block.read(skip_bad=True) for block in seen(tmp_path, form, row, **keys).blocks()]


def test_a_benchmark_needs_no_answer(tmp_path):
    for row in ({"problem": "p"}, {"question": "p", "x": 1}, {"instruction": "p", "input": "i"}):
        write(tmp_path / "a.jsonl", [row])
        found = survey(SourceConfig(path="a.jsonl"), root=tmp_path, alone=True)
        assert found.using == f"using column {next(iter(row))}"
        (block,) = found.blocks()
        assert block.read(skip_bad=False).problems.to_pylist() == ["p"]
    write(tmp_path / "a.jsonl", [{"x": "p"}])
    with pytest.raises(DataError, match="name the problem with problem: COLUMN"):
        survey(SourceConfig(path="a.jsonl"), root=tmp_path, alone=True)


def test_the_first_row_that_can_be_read_tells(tmp_path):
    good = json.dumps({"question": "p", "answer": "s"}) + "\n"
    deep = '{"x": ' + "[" * 200 + "]" * 200 + ', "question": "p", "answer": "s"}\n'
    for first in ("\ufeff\n", "not JSON\n", deep, '{"question": "p", "answer": "s", "x": Inf}\n'):
        (tmp_path / "a.jsonl").write_text(first + good, encoding="utf-8")
        found = survey(SourceConfig(path="a.jsonl"), root=tmp_path)
        assert found.using == "using columns question and answer"
        (block,) = found.blocks()
        assert len(block.read(skip_bad=True)) == 1 + ("question" in first)
    (tmp_path / "a.jsonl").write_text("\nnot JSON\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        survey(SourceConfig(path="a.jsonl"), root=tmp_path)


def test_files_without_rows_tell_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    write(tmp_path / "b.jsonl", [{"messages": TALK}])
    found = survey(SourceConfig(path="*.jsonl"), root=tmp_path)
    assert found.using == USING
    assert [len(block.read(skip_bad=False)) for block in found.blocks()] == [0, 1]
