import time

import pytest

from mcore_sft.config import Policy
from mcore_sft.evaluation.extract import extract, last_box, stated


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\left\{x \mid x > 1\right.}", r"\left\{x \mid x > 1\right."),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"\boxed{ \boxed{5} }", r"\boxed{5}"),
        (r"\boxed{open, \boxed{5}", "5"),
        (r"\fbox{3}", "3"),
        (r"= \\boxed{\\frac{1}{2}}", r"\\frac{1}{2}"),
        (r"a } b { \boxed{4}", "4"),
    ],
)
def test_last_complete_box(response: str, answer: str) -> None:
    assert extract(response).answer == answer


@pytest.mark.parametrize(
    ("response", "truncated", "missing"),
    [
        ("the answer is 5", False, "no_box"),
        (r"\boxed 5", False, "no_box"),
        (r"\boxed{\frac{1}{2}", False, "unbalanced"),
        (r"\boxed{ }", False, "empty"),
        (r"so we add \boxed{", True, "truncated"),
        ("and then we", True, "truncated"),
    ],
)
def test_why_there_is_no_answer(response: str, truncated: bool, missing: str) -> None:
    found = extract(response, truncated=truncated)
    assert found.answer is None
    assert found.missing == missing


def test_a_box_counts_though_generation_was_cut_after_it() -> None:
    assert extract(r"\boxed{3} and so on and", truncated=True).answer == "3"


def test_boxes_that_differ_are_flagged() -> None:
    assert extract(r"\boxed{1} \boxed{2}").differing
    assert not extract(r"\boxed{x + 1} \boxed{x+1}").differing


@pytest.mark.parametrize(
    ("policy", "response", "answer"),
    [
        ("nemo_skills", r"\boxed{1} and \boxed{2}", "2"),
        ("nemo_skills", r"\boxed{1} and \boxed{2", None),
        ("nemo_skills", r"\boxed 5", None),
        ("nemo_skills", r"\fbox{5}", None),
        ("nemo_skills", r"\boxed{ }", " "),
        ("gsm8k", "so 1,234\n#### 1,234", "1234"),
        ("gsm8k", "#### 5\n#### $7.", "7"),
        ("gsm8k", r"\boxed{5}", None),
        ("final_answer", r"\boxed{7}. The answer is 8.", "8"),
        ("final_answer", r"The answer is 8, no, \boxed{7}.", "7"),
        ("final_answer", "Final Answer: The final answer is $x+1$. I hope it is correct.", "x+1"),
        ("final_answer", "Final Answer: 14/3", "14/3"),
        ("final_answer", "#### 5", "5"),
        ("final_answer", "so $2x = 8$ and $x = 4$.", "4"),
        ("final_answer", "They have 12 apples in all.", "12"),
        ("final_answer", "answer = f(3)\nprint(answer)", None),
        # cut off in the middle of a sum, whose last number says nothing
        ("final_answer", "1 + 2 + 3 +", None),
    ],
)
def test_policies(policy: Policy, response: str, answer: str | None) -> None:
    assert extract(response, policy=policy).answer == answer


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("42", "42"),
        ("The answer is 4", "4"),
        ("Final answer: 42", "42"),
        (r"Therefore $\boxed{\frac94\pi}$.", r"\frac94\pi"),
        (r"$\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$", "(2, 2), (6, 2)"),
        (r"$y_1 = \boxed{x}$ and $y_2 = \boxed{2x}$", "x, 2x"),
        (r"first \boxed{1}. Then we see that it is \boxed{2}", "2"),
        ("We find that $x \\neq 3$.", r"x \neq 3"),
        ("The result is $3$", "3"),
        ("odd $n$", "odd $n$"),
        (r"\text{all real }x", r"\text{all real }x"),
    ],
)
def test_what_an_answer_states(written: str, meant: str) -> None:
    assert stated(written) == meant


@pytest.mark.parametrize("policy", ["last_box", "nemo_skills", "gsm8k", "final_answer"])
@pytest.mark.parametrize(
    "piece",
    ["\\", "$", r"\(", "{", "}", r"\boxed{", "answer is ", "1", " ", "####", "\n", "$a$ and "],
)
def test_a_megabyte_of_anything_takes_no_time(policy: Policy, piece: str) -> None:
    response = piece * (1_000_000 // len(piece))
    start = time.monotonic()
    extract(response, policy=policy)
    stated(response)
    # a few seconds where the machine is slow; a quadratic search takes hours
    assert time.monotonic() - start < 20


def test_an_opened_box_is_no_box() -> None:
    assert last_box(r"\boxed{" * 3) is None
