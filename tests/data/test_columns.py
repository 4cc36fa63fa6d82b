import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from mcore_sft.data.errors import DataError
from mcore_sft.data.sources import columns
from mcore_sft.data.sources.columns import RowReader
from mcore_sft.data.sources.known_columns import Columns

START = '{"problem": "a", "generated_solution": "b"'


PAIR = Columns(problem="problem", solution="generated_solution")


def reader(*, first: int = 1, skip_bad: bool = False, **named) -> RowReader:
    read = Columns(**named) if named else PAIR
    return RowReader(columns=read, name="a.jsonl", first=first, skip_bad=skip_bad)


def by_arrow(data: bytes) -> bool:
    return columns._parse_lines(data, columns._schema(PAIR)) is not None


def by_python(data: bytes) -> list[tuple[str, str]]:
    found = [json.loads(line) for line in data.split(b"\n") if line.strip()]
    return [(row["problem"], row["generated_solution"]) for row in found]


GOOD = [
    START + "}",
    START + '}\n{"generated_solution": "d", "x": [{}], "problem": "c"}\n',
    START + "}\r\n" + START + "}\r\n",
    "\ufeff" + START + "}",
    START + ', "\\u0070roblem": "A\\/\\b\\f\\n\\r\\t\\\\\\""}',
    '{"problem": "\\u0000\\u00e9\u00e9\\ud83d\\ude00\U0001f600", "generated_solution": "\x7f"}',
    '{"problem": "\\n x", "generated_solution": "\u3000x\u0085"}',
    START + ', "x": NaN, "y": -Infinity, "z": 123456789012345678901234567890, "v": 1e999}',
    START + ', "x": "\\ud800", "y\\udc00": [1, {"problem": 5}]}',
    START + ', "problem": "the last counts"}',
    " " + START + "} ",
    "\n\n" + START + "}\n \n",
    START + ', "expected_answer": 36, "majority_votes": null}',
    START + ', "majority_votes": 5, "total_votes": 8.5}',
    START + ', "majority_votes": NaN, "total_votes": 8}',
]


@pytest.mark.parametrize("text", GOOD)
def test_arrow_and_python_read_the_same(text, monkeypatch):
    data = text.encode()
    got = reader().lines(data)
    assert got.bad == {}
    texts = list(zip(got.problems.to_pylist(), got.solutions.to_pylist(), strict=True))
    assert texts == by_python(data.removeprefix("\ufeff".encode()))
    monkeypatch.setattr(columns, "_parse_lines", lambda data, schema: None)
    again = reader().lines(data)
    assert again.problems.equals(got.problems)
    assert again.solutions.equals(got.solutions)
    assert again.numbers.tolist() == got.numbers.tolist()
    assert again.answers == got.answers
    np.testing.assert_array_equal(again.votes, got.votes)


def test_common_lines_are_read_by_arrow():
    for text in (*GOOD[:3], *GOOD[5:8]):
        assert by_arrow(text.replace(', "v": 1e999', "").encode())


@pytest.mark.parametrize(
    "text",
    [
        START + "}" + START + "}\n" + START + "\n}",  # as many rows as lines, but not in each
        START + "\n}",
        "null\n" + START + "}",  # Arrow alone would crash
        START + "} null " + START + "}",
        START + ', "x": "\xff"}',
        START + ', "x": "\0"}',
        "",
    ],
)
def test_lines_that_arrow_is_not_trusted_with(text):
    assert not by_arrow(text.encode("latin-1"))


def test_votes_of_which_one_is_missing_are_none():
    more = ', "majority_votes": 3, "total_votes": 8}\n'
    data = (START + more + START + ', "majority_votes": 3}\n').encode()
    expected = [[3, 8], [np.nan, np.nan]]
    np.testing.assert_array_equal(reader().lines(data).votes, expected)
    np.testing.assert_array_equal(reader().lines(b" " + data).votes, expected)  # by Python


ODD = ["Inf", "-NaN", "9" * 5000, "[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("neighbour", [START + "}", "null", " "])
def test_verdict_on_a_row_is_the_same_among_any_others(value, neighbour):
    """Python's json reads these otherwise, and Arrow all where it does not look at them."""
    rows = {
        START + f', "x": {value}, "majority_votes": 3, "total_votes": 8}}': True,
        START + f', "expected_answer": {value}}}': value.isdecimal(),
        START + f', "problem": {value}}}': False,
    }
    for row, is_good in rows.items():
        alone = reader(first=6, skip_bad=True).lines(row.encode())
        among = reader(first=5, skip_bad=True).lines(f"{neighbour}\n{row}\n".encode())
        assert (6 in among.numbers, 6 in alone.numbers) == (is_good, is_good)
        assert among.bad.get(6) == alone.bad.get(6)
        if is_good and "votes" in row:
            assert among.votes[-1].tolist() == alone.votes[-1].tolist() == [3, 8]


@pytest.mark.parametrize("column", columns.VOTES)
@pytest.mark.parametrize("value", ["5", "", True, [5], 10**400, np.inf])
def test_votes_that_are_no_number_are_a_bad_row(column, value):
    row = {"problem": "a", "generated_solution": "b", "majority_votes": 3, "total_votes": 8}
    data = "\n".join(map(json.dumps, [row, {**row, column: value}, row])).encode()
    said = rf"a\.jsonl:2: column '{column}' holds .*, expected a number of votes; mend or remove"
    with pytest.raises(DataError, match=said):
        reader().lines(data)
    got = reader(skip_bad=True).lines(data)
    assert (got.numbers.tolist(), list(got.bad), got.votes.tolist()) == ([1, 3], [2], [[3, 8]] * 2)


