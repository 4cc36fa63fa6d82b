import re
import sys
import warnings

import pytest

from mcore_sft.data.selection.arithmetic import (
    _DIGITS,
    NotArithmetic,
    evaluate,
    has_wrong_equation,
    spell_out,
    steps,
)

TOWER = "9**9**9"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6", 6),
        (" 6", 6),
        ("6.", 6.0),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("-3 ** 2", -9),
        ("2 ** 3 ** 2", 512),
        ("2 ** -1", 0.5),
        ("7 // 2 + 7 / 2", 6.5),
        ("- -3", 3),
        ("10 -3 + 2", 9),
        ("(1 +\n2)", 3),
        ("10**400 / 10**399", 10.0),
    ],
)
def test_value(text, value):
    assert evaluate(text) == value
    assert type(evaluate(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "()",
            "1 +",
            "3 4",
            "007",
            "1,000",
            "5(3)",
            "(3)(4)",
            "1.2.3",
            "x",
            "2x",
            "1e5x",
        ),
        *("'a' * 9", "True", "1j", "f(3)", "3 if 1 else 2", "[3][0]", "a.b", "1 < 2", "not 3"),
        *("__import__('os')", "(lambda: 3)()", "~3", "7 % 2", "1 << 99", "inf", "٣", "²", "\0"),
        *(TOWER, "9**9**9**9", "2 ** 99999", "2.5 ** 99999", "(-8) ** 0.5", "10**400 + 0.5"),
        *("9" * 5000, "1" + " + 1" * 400, "(" * 300 + "3" + ")" * 300, "-" * 999 + "3"),
    ],
)
def test_no_value(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotArithmetic):
            evaluate(text)


def test_integers_have_so_many_bits_and_no_more():
    assert evaluate("2**2047 * 2**2047 * 2") == 2**4095
    with pytest.raises(NotArithmetic):
        evaluate("2**2047 * 2**2047 * 4")


def test_division_by_zero_has_its_own_error():
    for text in ("1 / 0", "1 // 0", "0 ** -1", "1 / (3 - 3)"):
        with pytest.raises(ZeroDivisionError):
            evaluate(text)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("7", ["7"]),
        ("1 + 2 + 3", ["1 + 2 + 3", "3 + 3", "6"]),
        ("3 * (1 + 7) / 4", ["3 * (1 + 7) / 4", "3 * 8 / 4", "24 / 4", "6"]),
        ("1 + 7 * 19", ["1 + 7 * 19", "1 + 133", "134"]),
        ("2 ** 3 ** 2", ["2 ** 3 ** 2", "8 ** 2", "64"]),
        ("2 * 3 ** 2", ["2 * 3 ** 2", "2 * 9", "18"]),
        ("-(3 + 4)", ["-(3 + 4)", "-7"]),
        ("2 * (1 / 100000)", ["2 * (1 / 100000)", "2 * 1e-05", "2 * -5", "-10"]),
    ],
)
def test_steps(expression, expected):
    assert steps(expression) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "10 -3 + 2",
        "(5)",
        "(2) + 3",
        "+ 3 - 2",
        "1 / 0 + 2",
        "2) + (3",
        "(2 + 3",
        "9**999 + 1",
        "- - 3",
    ],
)
def test_steps_that_come_to_no_end(expression):
    with pytest.raises(NotArithmetic):
        steps(expression)


