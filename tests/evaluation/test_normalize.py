import time

import pytest

from mcore_sft.evaluation.grading.read.normalize import normalize


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\frac 34", r"\frac{3}{4}"),
        (r"$\boxed{5}$.", "5"),
        ("**17**", "17"),
        (r"12,\!345", "12345"),
        ("12{,}345", "12345"),
        ("1,234,567", "1234567"),
        ("(1,234)", "(1,234)"),
        ("5\N{DEGREE SIGN}", "5"),
        (r"90^\circ", "90"),
        (r"672\text{ cm}^2", "672"),
        ("40 feet", "40"),
        ("64 square feet", "64"),
        (r"\$36", "36"),
        ("m+2", "m+2"),
        ("2m", "2m"),
        ("9c + 6", "9c + 6"),
        (r"1\frac23", r"\frac{5}{3}"),
        ("11 5/6", r"\frac{71}{6}"),
        ("\N{SQUARE ROOT}10", r"\sqrt{10}"),
        ("2*sqrt(5)", r"2 \sqrt{5}"),
        (r"204_{\text{5}}", "204_{5}"),
        ("2516_8", "2516_{8}"),
        (".43", ".43"),
        ("3.", "3"),
        (r"\text{even}", "even"),
        (r"3 \text{ and } 5", "3, 5"),
        (r"x \approx 5", "5"),
        (r"\frac{1}{3} \approx 0.33", r"\frac{1}{3}"),
        ("28 pct", r"28\%"),
        (r"\approx 3", "3"),
        ("2.5 million dollars", "2500000"),
        ("36,000,", "36000"),
        ("3 283/999", r"\frac{3280}{999}"),
        ("3/4 of the pizza", "3/4"),
        ("5 in", "5"),
        (r"\frac12 mile", r"\frac{1}{2}"),
        (r"\pi\text{ units}", r"\pi"),
        (r"{\color{red}(1,2)}", "(1,2)"),
        ("0.1212...", r"0.\overline{12}"),
        ("6'", "6"),
        ("x'", "x'"),
        (r"\sin 30^\circ", r"\sin 30^\circ"),
        (r"\{x : 0 < x < 1\}", "0 < x < 1"),
        ("]0,1]", "(0,1]"),
        ("[0,1[", "[0,1)"),
        (r"[0,1] \cup [2,3]", r"[0,1] \cup [2,3]"),
        (r"\\frac{1}{4}", r"\frac{1}{4}"),
    ],
)
def test_spelling(written: str, canonical: str) -> None:
    assert normalize(written) == canonical


def test_a_matrix_keeps_its_rows() -> None:
    canonical = normalize(r"\begin{bmatrix} 1 \\ -2 \end{bmatrix}")
    assert canonical == r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}"


@pytest.mark.parametrize(
    "piece", ["1 ", r"\frac{", r"\text{a} ", "1,111", "cm ", "x=", r"\sqrt ", "_"]
)
def test_no_text_takes_long(piece: str) -> None:
    start = time.monotonic()
    normalize(piece * (2000 // len(piece)))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "answer",
    ["5 tenths", "12 squared", "5 minus two", "3 halves", "5 dollars more than six"],
)
def test_words_that_change_a_number_stay(answer: str) -> None:
    assert normalize(answer) == answer
