import io
from pathlib import Path

import numpy as np

from mcore_sft.base.terminal import Console
from mcore_sft.data.report.show import coloured, length_chart
from mcore_sft.data.text.prompt import Example
from mcore_sft.data.text.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).parent.parent / "fixtures" / "tokenizer"


def test_styles_follow_spans_and_special_tokens():
    tokenizer = load_tokenizer(TOKENIZER)
    tokens = tokenizer.encode("<|begin_of_text|>ab<|eot_id|>")
    trained = np.array([[len(tokens) - 1, len(tokens)]], dtype=np.int32)
    text = coloured(Example(tokens=np.array(tokens, np.int32), spans=trained), tokenizer)
    assert text.plain == "<|begin_of_text|>ab<|eot_id|>"
    styles = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert styles == [("<|begin_of_text|>", "bold"), ("ab", "dim"), ("<|eot_id|>", "bold green")]


def test_control_characters_of_a_text_do_not_reach_the_terminal():
    tokenizer = load_tokenizer(TOKENIZER)
    tokens = np.array(tokenizer.encode("a\x1b[31m\x9b\r\n\tb"), dtype=np.int32)
    text = coloured(Example(tokens=tokens, spans=np.zeros((0, 2), np.int32)), tokenizer)
    assert text.plain == "a\\x1b[31m\\x9b\\r\n\tb"


def chart(*lengths):
    console = Console(file=io.StringIO(), width=100)
    console.print(length_chart(np.array(lengths, dtype=np.int32), "title"))
    return [line.split() for line in console.file.getvalue().splitlines()[2:]]


def test_chart_counts_every_example_once_in_steps_of_a_round_width():
    rows = chart(1, 5, 6, 60)
    assert rows[0][:5] == ["1", "to", "5", "2", "50.0%"]
    assert rows[1][:5] == ["6", "to", "10", "1", "25.0%"]
    assert rows[-1][:5] == ["56", "to", "60", "1", "25.0%"]
    assert [row[:5] for row in chart(1000)] == [["1,000", "to", "1,000", "1", "100.0%"]]
    assert [row[0] for row in chart(4001, 4095)][:2] == ["4,001", "4,011"]
