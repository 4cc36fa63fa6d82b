r"""A response of a model that does not box in, its final answer out.

    "so the probability is\n\[ \frac34. \]"  ->  "\frac34"        "<answer>42</answer>"  ->  "42"

What says of itself that it is the answer comes first: a tag, a box, "the answer is", "####". Only
then the end of the response counts: a bold one, its last formula, its last number.
"""

import re
import unicodedata

from mcore_sft.evaluation.grading.extract.boxes import Span, find_boxes
from mcore_sft.evaluation.grading.extract.prose import (
    ANNOUNCEMENT,
    ANSWER_LENGTH,
    FORMULA,
    announced,
    first_thing,
    inside,
    last_run,
)

_TAG = re.compile(r"<(final_?answer|answer)>((?:(?!<\1>).)*?)</\1>", re.DOTALL | re.IGNORECASE)
_MARKED = re.compile(r"####[ \t]*([^\n]*)")
_MARKED_NUMBER = re.compile(
    r"(?:^-\s*|(?<!\w)-)?(?:\\[dt]?frac\s*\{\d+\}\s*\{\d+\}|(?:\d+\s+)?\d+\s*/\s*\d+"
    r"|\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
)
_LETTER = re.compile(
    r"\b(?i:option|choice|answer)\s+\(?([A-J])\)?\s+(?:is|was)\s+(?:the\s+)?(?:correct|right|best)"
    r"|\b(?:choose|select|pick|go\s+with)\s+(?:(?i:option|choice)\s+)?\(?([A-J])\)?(?=[.!,)\s*]|$)"
)
_BOLD = re.compile(r"\*\*(?!\s)([^*\n]+?)\*\*|(?<!\w)__(?!\s)([^_\n]+?)__(?!\w)")
_DISPLAY = re.compile(
    r"\$\$[^$]*\n[^$]*\$\$|\\\[(?:(?!\\\]).)*\n(?:(?!\\\]).)*\\\]"
    r"|\\begin\s*\{(align|equation|gather|multline)(\*?)\}(?:(?!\\begin).)*?\\end\s*\{\1\2\}",
    re.DOTALL,
)
_EQUATION = re.compile(r"\s*([a-zA-Z](?:_\{?\w+\}?)?)\s*=\s*([^=<>]+?)\s*")
_COURTESY = re.compile(r"\n+(?:I hope|Hope this|Let me know|Feel free|Please let)[^\n]*\s*$")
_NUMBER = re.compile(
    r"[(\[]\s*-?[\w./\\]+(?:\s*,\s*-?[\w./\\]+)+\s*[)\]]"  # a point, an interval
    r"|\d+(?:\s*:\s*\d+)+|-?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?%?"
)
# Mathematics without delimiters. Letters belong to it where an operator or a number touches them.
_BARE = re.compile(
    r"(?:(?:\\(?:[dt]?frac|sqrt|pi|cdot|times|pm|binom|log|ln|sin|cos|tan)(?![a-z])|[\d.,()+*/^_=%{}-]"
    r"|(?<![\\a-zA-Z])[a-zA-Z](?=\s?[-+*/^=_(])|(?<=[\d)}^*/+=-])\s?[a-zA-Z](?![a-zA-Z]))\s*)+"
)


def final_answer(response: str) -> str | None:
    """The answer that `response` comes to, or none."""
    if tags := _TAG.findall(response):
        return _within(tags[-1][1])
    boxes, _ = find_boxes(response)
    box = boxes[-1].content if boxes else None
    said = announced(response)
    ends = [match.end() for match in ANNOUNCEMENT.finditer(response)]
    box_first = bool(boxes) and boxes[-1].end > max(ends, default=0)
    in_order = (box, said) if box_first or not _is_answer(said or "") else (said, box)
    chosen = [letter for match in _LETTER.findall(response) for letter in match if letter]
    found = next(filter(None, (*in_order, marked(response), *chosen[-1:])), None)
    return found or _at_the_end(response)


