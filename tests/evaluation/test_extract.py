import time

import pytest

from mcore_sft.config import Policy
from mcore_sft.evaluation.grading.extract.extract import extract, last_box, stated


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


@pytest.mark.parametrize("policy", ["last_box", "nemo_skills"])
@pytest.mark.parametrize("response", [r"\boxed{}", r"so \boxed{ }", r"\boxed{5} \boxed{}"])
def test_an_empty_box_is_no_answer(policy: Policy, response: str) -> None:
    found = extract(response, policy=policy)
    assert (found.answer, found.missing) == (None, "empty")


@pytest.mark.parametrize("policy", ["last_box", "gsm8k", "final_answer"])
@pytest.mark.parametrize("response", [r"\boxed{3} and so on and", "#### 3", "The answer is 3."])
def test_a_response_that_was_cut_has_no_answer(policy: Policy, response: str) -> None:
    found = extract(response, policy=policy, truncated=True)
    assert (found.answer, found.missing) == (None, "truncated")


def test_other_tools_take_what_stands_there_where_generation_was_cut() -> None:
    response = r"\boxed{3} and so on and"
    assert extract(response, policy="nemo_skills", truncated=True).answer == "3"
    assert extract(response, policy="nemo_rl", truncated=True).answer == response


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"<think> maybe \boxed{3} </think> It is \boxed{4}", "4"),
        (r"maybe \boxed{3} </think> It is \boxed{4}", "4"),
        (r"<think> maybe \boxed{3} </think> It is 4.", None),
        (r"<think> a </think> \boxed{3} <think> b </think> no", None),
        (r"<think> maybe \boxed{3}", None),
    ],
)
def test_what_a_model_thinks_is_not_its_answer(response: str, answer: str | None) -> None:
    assert extract(response).answer == answer


