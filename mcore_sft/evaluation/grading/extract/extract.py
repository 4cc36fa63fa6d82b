r"""A response in, the answer that stands in it out.

    "so it is \boxed{\frac12}."  ->  "\frac12"

Which part of a response counts as its answer is a policy, named in the configuration and in every
report, since it moves the score of a base model more than the grader does. Why there is no answer
is told apart, since each cause has another mend.

- `last_box`: the content of the last complete `\boxed{...}` or `\fbox{...}`, with a sign that
  stands before it; a box that is never closed is passed over.
- `nemo_skills`: as NeMo-Skills extracts: the last `\boxed`, and no answer if it is not closed.
- `nemo_rl`: the whole response, from which math-verify takes what it likes, as NeMo RL grades.
- `gsm8k`: the first number after the last `####`, without `$`, thousands separators and what is
  counted: where lm-eval's `#### (\-?[0-9\.\,]+)` finds one, the same, but with its fraction, and
  found behind words and `$` too. A line without a number is the answer as it stands.
- `final_answer`: for models that do not box: the last `<answer>` tag; else the last "the answer is
  ..." or box, whichever comes later, but a box wins over an announcement without mathematics of
  more than three words; else `####`; else the last bold text, formula or number of a response that
  ends in a whole sentence.

What a model thinks is no part of its response: what stands before `</think>` is not looked at, and
a response that was cut at its length limit has no answer. The policies that do as other tools do
know of neither.

A gold answer, or a prediction that somebody else has extracted, is not a response: `stated` reads
it leniently, for there is an answer in it by definition, but drops no word that changes it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from mcore_sft.config import Policy
from mcore_sft.evaluation.grading.extract.boxes import Span, differ, find_boxes
from mcore_sft.evaluation.grading.extract.final import final_answer, marked
from mcore_sft.evaluation.grading.extract.prose import (
    ANSWER_LENGTH,
    FORMULA,
    PROSE_BEFORE,
    announced,
    inside,
    last_run,
    said,
)

_AS_ELSEWHERE: tuple[Policy, ...] = ("nemo_skills", "nemo_rl")
Missing = Literal[
    "no_box", "no_marker", "no_final_answer", "no_choice", "unbalanced", "empty", "truncated"
]


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What a policy found in one response."""

    answer: str | None
    """The answer as it is written there, or none."""
    missing: Missing | None = None
    """Why there is no answer; none where there is one."""
    differing: bool = False
    """The response holds several complete boxes that do not say the same."""


def extract(response: str, *, policy: Policy = "last_box", truncated: bool = False) -> Extraction:
    """The answer in `response` by `policy`.

    `truncated` says that generation ended at its length limit: the response was not finished, and
    no part of it is its answer. Only `nemo_skills` and `nemo_rl` take what stands there, as those
    tools do.
    """
    if policy not in _AS_ELSEWHERE:
        response = _without_thoughts(response)
    found = _BY_POLICY[policy](response)
    as_it_stands = policy in _AS_ELSEWHERE and (
        found.answer is not None or found.missing == "empty"
    )
    if truncated and not as_it_stands:
        return replace(found, answer=None, missing="truncated")
    return found


_THOUGHT = re.compile(r"</think(?:ing)?>")


def _without_thoughts(response: str) -> str:
    """What follows the last `</think>`; nothing of a response that never stops thinking."""
    ends = [thought.end() for thought in _THOUGHT.finditer(response)]
    if not ends and re.match(r"\s*<think(?:ing)?>", response):
        return ""
    return response[max(ends, default=0) :]


def last_box(text: str) -> str | None:
    """Content of the last complete box in `text`, or none."""
    boxes, _ = find_boxes(text)
    return boxes[-1].content if boxes else None


def differing_boxes(text: str) -> bool:
    """Whether `text` holds several complete boxes that do not say the same."""
    boxes, _ = find_boxes(text)
    return differ(boxes)