@pytest.mark.parametrize(
    ("text", "by_nemo_skills", "by_itself"),
    [
        ("1 + 2 + 3 + 4 = 10", False, False),
        ("1 + 2 + 3 + 4 = 11", True, True),
        ("3 * (1 + 7) / 4 = 3 * 8 / 4 = 100", True, True),
        ("0.1 + 0.2 + 0.3 = 0.6", False, False),
        ("10 / 3 + 0 = 3.3333", False, False),
        ("10 / 3 + 0 = 3.33", True, True),
        ("-3 + 5 - 4 = -2", False, False),
        ("(-3) * (5 - 4) = -3", False, False),
        ("1 + 2 - 3 = 0", False, False),
        ("He pays 2 * 3 + 4 = 11 dollars.", True, True),
        ("It is (2 * 3 + 4 = 10).", False, False),
        ("It is (2 * 3 + 4 = 11).", False, True),
        (r"\( 2 * 3 + 4 = 11 \)", False, True),
        (r"$2 * 3 + 4 = 11$", True, True),
        # One operator is no arithmetic, and neither is a text without a number or an equation.
        ("1 + 2 = 4", False, False),
        ("1 + 2 + 3", False, False),
        ("= = =", False, False),
        ("", False, False),
        ("a - b - c = d", False, False),
        # NeMo-Skills compares the first side with the last.
        ("2 + 3 - 1 = 5 = 4", False, True),
        # It passes over what it cannot solve.
        ("5 / 0 - 1 = 7", False, True),
        ("5 + 3 + 1 = 2(4)", False, False),
        ("10 -3 + 2 = 5", False, True),
        # Its powers bind to the left, so that it can solve this one.
        (f"1 + 2 + {TOWER} = 5", True, False),
        (f"{TOWER} + 1 + 1 = 5", True, False),
        (f"1 + 2 + 3 = {TOWER}", False, False),
        # It goes on over the end of a line.
        ("3 + 4 + 1 = 8\n8 - 2 - 1 = 5", True, False),
        # A point after a space is left out, so that .5 is 5.
        ("1 + .5 + 2 = 3.5", True, False),
        # What stands around an equation is not seen.
        ("1,000 + 2 + 3 = 1,005", True, False),
        ("x(3 + 4) - 2 = 10", True, False),
        ("x -3 + 4 = 10", True, False),
        ("x * 3 + 4 + 5 = 10", False, False),
        ("2 \N{MULTIPLICATION SIGN} 3 + 4 + 5 = 15", True, False),
        (r"2 \times 3 + 4 + 5 = 15", True, False),
        ("5/5 \N{EN DASH} 1/5 + 1/5 = 1", True, False),
        (r"\frac{1}{2} - 3 + 5 = 2.5", False, False),
        ("3 + 4 + 5 = 12x", False, False),
        ("3 + 4 + 5 = 6x", True, False),
        (r"3 + 4 + 5 = 2 \cdot 6", True, False),
        ("3 + 4 + 5 = 6 x 2", True, False),
        ("20 + 20 + 10 = 50%", False, False),
        ("1 + 1 + 1 = 300%", True, False),
        ("3 + 4 + 5 = 2^3 + 4", True, False),
        ("f(3) + 4 + 5 = 12", False, False),
        # Digits that are no numbers.
        ("3\N{SUPERSCRIPT TWO} + 4\N{SUPERSCRIPT TWO} - 2 = 23", True, False),
        ("\N{ARABIC-INDIC DIGIT THREE} + 1 + 1 = 7", True, False),
    ],
)
def test_wrong_equation(text, by_nemo_skills, by_itself):
    assert has_wrong_equation(text) is by_nemo_skills
    assert has_wrong_equation(text, standalone=True) is by_itself