def test_other_tools_read_what_a_model_thinks() -> None:
    response = r"<think> maybe \boxed{3} </think> It is 4."
    assert extract(response, policy="nemo_skills").answer == "3"
    assert extract(response, policy="nemo_rl").answer == response


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so $x = -\boxed{5}$", "-5"),
        (r"-\boxed{5}", "-5"),
        ("x = \N{MINUS SIGN}\\boxed{7}", "-7"),
        (r"= - \boxed{\frac12}", r"-\frac12"),
        (r"The answer is $-$\boxed{3}", "-3"),
        (r"The answer is minus \boxed{3}", "-3"),
        (r"\[ -\boxed{3} \]", "-3"),
        (r"\pm\boxed{3}", r"\pm 3"),
        (r"thus -\boxed{a+b}", "-(a+b)"),
        # taken from something, or a dash of a list
        (r"7 - \boxed{3}", "3"),
        (r"$x - \boxed{3}$", "3"),
        (r"(a+b)-\boxed{3}", "3"),
        ("Steps:\n- \\boxed{3}", "3"),
        (r"+\boxed{5}", "5"),
    ],
)
def test_a_sign_before_the_box_counts(response: str, answer: str) -> None:
    assert extract(response).answer == answer


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
        ("gsm8k", "so 1,234\n#### 1,234", "1234"),
        ("gsm8k", "#### 5\n#### $7.", "7"),
        ("gsm8k", r"\boxed{5}", None),
        ("gsm8k", "#### 72 apples", "72"),
        ("gsm8k", "#### $1,234.50", "1234.50"),
        ("gsm8k", "#### -$1,234,567 in all", "-1234567"),
        ("gsm8k", r"#### \$-5", "-5"),
        ("gsm8k", "#### \N{MINUS SIGN}5", "-5"),
        ("gsm8k", "#### -3/4", "-3/4"),
        ("gsm8k", "#### 2 1/2 cups", "2 1/2"),
        ("gsm8k", r"#### $\frac{3}{4}$ of it", r"\frac{3}{4}"),
        ("gsm8k", "#### .5", ".5"),
        ("gsm8k", "#### 5%", "5"),
        ("gsm8k", "#### 5 million", "5"),
        # as lm-eval has them
        ("gsm8k", "#### 1,2", "1,2"),
        ("gsm8k", "#### 10-5", "10"),
        ("gsm8k", "#### x = 7", "7"),
        ("gsm8k", "#### It is 7 - 2", "7"),
        ("gsm8k", "####8", "8"),
        ("gsm8k", "#### none", "none"),
        ("final_answer", r"\boxed{7}. The answer is 8.", "8"),
        ("final_answer", r"The answer is 8, no, \boxed{7}.", "7"),
        ("final_answer", "The answer is x = 5, because 2 is prime.", "x = 5"),
        ("final_answer", "The answer is 5, which is the number of apples.", "5"),
        ("final_answer", "The answer is $5$, since $6$ is even.", "5"),
        ("final_answer", "The answer is therefore $12$.", "12"),
        ("final_answer", "The answer is thus, simply, 12.", "12"),
        ("final_answer", "The answer is the number $12$.", "12"),
        ("final_answer", "The answer is $7$ or more.", "$7$ or more"),
        ("final_answer", "The answer is not $7$.", "not $7$"),
        ("final_answer", r"\boxed{5}. The answer is as above.", "5"),
        ("final_answer", r"It is \boxed{5}; the answer is boxed above", "5"),
        ("final_answer", r"\boxed{5} The answer is the length that we were looking for.", "5"),
        ("final_answer", "The answer is 5. My answer is correct.", "5"),
        ("final_answer", r"\boxed{5}. The answer is no solution.", "no solution"),
        ("final_answer", r"\boxed{5}. The answer is Monday.", "Monday"),
        ("final_answer", r"\boxed{5}. The answer is x + y - z - 2w.", "x + y - z - 2w"),
        (
            "final_answer",
            "The answer is the set of all positive reals.",
            "the set of all positive reals",
        ),
        ("final_answer", "Final Answer: The final answer is $x+1$. I hope it is correct.", "x+1"),
        ("final_answer", "Final Answer: 14/3", "14/3"),
        ("final_answer", "#### 5", "5"),
        ("final_answer", "so $2x = 8$ and $x = 4$.", "4"),
        ("final_answer", "They have 12 apples in all.", "12"),
        ("final_answer", "answer = f(3)\nprint(answer)", None),
        ("final_answer", "So $x = 42$.\n\n**42**", "42"),
        ("final_answer", "So it is **42**.", "42"),
        ("final_answer", "Work.\n\n**Answer:** 42", "42"),
        ("final_answer", "Work.\n\n## Final Answer\n\n**42**", "42"),
        ("final_answer", "Thus\n\\[\nx = \\frac{3}{4}.\n\\]", r"\frac{3}{4}"),
        ("final_answer", "Work.\n\n$$\n\\frac{3}{4}\n$$", r"\frac{3}{4}"),
        (
            "final_answer",
            "So\n\\[\n\\begin{aligned}\nx &= 3+2 \\\\\n&= 5.\n\\end{aligned}\n\\]",
            "5",
        ),
        ("final_answer", "So\n\\begin{align*}\nx &= 5\n\\end{align*}", "5"),
        ("final_answer", "Hence $x = 2$ or $x = 3$.", "2, 3"),
        ("final_answer", "There are 42 in total \N{PARTY POPPER}", "42"),
        ("final_answer", "<answer>42</answer>", "42"),
        ("final_answer", r"The answer is 41. <answer> \boxed{42} </answer>", "42"),
        ("final_answer", "The answer is 42, not 43.", "42"),
        ("final_answer", "The answer is 42 rather than 43.", "42"),
        ("final_answer", "So, there are 42 in total! \N{PARTY POPPER}", "42"),
        ("final_answer", "So 42.\n\nI hope this helps!", "42"),
        ("final_answer", "The correct option is C.", "C"),
        ("final_answer", "Option B is correct.", "B"),
        ("final_answer", "I choose D.", "D"),
        ("final_answer", "The point is (1, 2).", "(1, 2)"),
        ("final_answer", "So the interval is [1, 2).", "[1, 2)"),
        ("final_answer", "The ratio is 3:4.", "3:4"),
        ("final_answer", "So the roots are 2 and 3.", "2, 3"),
        ("final_answer", "So the solutions are $2$ and $3$.", "2, 3"),
        # a number that is part of an expression is not the answer
        ("final_answer", "There are 2^{10}.", "2^{10}"),
        ("final_answer", r"So it equals 2\sqrt{3}.", r"2\sqrt{3}"),
        ("final_answer", "This is x + 3.", "x + 3"),
        ("final_answer", "So he has 12 - 5 = 7 apples.", "7"),
        ("final_answer", "So 3/10 = 30%.", "30%"),
        ("final_answer", "See step (3), which gives 8.", "8"),
        ("final_answer", "The answer is not 43 but 42.", "42"),
        # a dash between words and a box is no sign
        ("last_box", r"The answer - \boxed{5}", "5"),
        ("last_box", r"The answer is - \boxed{5}", "-5"),
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
        (r"\boxed{4}, \boxed{4}", "4"),
    ],
)
def test_what_an_answer_states(written: str, meant: str) -> None:
    assert stated(written) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\boxed{12} million", "12 million"),
        ("It is $12$ million.", "12 million"),
        ("The answer is $12$ million", "$12$ million"),
        (r"$\boxed{7}$ or more", "7 or more"),
        (r"\boxed{7}, at least", "7, at least"),
        (r"\boxed{7} more than $x$", r"7 more than x"),
        (r"\boxed{4} is wrong", "4 is wrong"),
        (r"$\boxed{3}^2$", "3^2"),
        (r"\boxed{3}*4", "3*4"),
        (r"\boxed{5}{,}000", "5{,}000"),
        (r"\boxed{3} to 1", "3 to 1"),
        (r"\boxed{2} times 3", "2 times 3"),
        # what tells the unit or the matter changes nothing
        (r"\boxed{7} cm", "7"),
        (r"$\boxed{30}^\circ$", "30"),
        (r"\boxed{5} times a day", "5"),
        (r"\boxed{2} 3-digit numbers", "2"),
        (r"\boxed{4} \pmod{7}", "4"),
        (r"\boxed{5}, not 6", "5"),
        (r"\boxed{16} squared units", "16"),
        (r"\boxed{7}. More than 6 are left", "7"),
        ("It is $7.$ More than 6 are left", "7"),
    ],
)
def test_words_behind_an_answer_stay_where_they_change_it(written: str, meant: str) -> None:
    assert stated(written) == meant


