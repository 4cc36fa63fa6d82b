import time

import pytest

from mcore_sft.evaluation.grading.read.latex import group_end, with_braces


@pytest.mark.parametrize(
    ("written", "braced"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac 1 2", r"\frac{1}{2}"),
        (r"\frac xy", r"\frac{x}{y}"),
        (r"\frac1x+1", r"\frac{1}{x}+1"),
        (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"),
        (r"\frac\sqrt32", r"\frac{\sqrt{3}}{2}"),
        (r"\frac\pi{12}", r"\frac{\pi}{12}"),
        (r"\frac2\pi", r"\frac{2}{\pi}"),
        (r"\frac{1}{x}14", r"\frac{1}{x}14"),
        (r"\frac15 \begin{pmatrix}", r"\frac{1}{5} \begin{pmatrix}"),
        (r"\frac{\frac12}3", r"\frac{\frac{1}{2}}{3}"),
        (r"\sqrt\pi", r"\sqrt{\pi}"),
        (r"\sqrt\frac12", r"\sqrt{\frac{1}{2}}"),
        (r"\sqrt12", r"\sqrt{12}"),
        (r"\sqrt[3]{xy}", r"\sqrt[3]{xy}"),
        (r"\sqrt [3] 8", r"\sqrt[3]{8}"),
        (r"\sqrt(2)", r"\sqrt(2)"),
        (r"\binom52", r"\binom{5}{2}"),
        (r"\{\frac12\}", r"\{\frac{1}{2}\}"),
        # nothing to brace, or no argument
        (r"\fraction12", r"\fraction12"),
        (r"\frac1", r"\frac1"),
        (r"\frac{1", r"\frac{1"),
        (r"{\frac1}2", r"{\frac1}2"),
    ],
)
def test_arguments_get_braces(written: str, braced: str) -> None:
    assert with_braces(written) == braced


def test_a_group_ends_at_its_own_brace() -> None:
    assert group_end(r"a{b{c}\}}d", 1) == 9
    assert group_end("{a", 0) == -1


@pytest.mark.parametrize("piece", [r"\sqrt{", r"\sqrt", r"\frac", r"\frac{", "{", r"\frac1"])
def test_no_text_takes_long_or_deep(piece: str) -> None:
    start = time.monotonic()
    with_braces(piece * 1000 + "1" + "}" * 1000)
    assert time.monotonic() - start < 5
