r"""Two answers in, whether they mean the same out, with the rule that decided.

    gold, prediction  ->  canonical spelling  ->  exact rules  ->  (else) math-verify

The exact rules need no sympy, evaluate nothing and are quick on any short text. `symbolic` can take
forever or all memory on a hostile answer, so it is for a process that can be killed (`grade`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mcore_sft.evaluation.grading.compare import parts, scalars
from mcore_sft.evaluation.grading.compare.comparable import comparable, forms
from mcore_sft.evaluation.grading.compare.danger import MAX_LENGTH, danger
from mcore_sft.evaluation.grading.compare.symbolic import (
    Unreadable,
    prepare,
    rounds_exactly_to,
    same_meaning,
)
from mcore_sft.evaluation.grading.read.digits import agree_in_digits
from mcore_sft.evaluation.grading.read.normalize import squeeze
from mcore_sft.evaluation.grading.read.number import has_decimal, is_finite, last_half, rounded_half
from mcore_sft.evaluation.grading.read.signature import proportional, same_value, signature
from mcore_sft.evaluation.grading.read.value import agree, differ, rounds_to

GRADER = 2
"""Raised by whoever changes a verdict: scores of two versions are compared with a warning only."""

Outcome = Literal[
    "equal", "different", "no_answer", "unparsable", "timeout", "unsafe", "not_graded"
]
NOT_GRADED: Outcome = "not_graded"
"""Nothing is known of the answer: its grading was ended from outside. It is never counted."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was decided about one answer, and by which rule."""

    outcome: Outcome
    rule: str

    @property
    def correct(self) -> bool:
        """Whether the answer counts as right."""
        return self.outcome == "equal"


def verdict_of(same: bool, rule: str) -> Verdict:
    """Equal or different, as `rule` found."""
    return Verdict(outcome="equal" if same else "different", rule=rule)


def judge(gold: str, prediction: str) -> Verdict:
    """Decide by the exact rules, else symbolically. Only for a process that can be killed."""
    return judge_exactly(gold, prediction) or symbolic(gold, prediction)


def judge_exactly(gold: str, prediction: str) -> Verdict | None:
    """Decide without sympy; none where only symbolic mathematics can tell."""
    if not prediction.strip():
        return Verdict(outcome="no_answer", rule="empty")
    if len(prediction) <= MAX_LENGTH and squeeze(gold) == squeeze(prediction):
        return verdict_of(True, "same_text")
    if reason := danger(prediction):
        return Verdict(outcome="unsafe", rule=reason)
    return _judge(gold, prediction, _by_value)


def symbolic(gold: str, prediction: str) -> Verdict:
    """Decide by math-verify, both sides in a math environment. May hang: run it to be killed."""
    prepare()
    verdict = _judge(gold, prediction, _by_meaning)
    return verdict or Verdict(outcome="unparsable", rule="prediction")


# What decides a pair that no exact rule does; none where it cannot.
_Leaf = Callable[[str, str], Verdict | None]


def _judge(gold: str, prediction: str, leaf: _Leaf) -> Verdict | None:
    """The best verdict for any of the forms in which the gold answer is given."""
    verdicts = []
    for form in forms(gold):
        pair = comparable(form, prediction)
        verdicts.append(_decide(*pair, leaf) if pair else verdict_of(False, "unit"))
        if verdicts[-1] and verdicts[-1].correct:
            return verdicts[-1]
    return None if None in verdicts else verdicts[0]


_RULES = (
    ("base", scalars.by_base),
    ("number", scalars.by_number),
    ("clock", scalars.by_clock),
    ("residue", scalars.by_residue),
    ("text", scalars.by_text),
    ("chain", parts.by_chain),
    ("ratio", parts.by_ratio),
    ("relations", parts.by_relations),
    ("union", parts.by_union),
    ("matrix", parts.by_entries),
    ("elements", parts.by_elements),
)


def _decide(gold: str, prediction: str, leaf: _Leaf) -> Verdict | None:
    """By the first exact rule that applies, to the elements too, and by `leaf` where none does."""
    if squeeze(gold) == squeeze(prediction):
        return verdict_of(True, "same_text")
    if not prediction:
        return Verdict(outcome="different", rule="nothing_left")

    def same(left: str, right: str) -> bool | None:
        verdict = _decide(left, right, leaf)
        known = verdict and verdict.outcome in {"equal", "different"}
        return verdict.correct if verdict and known else None

    for name, rule in _RULES:
        if (found := rule(gold, prediction, same)) is not None:
            return verdict_of(found, name)
    return leaf(gold, prediction)


# --- what no rule takes apart --------------------------------------------------------------------


def _by_value(gold: str, prediction: str) -> Verdict | None:
    """The leaf of the exact rules: by exact arithmetic, else by values in many digits, or few."""
    same = same_value(gold, prediction)
    if same:
        return verdict_of(True, "value")
    rounding = _rounding(gold, prediction)
    if rounding:
        stands = rounds_to(*rounding)
        return None if stands is None else verdict_of(stands, "rounding")
    if same is False or differ(gold, prediction):
        return verdict_of(False, "value")
    if gold.count("=") == prediction.count("=") == 1 and proportional(gold, prediction):
        return verdict_of(True, "equation")
    return verdict_of(True, "digits") if agree_in_digits(gold, prediction) else None


def _by_meaning(gold: str, prediction: str) -> Verdict:
    """The leaf of the symbolic stage."""
    if verdict := _by_value(gold, prediction):
        return verdict
    try:
        if same_meaning(gold, prediction):
            return verdict_of(True, "math_verify")
        if agree(gold, prediction):
            return verdict_of(True, "real_functions")
        rounding = _rounding(gold, prediction)
        return verdict_of(bool(rounding and rounds_exactly_to(*rounding)), "math_verify")
    except Unreadable as error:
        return Verdict(outcome="unparsable", rule=str(error))
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        # sympy raises nearly anything on nearly-mathematics; the name of it is the rule
        return Verdict(outcome="unparsable", rule=type(error).__name__)


def _rounding(gold: str, prediction: str) -> tuple[str, str, Callable[[str], Fraction]] | None:
    """What is exact, what has decimals, and how far each of these may be off; none where no
    decimal may stand for anything but itself."""
    decimals = has_decimal(gold), has_decimal(prediction)
    if decimals == (True, False):
        return prediction, gold, last_half
    exact = signature(gold)
    if decimals == (False, True) and not (exact and exact.exact and is_finite(exact.exact)):
        return gold, prediction, rounded_half
    return None
