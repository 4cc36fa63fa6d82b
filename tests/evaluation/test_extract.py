import time

import pytest

from mcore_sft.evaluation.extract import extract, last_box


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


def test_a_megabyte_of_opened_boxes_takes_no_time() -> None:
    start = time.monotonic()
    assert last_box(r"\boxed{" * 150_000) is None
    assert time.monotonic() - start < 5
