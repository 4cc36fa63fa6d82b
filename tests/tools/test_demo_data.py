import functools
import operator
import random
import re
from collections import Counter

import pytest

from tools.demo_data import (
    SPECIAL_TOKENS,
    TEMPLATES,
    add,
    compare,
    make_rows,
    multiply,
    subtract,
    texts_of,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def rows():
    return make_rows(train=2000, held_out=100, seed=7)


def numbers_of(row):
    return row["problem_source"], tuple(sorted(map(int, re.findall(r"\d+", row["problem"]))))


def test_working_goes_digit_by_digit():
    assert add(37, 73) == ("7+3=10, carry 1\n3+7+1=11\n", 110)
    assert subtract(83, 47) == ("13-7=6, borrow 1\n8-1-4=3\n", 36)
    assert multiply(47, 6) == ("7*6=42, carry 4\n4*6=24, 24+4=28\n", 282)
    assert compare(20, 45) == ("5-0=5, borrow 0\n4-0-2=2\n", 25)


def test_every_equation_of_the_working_holds(rows):
    combine = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    for row in rows[0]:
        for left, right in re.findall(r"([\d+*-]+)=(\d+)", row["generated_solution"]):
            terms = [int(term) for term in re.split(r"\D", left)]
            sign = next(mark for mark in left if not mark.isdigit())
            assert functools.reduce(combine[sign], terms) == int(right), row


def test_no_template_and_numbers_on_both_sides(rows):
    learned, held_out = rows
    assert not {numbers_of(row) for row in learned} & {numbers_of(row) for row in held_out}


def test_no_problem_twice_and_numbers_to_99(rows):
    problems = [row["problem"] for part in rows for row in part]
    assert len(set(problems)) == len(problems) == 2100
    assert max(number for row in rows[0] for number in numbers_of(row)[1]) <= 99


def test_every_template_has_its_equal_share_of_both_sides(rows):
    for part in rows:
        counts = Counter(row["problem_source"] for row in part)
        assert counts == {f"demo_{one.name}": len(part) // len(TEMPLATES) for one in TEMPLATES}


def test_rows_have_the_schema_of_openmathinstruct_2(rows):
    for row in rows[0]:
        assert list(row) == ["problem", "generated_solution", "expected_answer", "problem_source"]
        assert row["generated_solution"].endswith(f"\\boxed{{{row['expected_answer']}}}")


def test_same_seed_same_rows():
    assert make_rows(train=50, held_out=10, seed=3) == make_rows(train=50, held_out=10, seed=3)
    assert make_rows(train=50, held_out=10, seed=3) != make_rows(train=50, held_out=10, seed=4)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_answers_are_never_negative(template):
    chance = random.Random(0)
    answers = [template.solve(*template.draw(chance))[1] for _ in range(2000)]
    assert min(answers) > 0


def test_tokenizer_keeps_digits_apart_and_text_whole(rows):
    texts = list(texts_of(rows[0]))
    tokenizer = train_tokenizer(texts, vocab_size=375)
    assert tokenizer.get_vocab_size() == 375
    assert [tokenizer.id_to_token(i) for i in range(6)] == list(SPECIAL_TOKENS)
    assert tokenizer.encode("=110}").tokens == ["=", "1", "1", "0", "}"]
    for text in ("user", "assistant"):
        assert tokenizer.encode(text).tokens == [text]
    assert not [token for token in tokenizer.get_vocab() if len(re.findall(r"\d", token)) > 1]
    for text in (*texts[:20], "Zoë: ½ of 7\t\n\n 日本"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