@pytest.mark.parametrize(
    ("votes", "read"),
    [
        (pa.array(["5", None, None]), {2: [], 3: []}),
        (pa.array([True, None, None]), {2: [], 3: []}),
        (pa.array([2, np.inf, np.nan]), {1: [2, 8], 3: []}),
        (pa.array([Decimal("2.5"), None, Decimal(3)]), {1: [2.5, 8], 2: [], 3: [3, 8]}),
        (pa.array([None] * 3), {1: [], 2: [], 3: []}),
    ],
)
def test_votes_of_a_table(votes, read):
    texts = {"problem": list("abc"), "generated_solution": list("def")}
    table = pa.table({**texts, "majority_votes": votes, "total_votes": [8, 8, 8]})
    none = pa.Table.from_pylist([{}], table.schema)
    for some in (table, pa.concat_tables([table, none])):  # the second row by row
        got = reader(skip_bad=True).table(some)
        assert got.numbers.tolist() == list(read)
        found = [[np.nan] * 2] * len(read) if got.votes is None else got.votes
        np.testing.assert_array_equal(found, [pair or [np.nan] * 2 for pair in read.values()])
        assert list(reader(skip_bad=True).table(some.drop("total_votes")).bad) == list(got.bad)


def test_white_space_in_front_is_not_taken_for_blank():
    for space in "\t\n \x1c\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000":
        row = {"problem": space + "x", "generated_solution": "b"}
        assert len(reader().lines(json.dumps(row, ensure_ascii=False).encode())) == 1
        row["problem"] = space * 2
        with pytest.raises(DataError, match="holds only blanks"):
            reader().lines(json.dumps(row, ensure_ascii=False).encode())


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_blank_text_in_a_slice_of_a_table_is_found(kind):
    problems = pa.array(["", "p", "q", " "], kind)
    table = pa.table({"problem": problems, "generated_solution": pa.array(list("abcd"), kind)})
    assert reader().table(table.slice(1, 2)).problems.to_pylist() == ["p", "q"]
    assert columns._texts(table.slice(1, 2), "problem") is not None
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*only blanks"):
        reader().table(table.slice(1, 3))
    with pytest.raises(DataError, match=r"a\.jsonl:7: .*only blanks"):
        reader(first=7).table(table)


def test_good_pairs_are_read_at_once(monkeypatch):
    def slow(*_):
        raise AssertionError("row by row")

    monkeypatch.setattr(RowReader, "_each", slow)
    assert reader().lines((START + "}\n").encode()).problems.to_pylist() == ["a"]
    table = pa.table({"problem": ["a"], "generated_solution": ["b"]})
    assert reader().table(table).solutions.to_pylist() == ["b"]
    answered = table.append_column("expected_answer", pa.array([36]))
    assert reader().table(answered).answers.to_pylist() == ["36"]
    assert len(reader().table(table.slice(0, 0))) == 0


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.large_string()])
def test_a_row_of_a_table_that_is_not_utf8_is_named(kind):
    problems = pa.array([b"a", b"\xff", b"c"], pa.large_binary()).view(kind)
    table = pa.table({"problem": problems, "generated_solution": list("xyz")})
    got = reader(skip_bad=True).table(table)
    assert (got.problems.to_pylist(), got.numbers.tolist()) == (["a", "c"], [1, 3])
    assert "a.jsonl:2: column 'problem' is not UTF-8" in got.bad[2]


def test_the_columns_that_are_read():
    names = ["x", "total_votes", "generated_solution", "problem", "expected_answer"]
    schema = pa.schema([(name, pa.string()) for name in names])
    assert columns.wanted_columns(PAIR, schema, "a") == names[1:]
    packed = pa.schema([(name, pa.list_(pa.int32())) for name in columns.BRIDGE])
    assert columns.wanted_columns(PAIR, packed, "a") == list(columns.BRIDGE)
    with pytest.raises(DataError, match="a:1: no column 'problem'"):
        columns.wanted_columns(PAIR, schema.remove(3), "a")
    with pytest.raises(DataError, match="a:1: 2 columns are named 'problem'"):
        columns.wanted_columns(PAIR, schema.append(pa.field("problem", pa.string())), "a")


def test_the_texts_of_a_line_that_python_cannot_read():
    names = ["a", "b", "c"]
    assert columns.texts_in(b'{"a": "x", "b": null, "z": Inf}', names) == {"a": "x"}
    assert columns.texts_in(b"null", names) == {}


def test_column_missing_from_a_later_row_is_a_bad_row():
    data = (START + "}\n" + '{"problem": "a"}\n').encode()
    assert list(reader(skip_bad=True).lines(data).bad) == [2]
    assert list(reader(skip_bad=True, first=9).lines(b'{"problem": "a"}').bad) == [9]
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column"):
        reader(skip_bad=True).lines(b'{"problem": "a"}')


def test_null_in_an_argument_is_kept_and_the_filling_of_a_table_is_not():
    call = {"name": "f", "arguments": {"x": None}}
    talk = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "y"},
    ]
    kept = [{"role": "assistant", "content": "", "tool_calls": [call]}, talk[1]]
    got = reader(messages="m").lines(json.dumps({"m": talk}).encode())
    assert got.messages == [kept]
    table = pa.Table.from_pylist([{"m": talk}])
    assert reader(messages="m").table(table).messages == [
        [{**kept[0], "tool_calls": [{"name": "f", "arguments": {}}]}, talk[1]]
    ]


def test_tools_that_no_row_has_are_not_a_typo_that_passes():
    talk = {"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="no column 'tool'"):
        reader(messages="m", tools="tool").lines(json.dumps(talk).encode())
