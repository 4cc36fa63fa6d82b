import pytest

from mcore_sft.data.text.tokenizer import load_tokenizer
from tools.make_tokenizer import TextError, main, texts_in


def test_every_string_of_every_row_is_read_whatever_it_holds(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "one\u2028two", "b": 3}\n{"a": "three", "b": null}\n', encoding="utf-8")
    assert list(texts_in([path, path])) == ["one\u2028two", "three"] * 2


@pytest.mark.parametrize("text", ["no json\n", "[1]\n"])
def test_what_is_no_text_is_an_error(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(TextError, match=r"rows\.jsonl: expected JSON lines"):
        list(texts_in([path]))
    with pytest.raises(TextError, match=r"none\.jsonl: expected"):
        list(texts_in([tmp_path / "none.jsonl"]))


def test_the_tokenizer_is_one_that_the_commands_read(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "apples and apples and pears"}\n' * 9)
    words = ["--output", str(tmp_path / "made"), "--vocab-size", "280", str(path)]
    monkeypatch.setattr("sys.argv", ["make_tokenizer.py", *words])
    main()
    made = load_tokenizer(tmp_path / "made")
    assert 256 + 6 < made.vocab_size <= 280
    assert "<|eot_id|>" in made.special_tokens