def marked(response: str) -> str | None:
    """The number behind the last `####`, or what stands there; empty where nothing does."""
    lines = _MARKED.findall(response)
    if not lines:
        return None
    plain = lines[-1].replace("\N{MINUS SIGN}", "-")
    line = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|\\?\$", "", plain).strip().removesuffix(".")
    number = _MARKED_NUMBER.search(line)
    return number[0] if number else line


def _within(tagged: str) -> str | None:
    """What a tag holds, without a box or an announcement around it."""
    boxes, _ = find_boxes(tagged)
    if boxes:
        return boxes[-1].content
    return announced(tagged) or first_thing(tagged.strip())


def _is_answer(said: str) -> bool:
    """Whether it holds mathematics or is short: a choice, yes, no solution."""
    return bool(re.search(r"[\d$\\=+^<>]", said)) or 0 < len(said.split()) <= 3


def _at_the_end(response: str) -> str | None:
    """The last thing of a response whose last line is finished."""
    ended = _without_pictures(response[-2 * ANSWER_LENGTH :])
    ended = _COURTESY.sub("", ended).rstrip()[-ANSWER_LENGTH:]
    if display := [
        match for match in _DISPLAY.finditer(ended) if not ended[match.end() :].strip(" .")
    ]:
        return _last_side([_last_row(display[-1][0])])
    line = ended.rpartition("\n")[2]
    if bold := [one or other for one, other in _BOLD.findall(line)]:
        told = _in_line(bold[-1])
        return told or (
            bold[-1].strip(" .:") if line.strip("*_ .") == bold[-1].strip(" .") else None
        )
    line = line.strip("*_`")
    return _in_line(line) if re.search(r"[.!$%\d)\]}]$", line) else None


def _in_line(line: str) -> str | None:
    """The last formulas of a line, or their last side, or the last numbers of it."""
    formulas = [Span(m.start(), m.end(), inside(m[0])) for m in FORMULA.finditer(line)]
    if formulas:
        return _last_side([span.content for span in last_run(line, formulas)])
    numbers = [Span(m.start(), m.end(), m[0]) for m in _NUMBER.finditer(line)]
    if numbers and (expression := _around(line, numbers[-1])):
        return _last_side([expression])
    return ", ".join(span.content for span in last_run(line, numbers)) if numbers else None


def _around(line: str, number: Span) -> str | None:
    """The expression that `number` is part of, as 10 is of `2^{10}`; none of a number alone."""
    for run in _BARE.finditer(line):
        if run.start() <= number.start < run.end():
            text = run[0].strip(" .,")
            balanced = all(text.count(a) == text.count(b) for a, b in ("()", "{}"))
            operated = re.search(r"\\|[\^_=+*a-zA-Z]|\d\s+-\s+\d", text)
            return text if balanced and operated else None
    return None


def _last_row(display: str) -> str:
    """What the last row of a formula says that stands by itself."""
    inner = inside(display) if display[0] == "$" or display[1] == "[" else display
    rows = re.split(r"\\\\", re.sub(r"\\(?:begin|end)\s*\{\w+\*?\}|&", "", inner))
    whole = [row.strip().rstrip(".,; ") for row in rows if row.strip()]
    return whole[-1] if whole else ""


def _last_side(formulas: list[str]) -> str | None:
    named = [_EQUATION.fullmatch(formula) for formula in formulas]
    if len({match[1] for match in named if match}) == 1 and all(named):
        return ", ".join(match[2] for match in named if match)  # x = 2 or x = 3
    if any("=" in formula for formula in formulas):
        return formulas[-1].rpartition("=")[2].strip() or None
    return ", ".join(formulas) or None


def _without_pictures(text: str) -> str:
    """A picture ends a sentence."""
    return "".join(
        "." if not sign.isascii() and unicodedata.category(sign) == "So" else sign for sign in text
    )
