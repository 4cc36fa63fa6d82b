r"""Graders of others, called as they are called there, for comparison with ours.

Both may hang or use all memory on a hostile answer: call them in a process that can be killed.
"""

from typing import Any

from mcore_sft.evaluation.grading.compare.equivalence import Verdict, verdict_of
from mcore_sft.evaluation.grading.compare.symbolic import silence


def math_verify(gold: str, prediction: str) -> Verdict:
    """What math-verify by itself says of two answers, each in a math environment."""
    from math_verify import parse, verify

    silence()
    left, right = (
        parse(f"${text}$", parsing_timeout=None)
        for text in (gold.strip("$"), prediction.strip("$"))
    )
    if not left or not right:
        return Verdict(outcome="unparsable", rule="math_verify")
    return verdict_of(verify(left, right, timeout_seconds=None), "math_verify")


def nemo_rl(gold: str, response: str) -> tuple[Verdict, str | None]:
    r"""The verdict of NeMo RL's math environment on a whole response, and what it extracted.

    `math_metric` with the gold in `\boxed{...}` and numbers taken where there is no box. What
    raises there counts as wrong, as it does in NeMo RL.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig
    from math_verify.errors import TimeoutException
    from math_verify.metric import math_metric

    silence()
    metric: Any = math_metric(
        gold_extraction_target=(LatexExtractionConfig(),),
        pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig()),
    )
    try:
        score, extracted = metric([f"\\boxed{{{gold}}}"], [response])
    except TimeoutException:
        return Verdict(outcome="timeout", rule="nemo_rl"), None
    except Exception as error:
        return Verdict(outcome="unparsable", rule=type(error).__name__), None
    # the last of an extraction is the text that it was made of
    found = extracted[1][-1] if extracted and extracted[1] else None
    return verdict_of(score > 0, "nemo_rl"), found
