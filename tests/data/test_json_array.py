import json

import pytest

from mcore_sft.data.errors import DataError
from mcore_sft.data.sources import json_array
from mcore_sft.data.sources.json_array import JsonArray

VALUES = [{"a": "\u00e9]"}, [], 12, -3.5e7, "x, y", None, {"b": [{}]}]


def read(data: bytes, step: int) -> list:
    pieces = iter([data[i : i + step] for i in range(0, len(data), step)])
    return [value for value, _ in JsonArray(lambda: next(pieces, b""), "a.json")]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("values", [VALUES, VALUES[:1], []])
def test_values_whatever_the_pieces(step, indent, values):
    data = json.dumps(values, indent=indent, ensure_ascii=False).encode()
    assert read(data, step) == values
    assert read(b"\xef\xbb\xbf \n" + data + b" \n", step) == values


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'[{"a": 1}, {"a"', r"a\.json:2: broken JSON"),
        (b"[1, 2", r"a\.json:2: broken JSON \(it ends early"),
        (b"[1 2]", r"a\.json:1: broken JSON \(found '2' after the value"),
        (b"[1,]", r"a\.json:2: broken JSON"),
        (b"[1] [2]", r"a\.json:1: broken JSON \(found '\[' after the array"),
        (b'["a" 1]', r"a\.json:1: broken JSON \(found '1' after the value"),
        (b'["a", {"b": 1 2}]', r"a\.json:2: broken JSON \(Expecting ',' .*: character 9 of the va"),
        (b'["a", "\xff", 1]', r"a\.json:2: not UTF-8 \(byte 8 of the text is 0xff\)"),
        (b'\xef\xbb\xbf["a", 1\xff]', r"a\.json:2: not UTF-8 \(byte 11 of the text is 0xff\)"),
        (b'["a", "\xc3', r"a\.json:2: not UTF-8 \(byte 8 of the text is 0xc3\)"),
        (b"[" * 5000, r"a\.json:1: broken JSON"),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_broken_array_is_named(data, said, step):
    with pytest.raises(DataError, match=said):
        read(data, step)


def test_what_comes_before_a_byte_that_is_not_utf8_is_read():
    values = iter(JsonArray(iter([b'["a", {"b": 1}, "\xff"]', b""]).__next__, "a.json"))
    assert [next(values)[0], next(values)[0]] == ["a", {"b": 1}]
    with pytest.raises(DataError, match=r"a\.json:3: not UTF-8"):
        next(values)


@pytest.mark.parametrize("large", ["x" * 400, [True] * 80, [{"y": None}] * 40, 10**350, "\n" * 200])
def test_value_that_is_too_large_is_not_called_broken(large, monkeypatch):
    monkeypatch.setattr(json_array, "_LARGEST", 300)
    data = json.dumps(["a", large, "b"]).encode()
    for step in (1, 100, 101, 102, 103, 104, 350, 10_000):  # the limit is the same wherever cut
        with pytest.raises(DataError, match=r"a\.json:2: a value of more than 0 MB"):
            read(data, step)
    broken = b'["a", {"b" 1}' + b', "more"' * 100 + b"]"
    with pytest.raises(DataError, match=r"a\.json:2: broken JSON \(Expecting ':' delimiter"):
        read(broken, 100)