@pytest.mark.parametrize(
    "written",
    [
        "$7$ or more",
        "at least $5$",
        "It is at least $5$",
        "It is not $5$",
        "It cannot be $5$",
        r"not \boxed{3}",
        r"It is not equal to \boxed{3}",
        r"it isn't \boxed{3}",
        r"At least $\boxed{3}$",
        r"more than \boxed{3}",
        r"minus \boxed{3}",
        r"$-\boxed{3}$",
        r"-$\boxed{3}$",
        r"$x - \boxed{3}$",
        r"3\boxed{4}",
        r"$3 \cdot \boxed{4}$",
        r"$x \ne \boxed{4}$",
        r"3 * \boxed{4}",
        r"x*\boxed{4}",
        r"\boxed{3}+\boxed{4}",
    ],
)
def test_an_answer_stays_whole_where_words_before_change_it(written: str) -> None:
    assert stated(written) == written


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("The length is $5$ cm and the width is $6$ cm", "5, 6"),
        (r"The length is \boxed{5} cm and the width is \boxed{6} cm", "5, 6"),
        (r"\boxed{3}, or rather \boxed{4}", "3, 4"),
        # one names the other, is a reason, or ends its sentence
        ("so $x$ is $5$ or $6$", "5, 6"),
        ("the domain of $f(x)$ in $R$ is $19$", "19"),
        ("Since $2x = 8$, it follows that $x$ is $4$", "4"),
        ("we have $5$ and $6$, so $7$", "7"),
        ("There are $5.$ The rest is $6$", "6"),
        (r"we must solve at least \boxed{16} of them", "16"),
        (r"\boxed{12} = \boxed{12.0}", "12.0"),
        (r"- \boxed{3}", "3"),
        (r"**\boxed{3}**", "3"),
        (r"so *\boxed{3}* apples", "3"),
        (r"\text{The answer is }5", "5"),
        ("The answer is as above", "The answer is as above"),
    ],
)
def test_formulas_that_stand_apart(written: str, meant: str) -> None:
    assert stated(written) == meant


@pytest.mark.parametrize("policy", ["last_box", "nemo_skills", "gsm8k", "final_answer"])
@pytest.mark.parametrize(
    "piece",
    [
        *("\\", "$", r"\(", "{", "}", r"\boxed{", "answer is ", "1", " ", "####", "\n", "$a$ and "),
        *(
            r"\boxed{1} x ",
            "answer is as ",
            "answer is\n",
            "as ",
            "-",
            "1 ",
            "1,",
            "because ",
            "so ",
        ),
    ],
)
def test_a_long_text_of_anything_takes_no_time(policy: Policy, piece: str) -> None:
    response = piece * (300_000 // len(piece))
    start = time.monotonic()
    for text in {
        response,
        {"gsm8k": "#### ", "final_answer": "answer is "}.get(policy, "") + response,
    }:
        extract(text, policy=policy)
        if policy == "final_answer":
            stated(text)
    # a few seconds where the machine is slow; a quadratic search takes hours
    assert time.monotonic() - start < 20


def test_an_opened_box_is_no_box() -> None:
    assert last_box(r"\boxed{" * 3) is None
