r"""Prose around an answer: what of it may be dropped, and where it says the answer.

"The answer is $5$, since $6$ is even."  ->  "5"        "\boxed{12} million"  ->  "12 million"
"""

import re

from mcore_sft.evaluation.grading.extract.boxes import Span

# As far from a formula as words are looked at.
_NEAR = 100
SENTENCE_END = re.compile(r"\n|(?<!\\)[.!?](?=(?:\$|\\[)\]])*(?:\s|$))")
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


def said(text: str, spans: list[Span]) -> str:
    """The last of `spans` and what stands beside it; with the words behind, or with all words,
    where those change it."""
    run = last_run(text, spans)
    first, last = run[0], run[-1]
    before = SENTENCE_END.split(text[max(0, first.start - _NEAR) : first.start])[-1]
    if _CHANGES_BEFORE.search(before) or _BEGINS.fullmatch(text, 0, first.start):
        return text
    together = [*_apart(text, spans[: -len(run)], first), *run]
    kept = ", ".join(dict.fromkeys(span.content for span in together))
    ended = SENTENCE_END.search(text, last.end - 3, last.end + 1)  # within the formula
    behind = "" if ended else _rest_of_sentence(text, last.end)
    return kept + re.sub(r"\$|\\[)\]]", "", behind) if _CHANGES_AFTER.match(behind) else kept


def _apart(text: str, spans: list[Span], following: Span) -> list[Span]:
    """Those of `spans` in the sentence of `following` that are neither named nor reasons."""
    found: list[Span] = []
    near = [span for span in spans if following.start - span.start < ANSWER_LENGTH]
    for span in reversed(near):
        between = text[span.end : following.start]
        ended = SENTENCE_END.search(text, span.end - 3, following.start)
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
    return SENTENCE_END.split(text[start : start + ANSWER_LENGTH], maxsplit=1)[0]


_DRESS = re.compile(
    r"\\text\w*\s*\{([^{}]*)\}|\\[()\[\]]|\$|\\q?quad|\\[,;:! ]|[A-Za-z]\w*(?:_\{?\w+\}?)?\s*="
)
_BETWEEN = re.compile(r"[\s,;&]*(?:(?:and|or)?|[a-z ()]{0,30}\b(?:and|or))[\s,;&]*")


def last_run(text: str, spans: list[Span]) -> list[Span]:
    """The last of `spans` and those before it that only "and", "or" or a comma part from it."""
    first = len(spans) - 1
    while first and _connects(text[spans[first - 1].end : spans[first].start]):
        first -= 1
    return spans[first:]


def _connects(between: str) -> bool:
    undressed = _DRESS.sub(lambda m: m[1] or " ", between[: _NEAR + 1])
    return len(between) <= _NEAR and bool(_BETWEEN.fullmatch(undressed))


# --- announcements -----------------------------------------------------------------------------

# "The answer is as above" points elsewhere, and "is right" judges.
_ELSEWHERE = (
    r"(?![\s:*]*(?:(?:as|in|the|boxed|box|shown|given|stated|found|above|below|here|before|earlier|"
    r"correct|right|wrong|incorrect|clear|obvious|not)\b\s*)+(?:[.,!?;]|$))"
)
ANNOUNCEMENT = re.compile(
    rf"(?:\b(?:answer|result|(?:correct|right|best)\s+(?:option|choice|statement))"
    rf"\s+(?:is|(?:would|must|should|will)\s+be)\b{_ELSEWHERE}\s*:?"
    r"|\banswer\s*:|\banswer(?=\s*(?:\$|\\[(\[]))"
    r"|^[ \t#*_]*(?:the\s+)?(?:final\s+)?answer[ \t*_]*$)\s*",  # a heading
    re.IGNORECASE | re.MULTILINE,
)
_LEADING = re.compile(
    r"(?:(?:therefore|thus|hence|then|so|simply|just|clearly|exactly|equal\s+to|given\s+by"
    r"|the\s+(?:number|value)(?=[\s,:]+[\d$\\]))[\s,:]+)+",
    re.IGNORECASE,
)
_REASON = re.compile(
    r"(?<=\S)(?:[\s,(]+(?:because|since|which|where|rather\s+than|instead\s+of)|,\s*as"
    r"|\s*[,;(]\s*(?:and\s+|but\s+)?not)\b.*",
    re.DOTALL,
)
_PLEASANTRY = re.compile(r"\s*I hope (?:it|this) is correct.*", re.DOTALL)
FORMULA = re.compile(
    r"\$\$[^$]+\$\$|\$(?:\\.|[^$\\])+\$|\\\((?:(?!\\\)).)+\\\)|\\\[(?:(?!\\\]).)+\\\]", re.DOTALL
)
PROSE_BEFORE = re.compile(
    r"\b(?:is|are|be|equals?|that|gives?|get|have|therefore|so)\s*:?\s*$", re.I
)
# Far more than any answer; what comes after is not searched for the end of a sentence.
ANSWER_LENGTH = 1000


def announced(text: str) -> str | None:
    """What the last "answer is" of `text` announces, or none."""
    ends = [announcement.end() for announcement in ANNOUNCEMENT.finditer(text)]
    if not ends:
        return None
    rest = _PLEASANTRY.sub("", text[ends[-1] : ends[-1] + ANSWER_LENGTH])
    rest = re.sub(r"^(?:\s|\\?[\"']|[*}])+", "", rest)
    rest = re.sub(r"^not\s+[^.;\n]{1,60}?\s+but\s+", "", rest)
    return first_thing(rest[leading.end() :] if (leading := _LEADING.match(rest)) else rest)


def first_thing(text: str) -> str | None:
    """The formulas that `text` begins with, else its first sentence, without reasons."""
    formulas = list(FORMULA.finditer(text))
    if not formulas or formulas[0].start() > 0:
        sentence = _REASON.sub("", SENTENCE_END.split(text, maxsplit=1)[0])
        return sentence.strip(" *_\"'") or None
    kept = [formulas[0]]
    for formula in formulas[1:]:
        if not _connects(text[kept[-1].end() : formula.start()]):
            break
        kept.append(formula)
    behind = _rest_of_sentence(text, kept[-1].end())
    if _CHANGES_AFTER.match(behind):
        return (text[: kept[-1].end()] + behind).strip()
    return ", ".join(inside(formula[0]) for formula in kept)


def inside(formula: str) -> str:
    """A formula without its delimiters and the full stop that ends its sentence."""
    width = 1 if formula[0] == "$" and not formula.startswith("$$") else 2
    return formula[width:-width].strip().rstrip(".,; ")
