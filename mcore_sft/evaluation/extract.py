r"""A response in, the answer that stands in it out.

    "so it is \boxed{\frac12}."  ->  "\frac12"

Which part of a response counts as its answer is a policy, named in the configuration and in every
report, since it moves the score of a base model more than the grader does. Why there is no answer
is told apart, since each cause has another mend.

- `last_box`: the content of the last complete `\boxed{...}` or `\fbox{...}`; a box that is never
  closed is passed over.
- `nemo_skills`: as NeMo-Skills extracts: the last `\boxed`, and no answer if it is not closed.
- `nemo_rl`: the whole response, from which math-verify takes what it likes, as NeMo RL grades.
- `gsm8k`: the first number after the last `####`, without `$`, thousands separators and what is
  counted: where lm-eval's `#### (\-?[0-9\.\,]+)` finds one, the same, but with its fraction, and
  found behind words and `$` too. A line without a number is the answer as it stands.
- `final_answer`: for models that do not box: the last "the answer is ..." or box, whichever comes
  later, but a box wins over an announcement without mathematics of more than three words; else
  `####`; else the last formula or number of a response that ends in a whole sentence.

A gold answer, or a prediction that somebody else has extracted, is not a response: `stated` reads
it leniently, for there is an answer in it by definition, but drops no word that changes it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from mcore_sft.config import Policy

_AS_ELSEWHERE: tuple[Policy, ...] = ("nemo_skills", "nemo_rl")
Missing = Literal["no_box", "no_marker", "no_final_answer", "unbalanced", "empty", "truncated"]


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
    found = _BY_POLICY[policy](response)
    as_it_stands = policy in _AS_ELSEWHERE and (
        found.answer is not None or found.missing == "empty"
    )
    if truncated and not as_it_stands:
        return replace(found, answer=None, missing="truncated")
    return found


def last_box(text: str) -> str | None:
    """Content of the last complete box in `text`, or none."""
    boxes, _ = _boxes(text)
    return boxes[-1].content if boxes else None


def differing_boxes(text: str) -> bool:
    """Whether `text` holds several complete boxes that do not say the same."""
    boxes, _ = _boxes(text)
    return _differ(boxes)


def stated(answer: str) -> str:
    r"""What a gold answer or an extracted prediction says, without the words around it.

    `The answer is 4` -> `4`; two boxes with "and" between them are both of the answer, and so are
    formulas that stand apart in one sentence. A text without box, announcement or formula after
    prose is the answer itself, and so is one whose words change the formula: `not \boxed{3}`.
    """
    boxes, _ = _boxes(answer)
    if boxes:
        return _said(answer, boxes)
    if announced := _announced(answer):
        return announced
    if len(answer) > _ANSWER_LENGTH:
        return answer
    formulas = [_Span(m.start(), m.end(), _inside(m[0])) for m in _FORMULA.finditer(answer)]
    if formulas and _PROSE_BEFORE.search(answer[: _last_run(answer, formulas)[0].start]):
        return _said(answer, formulas)
    return answer


# --- policies ----------------------------------------------------------------------------------


def _by_last_box(response: str) -> Extraction:
    boxes, opened = _boxes(response)
    if not boxes:
        return Extraction(answer=None, missing="unbalanced" if opened else "no_box")
    if not boxes[-1].content:
        return Extraction(answer=None, missing="empty", differing=_differ(boxes))
    return Extraction(answer=boxes[-1].content, differing=_differ(boxes))


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


_MARKED = re.compile(r"####[ \t]*([^\n]*)")
_MARKED_NUMBER = re.compile(
    r"(?:^-\s*|(?<!\w)-)?(?:\\[dt]?frac\s*\{\d+\}\s*\{\d+\}|(?:\d+\s+)?\d+\s*/\s*\d+"
    r"|\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
)


def _by_gsm8k(response: str) -> Extraction:
    marked = _MARKED.findall(response)
    if not marked:
        return Extraction(answer=None, missing="no_marker")
    plain = marked[-1].replace("\N{MINUS SIGN}", "-")
    line = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|\\?\$", "", plain).strip().removesuffix(".")
    number = _MARKED_NUMBER.search(line)
    answer = number[0] if number else line
    return Extraction(answer=answer) if answer else Extraction(answer=None, missing="empty")


def _by_final_answer(response: str) -> Extraction:
    boxes, _ = _boxes(response)
    announcements = [match.end() for match in _ANNOUNCEMENT.finditer(response)]
    boxed_last = boxes and boxes[-1].end > max(announcements, default=0)
    box_wins = boxed_last or not _is_answer(_announced(response) or "")
    finders = (last_box, _announced) if box_wins else (_announced, last_box)
    for find in (*finders, _last_marked, _last_of_sentence):
        if answer := find(response):
            return Extraction(answer=answer, differing=_differ(boxes))
    return Extraction(answer=None, missing="no_final_answer")


_BY_POLICY: dict[Policy, Callable[[str], Extraction]] = {
    "last_box": _by_last_box,
    "nemo_skills": _by_nemo_skills,
    "nemo_rl": _by_nemo_rl,
    "gsm8k": _by_gsm8k,
    "final_answer": _by_final_answer,
}


# --- boxes -------------------------------------------------------------------------------------

# An escaped brace is a printed brace and balances nothing. Some models escape twice: `\\boxed{5}`.
_TOKEN = re.compile(r"(?<!\\)\\+(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    content: str


def _differ(boxes: list[_Span]) -> bool:
    return len({re.sub(r"\s+", "", box.content) for box in boxes}) > 1


def _boxes(text: str) -> tuple[list[_Span], bool]:
    """The complete outermost boxes in order, and whether any box was opened.

    One pass, so that a megabyte of opened boxes costs no more than a megabyte of prose.
    """
    open_groups: list[tuple[bool, int, int]] = []  # is a box, start, start of the content
    complete: list[tuple[int, int, int]] = []  # start, content, its end
    opened = False
    for token in _TOKEN.finditer(text):
        found = token.group()
        if found == "}":
            if open_groups:
                is_box, start, content = open_groups.pop()
                if is_box:
                    _keep_outermost(complete, start, content, token.start())
        elif found.endswith("{") and found != r"\{":
            is_box = found != "{"
            opened |= is_box
            open_groups.append((is_box, token.start(), token.end()))
    return [
        _Span(start, end + 1, text[begin:end].strip()) for start, begin, end in complete
    ], opened


def _keep_outermost(
    complete: list[tuple[int, int, int]], start: int, content: int, end: int
) -> None:
    """Add a box that has just closed; the boxes within it, which closed before, go."""
    while complete and complete[-1][0] > start:
        complete.pop()
    complete.append((start, content, end))


_DRESS = re.compile(
    r"\\text\w*\s*\{([^{}]*)\}|\\[()\[\]]|\$|\\q?quad|\\[,;:! ]|[A-Za-z]\w*(?:_\{?\w+\}?)?\s*="
)
_BETWEEN = re.compile(r"[\s,;&]*(?:(?:and|or)?|[a-z ()]{0,30}\b(?:and|or))[\s,;&]*")


def _last_run(text: str, spans: list[_Span]) -> list[_Span]:
    """The last of `spans` and those before it that only "and", "or" or a comma part from it."""
    first = len(spans) - 1
    while first and _connects(text[spans[first - 1].end : spans[first].start]):
        first -= 1
    return spans[first:]


def _connects(between: str) -> bool:
    undressed = _DRESS.sub(lambda m: m[1] or " ", between[: _NEAR + 1])
    return len(between) <= _NEAR and bool(_BETWEEN.fullmatch(undressed))


# --- what may be dropped -----------------------------------------------------------------------

# As far from a formula as words are looked at.
_NEAR = 100
_SENTENCE_END = re.compile(r"\n|(?<!\\)[.!?](?=(?:\$|\\[)\]])*(?:\s|$))")
_THAN = r"(?:more|less|fewer|greater|larger|smaller)\s+than"
_CHANGES_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|nor|[a-z]+n['\u2019]t)"
    r"(?:\s+(?:true|that|it|the|answer|is|are|be|equals?|to|have|get|gives?|[a-z]\s*=))*"
    r"|\b(?:minus|negative|plus|times|twice)"
    r"|\\(?:cdot|times|pm|mp|neq?|sqrt)|[+/^]|(?:\d\s*|[\w)}])\*|(?:[\d)}]|\b[a-z])\s*-|-(?=\$*$)|\d)"
    r"\s*(?:\$\$?|\\[(\[])?$",
    re.IGNORECASE,
)
# At the beginning of an answer; within a solution they are its prose.
_BEGINS = re.compile(
    rf"\W*(?:at\s+(?:least|most)|{_THAN}|up\s+to|above|below|under|over|half|except)[\s$\\(\[]*",
    re.IGNORECASE,
)
_CHANGES_AFTER = re.compile(
    r"(?:[\s,({\]}$]|\\[)\],;:! ]|\\text\w*\s*\{)*"
    r"(?:(?:(?:or|and)\s+(?:more|less|fewer|greater|higher|lower|above|below|over|under|up|a\s+half)"
    rf"|at\s+(?:least|most)|{_THAN}\s+[\d$\\]|(?:is|was)\s+(?:wrong|incorrect|false)"
    r"|(?:is|was)(?:\s+not|n['\u2019]t)\s+(?:the|it|right|correct|possible)"
    r"|hundreds?|thousands?|[mbtr]+illions?|dozens?|hal(?:f|ves)|thirds?|plus|minus|factorial"
    r"|(?:squared|cubed)(?!\s+[a-z]))\b"
    r"|(?:(?:and|or|to|times|plus|minus|over)\s+)?-?\d+(?!\w|-[a-z])|:\d"
    r"|[+/]|\*(?=[\w\\$(]|\s+[\d\\$(])|\^(?!\s*\{?\s*\\circ)|-\s*[\d$\\]|\\(?:cdot|times|pm|mp)(?![a-z]))",
    re.IGNORECASE,
)
_NAMED = re.compile(r"(?:\$|\\[)\]]|\s)*(?:is|are|was|be|equals?|must|should|can)\b", re.IGNORECASE)
_NAMING = re.compile(
    r"\b(?:of|for|in|on|at|with|as|from|if|when|where|since|because)[\s$\\(\[]*$", re.IGNORECASE
)
_THEREFORE = re.compile(
    r"\b(?:so|thus|hence|therefore|then|gives?|follows|means|because|since)\b|^[\s$]*=[\s$]*$",
    re.IGNORECASE,
)


def _said(text: str, spans: list[_Span]) -> str:
    """The last of `spans` and what stands beside it; with the words behind, or with all words,
    where those change it."""
    run = _last_run(text, spans)
    first, last = run[0], run[-1]
    before = _SENTENCE_END.split(text[max(0, first.start - _NEAR) : first.start])[-1]
    if _CHANGES_BEFORE.search(before) or _BEGINS.fullmatch(text, 0, first.start):
        return text
    together = [*_apart(text, spans[: -len(run)], first), *run]
    kept = ", ".join(dict.fromkeys(span.content for span in together))
    ended = _SENTENCE_END.search(text, last.end - 3, last.end + 1)  # within the formula
    behind = "" if ended else _rest_of_sentence(text, last.end)
    return kept + re.sub(r"\$|\\[)\]]", "", behind) if _CHANGES_AFTER.match(behind) else kept


def _apart(text: str, spans: list[_Span], following: _Span) -> list[_Span]:
    """Those of `spans` in the sentence of `following` that are neither named nor reasons."""
    found: list[_Span] = []
    near = [span for span in spans if following.start - span.start < _ANSWER_LENGTH]
    for span in reversed(near):
        between = text[span.end : following.start]
        ended = _SENTENCE_END.search(text, span.end - 3, following.start)
        if len(between) > _NEAR or ended or _THEREFORE.search(between):
            break
        named = _NAMED.match(text, span.end) or _NAMING.search(
            text[max(0, span.start - _NEAR) : span.start]
        )
        if not named and span.content != following.content:
            found.append(span)
        following = span
    return found[::-1]


def _rest_of_sentence(text: str, start: int) -> str:
    return _SENTENCE_END.split(text[start : start + _ANSWER_LENGTH], maxsplit=1)[0]


# --- announcements -----------------------------------------------------------------------------

# "The answer is as above" points elsewhere, and "is right" judges.
_ELSEWHERE = (
    r"(?![\s:*]*(?:(?:as|in|the|boxed|box|shown|given|stated|found|above|below|here|before|earlier|"
    r"correct|right|wrong|incorrect|clear|obvious|not)\b\s*)+(?:[.,!?;]|$))"
)
_ANNOUNCEMENT = re.compile(
    rf"\b(?:(?:answer|result)\s+is\b{_ELSEWHERE}\s*:?|answer\s*:|answer(?=\s*(?:\$|\\[(\[])))\s*",
    re.IGNORECASE | re.MULTILINE,
)
_LEADING = re.compile(
    r"(?:(?:therefore|thus|hence|then|so|simply|just|clearly|exactly|equal\s+to|given\s+by"
    r"|the\s+(?:number|value)(?=[\s,:]+[\d$\\]))[\s,:]+)+",
    re.IGNORECASE,
)
_REASON = re.compile(r"(?<=\S)(?:[\s,(]+(?:because|since|which|where)|,\s*as)\b.*", re.DOTALL)
_PLEASANTRY = re.compile(r"\s*I hope (?:it|this) is correct.*", re.DOTALL)
_FORMULA = re.compile(
    r"\$\$[^$]+\$\$|\$(?:\\.|[^$\\])+\$|\\\((?:(?!\\\)).)+\\\)|\\\[(?:(?!\\\]).)+\\\]", re.DOTALL
)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?%?")
_PROSE_BEFORE = re.compile(
    r"\b(?:is|are|be|equals?|that|gives?|get|have|therefore|so)\s*:?\s*$", re.I
)
# Far more than any answer; what comes after is not searched for the end of a sentence.
_ANSWER_LENGTH = 1000


def _announced(text: str) -> str | None:
    """What the last "answer is" of `text` announces, or none."""
    ends = [announcement.end() for announcement in _ANNOUNCEMENT.finditer(text)]
    if not ends:
        return None
    rest = _PLEASANTRY.sub("", text[ends[-1] : ends[-1] + _ANSWER_LENGTH])
    rest = re.sub(r"^(?:\s|\\?[\"']|[*}])+", "", rest)
    return _first_thing(rest[leading.end() :] if (leading := _LEADING.match(rest)) else rest)


def _first_thing(text: str) -> str | None:
    """The formulas that `text` begins with, else its first sentence, without reasons."""
    formulas = list(_FORMULA.finditer(text))
    if not formulas or formulas[0].start() > 0:
        sentence = _REASON.sub("", _SENTENCE_END.split(text, maxsplit=1)[0])
        return sentence.strip(" *_\"'") or None
    kept = [formulas[0]]
    for formula in formulas[1:]:
        if not _connects(text[kept[-1].end() : formula.start()]):
            break
        kept.append(formula)
    behind = _rest_of_sentence(text, kept[-1].end())
    if _CHANGES_AFTER.match(behind):
        return (text[: kept[-1].end()] + behind).strip()
    return ", ".join(_inside(formula[0]) for formula in kept)


def _is_answer(announced: str) -> bool:
    """Whether it holds mathematics or is short: a choice, yes, no solution."""
    return bool(re.search(r"[\d$\\=+^<>]", announced)) or 0 < len(announced.split()) <= 3


def _last_of_sentence(response: str) -> str | None:
    """The last formula, or its last side, or the last number, of a last line that is finished."""
    line = response.rstrip().rpartition("\n")[2][-_ANSWER_LENGTH:]
    if not re.search(r"[.!$%\d)\]]$", line):
        return None
    formulas = [_inside(match[0]) for match in _FORMULA.finditer(line)]
    if formulas:
        return formulas[-1].rpartition("=")[2].strip() or None
    numbers = _NUMBER.findall(line)
    return numbers[-1] if numbers else None


def _last_marked(response: str) -> str | None:
    return _by_gsm8k(response).answer


def _inside(formula: str) -> str:
    """A formula without its delimiters and the full stop that ends its sentence."""
    width = 1 if formula[0] == "$" and not formula.startswith("$$") else 2
    return formula[width:-width].strip().rstrip(".,; ")