@pytest.mark.parametrize(
    ("text", "by_nemo_skills", "by_itself"),
    [
        ("1 + 2 + 3 + 4 = 10", "1 + 2 + 3 + 4 = 3 + 3 + 4 = 6 + 4 = 10", ...),
        ("so 1 + 7 * 19 = 134 apples", "so 1 + 7 * 19 = 1 + 133 = 134 apples", ...),
        ("3 * (1 + 7) / 4 = 6", "3 * (1 + 7) / 4 = 3 * 8 / 4 = 24 / 4 = 6", ...),
        ("1+2+3=6", "1+2+3 = 3+3 = 6", ...),
        ("5 - 8 + 2 = -1", "5 - 8 + 2 = (-3) + 2 = -1", "5 - 8 + 2 = -3 + 2 = -1"),
        (
            "2 * (3 - 5) * 2 = -8",
            "2 * (3 - 5) * 2 = 2 * (-2) * 2 = (-4) * 2 = -8",
            "2 * (3 - 5) * 2 = 2 * (-2) * 2 = -4 * 2 = -8",
        ),
        ("1 + 2 + 3 = 6. So", "1 + 2 + 3 = 3 + 3 = 6 So", "1 + 2 + 3 = 3 + 3 = 6. So"),
        # Nothing to do: wrong, a chain already, one operator, not solvable, none at all.
        ("1 + 2 + 3 = 7", "1 + 2 + 3 = 7", ...),
        ("1 + 2 + 3 = 3 + 3 = 6", "1 + 2 + 3 = 3 + 3 = 6", ...),
        ("1 + 2 = 3", "1 + 2 = 3", ...),
        ("1 / 0 + 2 = 3", "1 / 0 + 2 = 3", ...),
        ("", "", ...),
        ("none", "none", ...),
        # NeMo-Skills loses the right side, joins lines, repeats itself, and writes what
        # nobody would.
        ("1 + 2 + 3 = 2 * 3", "1 + 2 + 3 = 3 + 3 = 6", "1 + 2 + 3 = 2 * 3"),
        ("1 + 2\n+ 3 = 6", "1 + 2 + 3 = 3 + 3 = 6", "1 + 2\n+ 3 = 6"),
        (
            "1 + 2 + 3 = 6 . So",
            "1 + 2 + 3 = 3 + 3 = 61 + 2 + 3 = 3 + 3 = 6 . So",
            "1 + 2 + 3 = 3 + 3 = 6 . So",
        ),
        (
            "0.1 + 0.2 + 0.7 = 1",
            "0.1 + 0.2 + 0.7 = 0.30000000000000004 + 0.7 = 1",
            "0.1 + 0.2 + 0.7 = 1",
        ),
        ("1 + 2 . + 3 = 6", "1 + 21 + 2 + 3 = 3 + 3 = 66", "1 + 2 . + 3 = 6"),
        ("x + 1 + 2 + 3 = 6", "x + 1 + 2 + 3 = 6", ...),
        ("x(1 + 2) + 3 = 6", "x(1 + 2) + 3 = 3 + 3 = 6", "x(1 + 2) + 3 = 6"),
        ("a\n1 + 2 + 3 = 6\nb", "a\n1 + 2 + 3 = 3 + 3 = 6\nb", ...),
    ],
)
def test_spell_out(text, by_nemo_skills, by_itself):
    assert spell_out(text) == by_nemo_skills
    assert spell_out(text, standalone=True) == (by_nemo_skills if by_itself is ... else by_itself)


WRONG = "1 + 2 + 3 = 7"


@pytest.mark.parametrize(
    "before", ["= ", "= 0; ", "1 = 1; ", "2^1 + 2 + 3 = 5; ", "1 + 2 + 3 = 3 + 3 = 6; "]
)
def test_what_stands_before_an_equation_hides_it_not(before):
    assert has_wrong_equation(before + WRONG, standalone=True)
    right = before + "1 + 2 + 3 = 6"
    assert spell_out(right, standalone=True) == before + "1 + 2 + 3 = 3 + 3 = 6"


def test_a_side_of_one_digit_between_two_signs():
    assert has_wrong_equation("x=5=2 + 2 + 2")
    assert has_wrong_equation("x=5=2 + 2 + 2", standalone=True)


def test_an_equation_in_brackets_keeps_them():
    assert spell_out("so (1 + 2 + 3 = 6)", standalone=True) == "so (1 + 2 + 3 = 3 + 3 = 6)"


def test_so_many_equations_are_looked_at():
    right = "1 + 1 + 1 = 3; "
    assert has_wrong_equation(right * 999 + WRONG)
    assert not has_wrong_equation(right * 1000 + WRONG)


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize(
    "text",
    ["1 + " * 100_000 + "1 = 2", "1 + 1 + 1 = 4 x " * 50_000, "(" * 200_000 + "=", "=" * 9999],
)
def test_a_long_text_comes_to_an_end(text, standalone):
    has_wrong_equation(text, standalone=standalone)
    spell_out(text, standalone=standalone)


def test_digits_are_those_of_isdigit():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert "".join(re.findall(f"[{_DIGITS}]", everything)) == "".join(
        filter(str.isdigit, everything)
    )
