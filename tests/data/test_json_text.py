from decimal import Decimal

import pytest

from mcore_sft.base.json_text import DEEPEST, loads, raw_decode


def nested(levels: int, kind: str) -> str:
    opening, closing = {"list": ("[", "]"), "object": ('{"a":', "}")}[kind]
    return opening * levels + "1" + closing * levels


@pytest.mark.parametrize("kind", ["list", "object"])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_values_are_read_up_to_the_limit_and_refused_beyond(kind: str, as_bytes: bool) -> None:
    for levels in (0, 1, DEEPEST):
        text = nested(levels, kind)
        value = loads(text.encode() if as_bytes else text)
        for _ in range(levels):
            (value,) = value.values() if kind == "object" else value
        assert value == 1
    for levels in (DEEPEST + 1, 2_000, 200_000):
        text = nested(levels, kind)
        with pytest.raises(ValueError, match="nested more than 100 levels deep"):
            loads(text.encode() if as_bytes else text)


def test_brackets_within_text_do_not_nest() -> None:
    text = "{[" * 5_000
    assert loads(f'{{"a": "{text}", "b": [[], {{}}]}}') == {"a": text, "b": [[], {}]}


def test_empty_lists_count_as_levels() -> None:
    loads("[" * DEEPEST + "]" * DEEPEST)
    with pytest.raises(ValueError, match="nested more than"):
        loads("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))


def test_what_is_no_json_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        loads(b"nothing")


def test_an_integer_of_any_length_is_read() -> None:
    digits = "9" * 5000
    assert loads(f'{{"x": [{digits}]}}') == {"x": [Decimal(digits)]}
    assert loads(f"-{digits[:4300]}") == -int(digits[:4300])
    assert raw_decode(f"{digits}, 5", 0) == (Decimal(digits), 5000)
    with pytest.raises(ValueError, match="Expecting"):
        loads(f"[{digits}, ]")
