import json

import pytest

from mcore_sft.data.errors import DataError
from mcore_sft.data.json_array import JsonArray

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
        (b'["a", "\xff"]', r"a\.json:\d: not UTF-8, .* 0xff"),
        (b'["a", "\xc3', r"a\.json:\d: not UTF-8"),
        (b"[" * 5000, r"a\.json:1: broken JSON"),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_broken_array_is_named(data, said, step):
    with pytest.raises(DataError, match=said):
        read(data, step)