def stated(answer: str) -> str:
    r"""What a gold answer or an extracted prediction says, without the words around it.

    `The answer is 4` -> `4`; two boxes with "and" between them are both of the answer, and so are
    formulas that stand apart in one sentence. A text without box, announcement or formula after
    prose is the answer itself, and so is one whose words change the formula: `not \boxed{3}`.
    """
    answer = _without_thoughts(answer)
    boxes, _ = find_boxes(answer)
    if boxes:
        return said(answer, boxes)
    if told := announced(answer):
        return told
    if len(answer) > ANSWER_LENGTH:
        return answer
    formulas = [Span(m.start(), m.end(), inside(m[0])) for m in FORMULA.finditer(answer)]
    if formulas and PROSE_BEFORE.search(answer[: last_run(answer, formulas)[0].start]):
        return said(answer, formulas)
    return answer


# --- policies ----------------------------------------------------------------------------------


# As far before a box as is looked for a sign.
_NEAR = 40
# A minus that follows nothing it could be taken from.
_SIGN = re.compile(
    r"(?:^|[=:(\[{,;$]|\\[(\[]|\b[a-z]{2,}\s+(?!-\s)|\b(?:is|be|are|get|gives?|equals?)\s+|\\(?:implies|Rightarrow|approx|text\w*\{)\s*)\s*"
    r"(?P<sign>-|\N{MINUS SIGN}|\\pm|\$\s*-\s*\$|\b(?:minus|negative)\b)(?:\s|\$|\\[,;:!(\[]|\{)*$",
    re.IGNORECASE,
)


def _by_last_box(response: str) -> Extraction:
    boxes, opened = find_boxes(response)
    if not boxes:
        return Extraction(answer=None, missing="unbalanced" if opened else "no_box")
    content, different = boxes[-1].content, differ(boxes)
    if not content:
        return Extraction(answer=None, missing="empty", differing=different)
    return Extraction(answer=_signed(response, boxes[-1]), differing=different)


def _signed(response: str, box: Span) -> str:
    """What a box holds, with the sign before it; a dash and a blank at the start of a line begin a
    list."""
    line = response[max(0, box.start - _NEAR) : box.start].rpartition("\n")[2]
    found = None if re.fullmatch(r"\s*-\s+[\\(\[$\s]*", line) else _SIGN.search(line)
    if not found:
        return box.content
    sign = r"\pm " if found["sign"] == r"\pm" else "-"
    return f"{sign}({box.content})" if re.search(r".[+-]", box.content) else sign + box.content


def _by_nemo_skills(response: str) -> Extraction:
    start = response.rfind(r"\boxed")
    if start < 0:
        return Extraction(answer=None, missing="no_box")
    content = start + len(r"\boxed{")
    depth = int(response[content - 1 : content] == "{")
    # braces are counted there as they stand, escaped ones too
    for brace in re.compile("[{}]").finditer(response, content):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            answer = response[content : brace.start()]
            differing = differing_boxes(response)
            if not answer.strip():
                return Extraction(answer=None, missing="empty", differing=differing)
            return Extraction(answer=answer, differing=differing)
        if depth < 0:
            break
    return Extraction(answer=None, missing="unbalanced")


def _by_nemo_rl(response: str) -> Extraction:
    return Extraction(answer=response, differing=differing_boxes(response))


def _by_gsm8k(response: str) -> Extraction:
    answer = marked(response)
    if answer is None:
        return Extraction(answer=None, missing="no_marker")
    return Extraction(answer=answer) if answer else Extraction(answer=None, missing="empty")


def _by_final_answer(response: str) -> Extraction:
    answer = final_answer(response)
    if answer is None:
        return Extraction(answer=None, missing="no_final_answer")
    return Extraction(answer=answer, differing=differing_boxes(response))


_BY_POLICY: dict[Policy, Callable[[str], Extraction]] = {
    "last_box": _by_last_box,
    "nemo_skills": _by_nemo_skills,
    "nemo_rl": _by_nemo_rl,
    "gsm8k": _by_gsm8k,
    "final_answer": _by_final_answer,
}
