import time

import pytest

from mcore_sft.evaluation.grading.compare.equivalence import judge, judge_exactly
from mcore_sft.evaluation.grading.extract.extract import stated
from tests.evaluation.pairs import DIFFERENT, EQUAL

EQUAL_EXACTLY = [
    ("42", "42.0"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    (r"-\frac{4}{3}", r"\frac{-4}{3}"),
    (r"\frac{8}{5}", r"1\frac{3}{5}"),
    ("12345", "12,345"),
    ("0.43", ".43"),
    (r"\frac{1}{3}", "0.333333"),
    (r"\frac{2}{3}", "0.6666667"),
    ("28", r"28\%"),
    ("0.335", r"33.5\%"),
    ("204_5", r"204_{\text{5}}"),
    ("204_5", "204"),
    (r"\text{(C)}", "C"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{4:30 p.m.}", r"4:30 \text{ p.m.}"),
    ("(1, 2)", r"\left(1,2\right)"),
    ("(6,7)", "x=6, y=7"),
    ("3, 5, 7", "3, 7, 5"),
    ("-1,2", "x = 2 or x = -1"),
    ("2", "x = 2"),
    ("[-2,7]", r"x \in [-2,7]"),
    ("90", "90^{\\circ}"),
    (r"\frac{7}{15}", r"0.4\overline{6}"),
    (r"0.\bar{3}", "1/3"),
    ("10", "ten"),
    ("5000000", "5 million"),
    ("7", r"7^\text{th}"),
    ("12", "12 m/s"),
    ("12!", "12! ways"),
    ("3", "3=x"),
    ("5", "AB=CD=5"),
    ("8", "8=8"),
    ("C", r"\text{(C) } 5"),
    ("12", r"\textbf{(B)}\ 12"),
    ("(1,2,3)", "x=1, z=3, y=2"),
    ("(a,b)=(1,2)", "b=2, a=1"),
    ("m=2, b=3", "2,3"),
    ("100, 200", "200,100"),
    ("144,169", "144, 169"),
    ("1 000 000", "1000000"),
    ("12_{10}", "12"),
    ("12", "12_{10}"),
    ("BC_{16}", "bc_{16}"),
    ("(0,1)", "]0,1["),
    (r"(-\infty,2)\cup(3,\infty)", r"]3,\infty[ \cup ]-\infty,2["),
    ("(3,5)", r"\langle 3,5 \rangle"),
    (r"\{(1,2)\}", "(1,2)"),
    (r"\text{no solution}", r"\emptyset"),
    (r"\text{ellipse}", "an ellipse"),
    (r"\cos 58^\circ", r"\cos 58"),
    (r"\cos 36^\circ", r"\cos(36)"),
    (r"\pm 3", "3, -3"),
    (r"(\pm 1, 2)", "(1,2), (-1,2)"),
    ("2,3", "x_1 = 3, x_2 = 2"),
    ("10", r"x = 10 \text{ cm}"),
    ("10", "f(-3) = 10"),
    (r"\frac12", r"P(X > 3) = \frac12"),
    (r"\frac13", "0.333..."),
    ("-5", "negative five"),
    ("25", "twenty-five"),
    (r"\frac34", "three quarters"),
    (r"\frac12", "1 out of 2"),
    ("3:5", r"3 \text{ to } 5"),
    ("2:4:6", "1:2:3"),
    (r"\text{Alice and Bob}", "Bob and Alice"),
    ("C", "option C"),
    ("(1,2)", "the point P(1, 2)"),
    ("(1,2)", r"\begin{cases}x=1\\y=2\end{cases}"),
    ("2,3", r"x=2 \lor x=3"),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>2"),
    ("[2,3]", r"x \ge 2 \text{ and } x \le 3"),
    ("1<x<2", "2>x>1"),
    (r"(-\infty,1)\cup(1,\infty)", r"x \ne 1"),
    (r"(-\infty,\infty)", r"\text{all real numbers}"),
    (r"[0,1)\cup[2,3]", r"[2,3] \cup [0,1)"),
]

DIFFERENT_EXACTLY = [
    ("42", "43"),
    ("42", "420"),
    (r"\frac{1}{3}", "0.333"),
    ("10000000000000000001", "10000000000000000000"),
    ("5", "5.001"),
    ("672", "6.72"),
    ("52_8", "52_7"),
    ("5", "5_7"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1,2,3)"),
    ("[0,1)", "[0,1]"),
    ("3, 5, 7", "3, 5"),
    (r"\text{east}", r"\text{west}"),
    (r"\text{odd}", "4"),
    ("5", "6=5"),
    ("5", "AB=6=5"),
    ("8", "3^2=8"),
    ("2", "2,2"),
    ("1, 1", "1"),
    ("x", "x, x"),
    (r"\{1,2\}", "(1,2)"),
    ("1,2", "(2,1)"),
    ("(1,2,3)", "a=1, c=2, b=3"),
    ("(a,b)=(1,2)", "b=1, a=2"),
    ("(2,5)", "y=2, x=5"),
    ("12", "(C) 13"),
    ("B", "(C) 12"),
    ("B", "(x+1)^2 = 7"),
    ("5", "5 million"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2]\cup[3,\infty)"),
    (r"(0,1)\cup(2,3)", r"(0,1)\cup(2,4)"),
    (r"(2,\infty)", "[1,2,3]"),
    (r"\pm 3", "3"),
    ("5-a", "5"),
    ("2/a", "2"),
    ("2", "2x_{1}"),
    ("10,000", "10, 0"),
    ("10000000000000", "10000000000001.0"),
    ("0.333", "0.333..."),
    ("3:4:5", "3:5:4"),
    ("0", "2x-6=0"),
    ("0", "2x-y+3=0"),
    ("5", "x-5=5"),
    (r"x<1 \text{ or } x>2", r"x<1 \text{ and } x>2"),
    (r"\{1,2\}", r"\{\{1\},\{2\}\}"),
    (r"\text{C, D}", "D, E"),
]

EQUAL_SYMBOLICALLY = [
    ("m+2", "2 + m"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    (r"7\pi", "7pi"),
    (r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}", r"\begin{bmatrix} \frac{1}{2} \\ 3 \end{bmatrix}"),
    (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}, 1 - \sqrt{19}"),
    ("y = 2x + 3", "y=3+2x"),
    (r"(-\infty, 1) \cup (1, \infty)", r"(-\infty,1)\cup(1,\infty)"),
    (r"(0,1)\cup[1,2)", "(0,2)"),
    ("y=2x+3", "2x-y+3=0"),
    ("2x-y+3=0", "y=2x+3"),
    ("x^2+y^2=4", "y^2+x^2-4=0"),
    ("8", "2^3=8"),
    ("120", "5! = 120"),
    ("xy=6", r"y=\frac{6}{x}"),
    ("5", "(2+i)(2-i)"),
    ("3", r"\log_2(8)"),
    ("abc", "cab"),
    (r"\ln 2", "ln 2"),
    (r"2\sin x", "2 sin(x)"),
    ("-1", "i^2"),
    ("y=2x+1", "2x+1=y"),
    ("120", r"{10 \choose 3}"),
    (r"\frac12", r"\sin 30^\circ"),
    (r"\frac{1\pm\sqrt5}{2}", r"\frac{1-\sqrt5}{2}, \frac{1+\sqrt5}{2}"),
    ("1", r"2(\frac12)"),
    ("0.5", "2^-1"),
    ("-2", r"\sqrt[3]{-8}"),
    ("9", "(-27)^{2/3}"),
    (r"\sqrt[3]{5-2x}", r"-\sqrt[3]{2x-5}"),
    (r"2\ln(x-3)", r"\ln((x-3)^2)"),
    (r"\frac{\sqrt{x-3}}{\sqrt{x-4}}", r"\sqrt{\frac{x-3}{x-4}}"),
]

DIFFERENT_SYMBOLICALLY = [
    ("2", "2m"),
    ("2k", "2w"),
    ("163", r"\pm 163"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("x^2+2x+1", "x^3+2x+1"),
    (r"2\sqrt{5}", r"2\sqrt{6}"),
    (r"8-i", "8+i"),
    ("163", "x > 163"),
    ("5", "5 at least"),
    ("12", "12 abc"),
    ("2", "2 sin theta"),
    ("5", "5 theta"),
    ("AB=5", "CD=5"),
    ("x_1=5", "x_2=5"),
    ("f(2)=5", "f(3)=5"),
    (r"\alpha=5", r"\beta=5"),
    ("x=5", "X=5"),
    ("f(x)=x^2", "f^{-1}(x)=x^2"),
    ("f'(x)=2x", "f(x)=2x"),
    ("xy=6", "x+y=6"),
    ("xy=6", "6"),
    (r"\frac{x}{y}=1", "xy=1"),
    (r"\sin x = 5", r"\cos x = 5"),
    ("2x+3y=6", "2x+3y=6.0000001"),
    ("2", r"x \not= 2"),
    ("HTH", "HHT"),
    ("23", "2(3)"),
    ("a_1=5, a_2=6", "a_2=5, a_1=6"),
    ("y'=2x", "y=2x"),
    ("P(A|B)=0.5", "P(B|A)=0.5"),
    (r"(-\infty,\infty)", r"x \ne 2, x \ne 3"),
    (r"[0,\infty)", r"x \ge 0, x > 4"),
    ("(1,2)", "x > 1 or x < 2"),
    ("5", "5 cm^{-1}"),
    ("101", "101 binary"),
    ("N!", "n!"),
    (r"2\pi", r"2\Pi"),
    ("1,2,3", "1,2,3,..."),
    (r"25-x", r"\sqrt{(x-25)^2}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"),
    ("x", "x!"),
    ("x", "x'"),
    ("N", "n"),
    ("62", "6'2''"),
    ("f(x)", "f x"),
    ("2^{-50}", "2^{-50}+2^{-70}"),
    (r"\sqrt{2}", r"\frac{1414213562}{1000000000}"),
    ("10^{100}", "10^{100}+1"),
    ("x", r"\sqrt{x^2}"),
    (r"\sqrt{x}", r"\sqrt{x}+10^{-20}"),
    (r"\ln(x+1)", r"\ln(x)+1"),
    ("y=2x+3", "2x+y+3=0"),
    (r"\frac12", r"\sin 30"),
    ("123", "12 3"),
]


@pytest.mark.parametrize(("gold", "prediction"), EQUAL_EXACTLY)
def test_equal_without_sympy(gold: str, prediction: str) -> None:
    verdict = judge_exactly(gold, prediction)
    assert verdict is not None
    assert verdict.outcome == "equal"


@pytest.mark.parametrize(("gold", "prediction"), DIFFERENT_EXACTLY)
def test_different_without_sympy(gold: str, prediction: str) -> None:
    verdict = judge_exactly(gold, prediction)
    assert verdict is not None
    assert verdict.outcome == "different"


@pytest.mark.parametrize(("gold", "prediction"), EQUAL_SYMBOLICALLY)
def test_equal_by_mathematics(gold: str, prediction: str) -> None:
    assert judge(gold, prediction).outcome == "equal"


@pytest.mark.parametrize(("gold", "prediction"), DIFFERENT_SYMBOLICALLY)
def test_different_by_mathematics(gold: str, prediction: str) -> None:
    assert judge(gold, prediction).outcome in {"different", "unparsable"}


@pytest.mark.parametrize("kind", EQUAL)
def test_equal_by_kind(kind: str) -> None:
    found = {pair: judge(*map(stated, pair)) for pair in EQUAL[kind]}
    assert {pair: verdict for pair, verdict in found.items() if not verdict.correct} == {}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_by_kind(kind: str) -> None:
    found = {pair: judge(*map(stated, pair)) for pair in DIFFERENT[kind]}
    wrong = ("equal", "timeout", "unsafe", "no_answer")
    assert {pair: verdict for pair, verdict in found.items() if verdict.outcome in wrong} == {}


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("2^{5000}", "(1+i)^{10000}"),
        (r"\frac{a}{bc}", "a/(bc)"),
        (r"3\sqrt[3]{2}", r"\sqrt[3]{54}"),
    ],
)
def test_what_needs_no_sympy(gold: str, prediction: str) -> None:
    verdict = judge_exactly(gold, prediction)
    assert verdict is not None
    assert verdict.correct


@pytest.mark.parametrize(
    "repeated",
    [
        "A. ",
        "in. ",
        " ft.",
        "a.",
        "cm ",
        "a/",
        "of ",
        "1,1",
        "'",
        "1!",
        "i+",
        "(1,",
        "-i",
        r"\frac",
        "not 1 or ",
        "5 cm ",
        "1\n",
        "=1",
    ],
)
def test_no_repetition_takes_long(repeated: str) -> None:
    start = time.monotonic()
    for text in (repeated * (400 // len(repeated)), "5" + repeated * 60 + " x"):
        judge_exactly("5", text)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("deep", ["{" * 190 + "x" + "}" * 190, "(" * 300 + "1" + ")" * 300])
def test_a_deep_gold_ends_nothing(deep: str) -> None:
    assert judge_exactly(deep, "5") is None or not judge_exactly(deep, "5").correct


def test_powers_side_by_side_are_no_tower() -> None:
    verdict = judge_exactly(r"\frac{2^{50}}{3^{50}}", r"\frac{2^{50}}{3^{50}}+10^{-20}")
    assert verdict is None or verdict.outcome != "unsafe"


def test_what_cannot_be_read_is_no_wrong_answer() -> None:
    assert judge("5", r"\frac{}{").outcome == "unparsable"


@pytest.mark.parametrize(
    ("prediction", "rule"),
    [
        ("9^{9^{9^9}}", "tower"),
        ("10^{10^{10}}", "tower"),
        (r"\left(10^{1000}\right)^{1000}", "tower"),
        ("{{2} ^ {9}} ^ {9 ^ 9}", "tower"),
        ("1000000000^{1000000000}", "exponent"),
        ("1000000000!", "factorial"),
        ("(" * 200 + "1" + ")" * 200, "nesting"),
        ("9" * 1500, "digits"),
        ("1+" * 2000 + "1", "length"),
    ],
)
def test_what_would_explode_is_never_parsed(prediction: str, rule: str) -> None:
    verdict = judge_exactly("5", prediction)
    assert verdict is not None
    assert (verdict.outcome, verdict.rule) == ("unsafe", rule)


def test_a_large_right_answer_is_right_as_text() -> None:
    verdict = judge_exactly("2024^{1000000}", "2024^{1000000}")
    assert verdict is not None
    assert verdict.correct
