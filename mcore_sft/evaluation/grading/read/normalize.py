r"""An answer as somebody wrote it in, one canonical way of writing it out.

    "$\dfrac12\text{ cm}^2$."  ->  "\frac{1}{2}", and square centimeters

Both sides of a comparison go through here. Nothing is evaluated beyond mixed numbers: the meaning
is for `equivalence`, this is about spelling alone.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from mcore_sft.evaluation.grading.read.latex import with_braces
from mcore_sft.evaluation.grading.read.layout import without_braces, without_layout
from mcore_sft.evaluation.grading.read.number import read_number, same_number
from mcore_sft.evaluation.grading.read.rules import apply, rules
from mcore_sft.evaluation.grading.read.signature import same_value
from mcore_sft.evaluation.grading.read.signs import from_unicode
from mcore_sft.evaluation.grading.read.units import (
    CURRENCIES,
    DEGREE,
    DOLLAR,
    DOUBLE_PRIME,
    PRIME,
    Unit,
    read_unit,
    scaled,
    without_units,
)
from mcore_sft.evaluation.grading.read.words import base_in_words


@dataclass(frozen=True)
class Spelled:
    """An answer in canonical spelling."""

    text: str
    unit: Unit | None
    """What the answer is measured in, if it says so."""


def normalize(answer: str) -> str:
    """The canonical spelling of `answer`; equal results mean the same answer."""
    return spell(answer).text


def squeeze(text: str) -> str:
    """`text` without blanks, except that digits do not become one number."""
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", re.sub(r"\s+", " ", text))


@lru_cache(maxsize=4096)
def spell(answer: str, *, thousands: bool = True) -> Spelled:
    """The canonical spelling of `answer`, and its unit.

    Without `thousands`, commas between digits part the elements of a list.
    """
    if re.fullmatch(r"-?\d{1,15}", answer):  # as most are
        return Spelled(answer, None)
    text = _without_wrapping(from_unicode(answer))
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", _in_one_line(text))
        text = re.sub(r"\s*(?:\\\\|\\?&)\s*", ", ", text)
    text = without_layout(apply(_GROUPS, text))
    text = with_braces(without_braces(apply(_MARKUP, text).strip()))
    text, money = _without_currency(text)
    text = re.sub(r"\\text(?:normal)?\s*\{\s*(and|or)\s*\}", r" \1 ", text)
    text, letter = _without_letter_unit(apply(_SPACES, text))
    text = _unwrap_text(text)
    text, angle = _without_degrees(text)
    text = with_braces(apply(_PLAIN, text))
    text, words = without_units(scaled(_without_remark(text)))
    text = _join_thousands(text) if thousands else text
    text = _without_approximation(_of_two_forms(_mixed_numbers(text)))
    text = re.sub(r"\s*,\s*(?:,\s*)+|\s+,\s*", ", ", _join_conjunctions(text))
    text = re.sub(r"\s+", " ", text).lstrip(" ;:,'\"").rstrip(' .;:,"\\')
    text, prime = _without_primes(text)
    return Spelled(text, money or letter or words or angle or prime)


# --- rules ---------------------------------------------------------------------------------------


def _base(written: str) -> str:
    return f"_{{{base_in_words(written)}}}"


_TEXT = re.compile(
    r"\\(text|mbox|hbox|mathrm|textrm|textnormal|textbf|mathbf|textit|mathit|textsf|texttt|mathsf|"
    r"mathtt|textsc|textsl|textup|textmd|emph|bf|rm|operatorname)\s*\*?\s*\{([^{}]*)\}"
)
_FUNCTIONS = re.compile("(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|min|max|gcd|lcm")
_ANGLE = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?")
_TRIGONOMETRIC = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")

_UPRIGHT = r"\\(?:text|mathrm)\s*\{([a-z\s]+)\}"

_MARKUP = rules(
    (r"\\(?:dfrac|tfrac|cfrac|nicefrac|sfrac|xfrac)(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:dbinom|tbinom)(?![a-zA-Z])", r"\\binom"),
    (r"\{([^{}]+?)\\choose\s*([^{}]+)\}", r"\\binom{\1}{\2}"),
    (r"\{([^{}]+?)\\over(?![a-zA-Z])\s*([^{}]+)\}", r"\\frac{\1}{\2}"),
    (r"(?:\{\s*\})?\^\s*(?:\{(\d+)\}|(\d))\s*/\s*_\s*(?:\{(\d+)\}|(\d))",
     lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}"),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
    (r"\\leq(?:slant)?(?![a-zA-Z])", r"\\le "),
    (r"\\geq(?:slant)?(?![a-zA-Z])", r"\\ge "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\neq(?![a-zA-Z])|(?<!\d)!=|\\not\s*=", r"\\ne "),
    (r"\\(?:vee|lor)(?![a-zA-Z])", ", "),
    (r"\+\s*/\s*-", r"\\pm "),
    (r"\\(?:ldots|dots|cdots|dotsc)(?![a-zA-Z])|\.\.\.", r"\\ldots "),
    (r"(\d*\.\d*?)(\d)\2{2,}\s*\\ldots\s*$", r"\1\\overline{\2}"),  # 0.333...
    (r"(\d*\.\d*?)(\d{2,6}?)\2+\s*\\ldots\s*$", r"\1\\overline{\2}"),  # 0.1212...
    (r"(\d*\.\d*?)(\d)\s+(?:repeating|recurring)\s*$", r"\1\\overline{\2}"),
    (r"(\d*\.\d*)\((\d+)\)\s*$", r"\1\\overline{\2}"),
    (r"\\dot\s*\{(\d)\}", r"\\overline{\1}"),
    (r"(?<=\d)\s*\{:\}\s*(?=\d)", ":"),
    (r"\\hline(?![a-zA-Z])", ""),
    (rf"(?<=\d)(?:\s|\\[,;: ]|~)*\\frac\s*\{{\s*{_UPRIGHT}\s*\}}\s*\{{\s*{_UPRIGHT}\s*\}}\s*$",
     r" \1/\2"),  # miles over hour
    (r"\\begin\s*\{cases\}(.*?)\\end\s*\{cases\}", lambda m: m[1].replace(r"\\", ",")),
    (r"(?<![<>=])>=|=>", r"\\ge "),
    (r"<=", r"\\le "),
    (r"[(\[]\s*\\begin\s*\{(?:(?:small)?matrix|array)\}(?:\s*\{[clr|\s]*\})?", r"\\begin{pmatrix}"),
    (r"\\end\s*\{(?:(?:small)?matrix|array)\}\s*[)\]]", r"\\end{pmatrix}"),
    (r"\\(?:begin|end)\s*\{[bBp]?matrix\}", lambda m: re.sub(r"[bBp]?matrix", "pmatrix", m[0])),
    (r"(?<=\S)\s*=\s*(?=-?\d*\.\d+\s*\\ldots\s*$)", r" \\approx "),
)  # fmt: skip
_GROUPS = rules(
    (r"(?<=\d)\s*\{,\}\s*(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\{?,\}?\s*\\!\s*(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ","),
)
_SPACES = rules(
    (r"(?<=[\d)}])\s*\\q?quad\s*(?=-?\d|[a-z]\s*=)", ", "),
    (r"\\(?:quad|qquad|enspace|thinspace|hspace\*?\{[^{}]*\})(?![a-zA-Z])", " "),
    (r"(?<!\\)\\[,;:> ]|(?<!\\)~", " "),
    (r"\\phantom\s*(?:\{[^{}]*\}|.)", " "),
    (r"\\\\\s*\[[\d.]+\s*[a-z]{2}\]", r"\\\\"),  # \\[2mm], a line break with its height
)
_PLAIN = rules(
    (r"(?<![\\a-zA-Z])(?:sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\log\s*_\s*\{?e\}?(?![a-zA-Z])", r"\\ln "),
    (r"\\log\s*_\s*([2-9])(\d+)(?!\s*[\d.(\\{a-zA-Z])", r"\\log_{\1} \2"),  # as TeX reads it
    (r"^(\([^()]*,[^()]*\))\s*\^\s*\{?\s*(?:T|\\top)\s*\}?$", r"\1"),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![\\a-zA-Z])(?:inf|infty|infinity)(?![a-zA-Z])", r"\\infty "),
    (r"(^|[=,;(\[{])\s*\+\s*(?=[\d.\\a-zA-Z])", r"\1"),  # +5, (3, +\infty)
    (r"(?<=[\w)}])\s*\*\*\s*\(([^()]*)\)", r"^{\1}"),
    (r"(?<=[\w)}])\s*\*\*\s*(-?\d+|[a-zA-Z])", r"^{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\^\s*-\s*(\d+|[a-zA-Z])", r"^{-\1}"),
    (r"\^\s*(\d*\.\d+)", r"^{\1}"),
    (r"\s*\*\s*(?=\\sqrt|\\pi|\\frac)", " "),
    (r"\*", r"\\cdot "),
    (r"(?<![_\d])(?<!_\{)(\d+)\s*(?=\(\d+\)$|\(\\frac)", r"\1 \\cdot "),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r" \\times "),
    (r"(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|cot|csc|exp|ln|log)(?![a-zA-Z])", r"\\\1 "),
    (r"^(\d+)\s+(?:out\s+of|in)\s+(\d+)$", r"\\frac{\1}{\2}"),
    (r"^(\d+)\s+to\s+(\d+)$", r"\1:\2"),
    (r"^(?:=|\\cdot)\s*", ""),
    # binomials as they are written elsewhere
    (r"(?<!\w)(\w+)\s+choose\s+(\w+)", r"\\binom{\1}{\2}"),
    (r"(?:\{\s*\})?[_^]\s*\{?(\w+)\}?\s*C\s*_\s*\{?(\w+)\}?", r"\\binom{\1}{\2}"),
    (r"(?<![a-zA-Z\\])C\s*_\s*\{?(\d+)\}?\s*\^\s*\{?(\d+)\}?", r"\\binom{\1}{\2}"),
    (r"(?<![a-zA-Z\\])C\s*\^\s*\{?(\d+)\}?\s*_\s*\{?(\d+)\}?", r"\\binom{\2}{\1}"),
    (r"(?<!\w)(\d+)C(\d+)(?!\s*_|\w)", r"\\binom{\1}{\2}"),
    # intervals and vectors as they are written elsewhere: ]0, 1[ and <1, 2>
    (r"(?<![\w)\]}])\]([^][()]{1,80}[,;][^][()]{1,80})\[", r"(\1)"),
    (r"(?<![\w)\]}])\]([^][()]{1,80}[,;][^][()]{1,80})\]", r"(\1]"),
    (r"\[([^][()]{1,80}[,;][^][()]{1,80})\[", r"[\1)"),
    (r"^<([^<>]+,[^<>]+)>$", r"(\1)"),
    (r"\\in\s*\\mathbb\s*\{?R\}?\s*(?=:|\||\\mid)", ""),
    (r"^\\\{\s*([a-zA-Z])\s*(?::|\||\\mid)\s*(.*\1.*)\\\}$", r"\2"),  # \{x : 0 < x < 1\}
    (r"(?<=\d)\s*\\cdot\s*(?=i(?![a-zA-Z]))", ""),
    (r"(?<=[\])])\s*U\s*(?=[\[(])", r" \\cup "),
    (r"(?<=[\da-zA-Z])\s+\(?(?:in\s+)?base[\s\-]+(\w+)\)?\s*$", lambda m: _base(m[1])),
    (r"^\((\w+)\)\s*(?=_)", r"\1"),
    (r"(?<=\w)\s*_\s*\{?\s*\(?(?:base\s*)?(\d+|[a-z]{3,})\)?\s*\}?", lambda m: _base(m[1])),
    (r"(?:^|(?<=\d))\s*\{([a-zA-Z][a-zA-Z ]+)\}$", r" \1"),
)  # fmt: skip


# --- what stands around an answer ---------------------------------------------------------------

_WRAPPERS = (
    re.compile(r"\*\*(.*)\*\*", re.DOTALL),
    re.compile(r"\\+(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
    re.compile(r"\$\$?([^$]*)\$?\$"),
    re.compile(r"[\"'`](.*)[\"'`]", re.DOTALL),
)


def _without_wrapping(text: str) -> str:
    """Take markdown, mathematics delimiters, quotes and outer boxes off, in whatever order."""
    while True:
        inner = re.sub(r"(?<![\\.])\.$", "", text.strip()).strip()
        for wrapper in _WRAPPERS:
            match = wrapper.fullmatch(inner)
            if match and not inner.endswith(r"\$"):
                inner = match[1].strip()
        if inner == text:
            return text
        text = inner


def _in_one_line(text: str) -> str:
    """Lines that are each an answer as a list; a line that goes on in the next is one with it."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    whole = all(not re.search(r"(?:[-+*/=<>,;:({\[&\\]|\\\w+)$", line) for line in lines[:-1])
    begun = all(not re.match(r"[+*/=<>,;:)}\]&^_]|and\b|or\b", line) for line in lines[1:])
    return (", " if whole and begun else " ").join(lines)


_REMARK = re.compile(
    r"(?<=[\d)}\]%a-zA-Z])\s*(?!.*\b(?:not|never|wrong|incorrect|false|impossible)\b)(?:"
    r",?\s*(?:and|but)\s+(?:no\s+(?:others?|more)|nothing\s+else|none\s+other)"
    r"|,\s*(?:as|which|so|since|because|respectively|exactly|only|in\s+(?:all|total)|altogether)\b"
    r"[a-z\s]*|,\s*(?:since|because)\s.*|\s(?:respectively|only|exactly)"
    r"|\sas\s+(?:needed|required|desired|wanted|claimed|expected|stated|asked)"
    r"|\((?:exact(?:ly)?(?:\s[a-z]+)?|precisely|only|as\s[a-z\s]+|in\s+(?:all|total)|total"
    r"|(?:the\s+)?(?:final\s+)?answer)\)"
    r"|,?\s*\(?(?:approx(?:imately|\.)?|(?:rounded\s+)?to\s+(?:the\s+nearest|\w+\s+decimal)\s+[a-z]+"
    r"|rounded)\)?"
    r"|\s+is\s+(?:the\s+)?(?:final\s+|correct\s+)?answer)\s*[.!]?$"
    r"|^\s*(?:exactly|precisely|only|just|simply|so|thus|hence|therefore|there\s+(?:are|is))[,:]?\s+"
    r"(?=[-\d\\(.])",
    re.IGNORECASE,
)


def _without_remark(text: str) -> str:
    """`682 (exactly)`, `682, as required` -> `682`."""
    return _REMARK.sub("", text)


# --- units ---------------------------------------------------------------------------------------

_CURRENCY = re.compile(
    r"(?:\\(?:text|math)\w*\s*\{\s*)?(?:US|USD)?\s*"
    r"(?:\\\$|\$|\\textdollar(?:\s*\{\s*\})?)(?:\s*\})?"
    r"|^(?:\\(?:text|math)\w*\s*\{\s*)?USD(?:\s*\})?(?=(?:\s|\\[ ,;~])*\d)"
)


def _without_currency(text: str) -> tuple[str, Unit | None]:
    unit = None
    for sign, meant in CURRENCIES.items():
        text, found = re.subn(sign, "", text)
        unit = meant if found else unit
    if not re.search(r"\$|\\textdollar|USD", text):
        return text, unit
    # an even number of bare $ are delimiters
    is_money = re.search(r"\\\$|\\textdollar|USD", text) or text.count("$") % 2
    if is_money:
        unit = unit or DOLLAR
        text = re.sub(r"(?<=\d)\s*\\?\$(?=\s*(?:[a-z.]|$))", " dollars ", text)
    return _CURRENCY.sub("", text), unit


_LETTER_UNIT = re.compile(
    r"(?<=\d)\s*\\(?:text|textrm|mbox|hbox|mathrm|rm)\s*\{\s*([msghLlNJWVAK](?:\s*/\s*[a-z]+)?)\s*\}"
    r"(\s*\^\s*\{?\d\}?)?\s*$"
)


def _without_letter_unit(text: str) -> tuple[str, Unit | None]:
    r"""One letter is a unit only where it is set upright: 5\text{ m} is a length, 5m a product."""
    found = _LETTER_UNIT.search(text)
    if not found:
        return text, None
    return text[: found.start()], read_unit(found[1] + (found[2] or ""))


def _unwrap_text(text: str) -> str:
    r"""`\text{ cm}` -> ` cm`: words stay words, but numbers and units in text count like bare ones.

    A function's name keeps its backslash.
    """
    for _ in range(3):
        text, found = _TEXT.subn(_plain_words, text)
        if not found:
            break
    return text


def _plain_words(match: re.Match[str]) -> str:
    content = match[2].strip()
    if match[1] in {"operatorname", "mathrm"} and _FUNCTIONS.fullmatch(content):
        return f"\\{content} "
    if match[1] in {"mathrm", "operatorname", "mathbf"} and re.fullmatch("[a-zA-Z]", content):
        return content if match[1] != "mathrm" or content in "eidABCDEFGHIJ" else f" {content} "
    return f" {content} " if re.search("[a-zA-Z]", content) else content


_SCALE = {"C": Unit((("celsius", 1),)), "F": Unit((("fahrenheit", 1),))}


def _without_degrees(text: str) -> tuple[str, Unit | None]:
    r"""Degrees are dropped, except beside a function, where `\sin 30^\circ` is not `\sin 30`."""
    text = re.sub(r"\s*(?<![\\a-zA-Z])deg(?:rees?)?\b", r"^\\circ", text)
    if _TRIGONOMETRIC.search(text):
        return text, None
    found = re.search(r"(?:\\circ|\\degrees?)\s*\}?\s*([CF])?\s*$", text)
    unit = _SCALE.get(found[1], DEGREE) if found else None
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF]\b)?|\\degrees?(?![a-zA-Z])", " ", text)
    text = re.sub(r"(?<=\d)\s*\\?%\s*(?=\d)", r" \\bmod ", text)
    percent = r"\\?%|(?<=[\da-z])\s*\b(?:pct|per\s?cent(?:age)?)\b\.?"
    return re.sub(percent, r"\\%", text), unit


def without_degrees(text: str) -> str:
    r"""`\sin 30^\circ` -> `\sin 30`."""
    return _ANGLE.sub(r"\1", text)


def in_radians(text: str) -> str:
    r"""`\sin 30^\circ` -> `\sin (\frac{30 \pi}{180})`."""
    return _ANGLE.sub(r"(\\frac{\1 \\pi}{180})", text)


def _without_primes(text: str) -> tuple[str, Unit | None]:
    """`15'` -> `15`, minutes or feet."""
    if parts := re.fullmatch(r"(\d+)\s+(\d+)\s*'", text):  # 30^\circ 15', whose circle is gone
        return rf"\frac{{{60 * int(parts[1]) + int(parts[2])}}}{{60}}", DEGREE
    found = re.fullmatch(r"([\d.]+)\s*('{1,2})", text)
    if not found:
        return text, None
    return found[1], PRIME if found[2] == "'" else DOUBLE_PRIME


# --- numbers and lists --------------------------------------------------------------------------


def _join_thousands(text: str) -> str:
    """`1,234` and `1 234` -> `1234`, where no bracket makes the commas separate elements."""

    def joined(match: re.Match[str]) -> str:
        before = text[: match.start()]
        depth = sum(before.count(b) for b in "([") - sum(before.count(b) for b in ")]")
        return match[0] if depth > 0 else match[0].replace(",", "")

    text = re.sub(
        r"(?<![\d.,] )(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,]|\s*[\d/\\])",
        lambda m: m[0].replace(" ", ""),
        text,
    )
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\s*\d)", joined, text)


_MIXED = (
    re.compile(r"(?<![\w.}^_)/])(\d{1,12})\s*\\frac\{(\d{1,12})\}\{(\d{1,12})\}"),
    re.compile(r"(?<![\w.}^_)/])(\d{1,12})\s+(\d{1,12})\s*/\s*(\d{1,12})(?![\w.])"),
)


def _mixed_numbers(text: str) -> str:
    r"""`1\frac{2}{3}` and `1 2/3` -> `\frac{5}{3}`."""
    for pattern in _MIXED:
        text = pattern.sub(_improper, text)
    return text


def _improper(match: re.Match[str]) -> str:
    whole, top, bottom = (int(part) for part in match.groups())
    if top >= bottom:
        return match[0]
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}"


_TWO_FORMS = re.compile(
    r"([^,;]+?)\s*[,;]?\s*"
    r"(?:\(\s*=|\(?\s*\b(?:or|i\.?\s?e\.?,?|that\s+is,?|equivalently,?)\s)\s*([^,;]+?)\s*\)?"
)


def _of_two_forms(text: str) -> str:
    r"""`\frac12 or 0.5` -> `\frac12`: one number in two forms, of which the exact one counts."""
    found = _TWO_FORMS.fullmatch(text) if len(text) < 200 else None
    if not found:
        return text
    left, right = found[1].removesuffix("(").strip(), found[2]
    a, b = read_number(left), read_number(right)
    if a and b:
        exact = right if a.is_decimal and not b.is_decimal else left
        return exact if same_number(a, b) or same_number(b, a) else text
    return left if same_value(left, right) else text


def _join_conjunctions(text: str) -> str:
    """`3 and 5`, `3 or 5`, `3, 5, and 7` -> elements with commas between."""
    if not re.search(r"(?:[\d}=)\]]|\b[A-Z]|\b[a-z])\s*,?\s*(?:and|or)\b", text):
        return text
    if re.search(r"[<>]|\\[lgn]e(?![a-zA-Z])", text):  # of inequalities, which one matters
        return re.sub(r"\s*,?\s*(?<![a-zA-Z\\])(and|or)(?=[\s\d\-\\(])\s*", r" \\l\1 ", text)
    return re.sub(r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?=[\s\d\-\\(\[a-zA-Z])\s*", ", ", text)


_ABOUT = re.compile(
    r"(?<!\\)\b(?:or\s+)?(?:about|approximately|approx\.?|roughly|around)\s*(?=[-\d\\.])",
    re.IGNORECASE,
)
_IN_BRACKETS = re.compile(r",?\s*\(\s*(\\approx[^()]*)\)$")


def _without_approximation(text: str) -> str:
    r"""`a \approx b` -> `a`, the exact one, where `a` is more than a name; both of numbers that are
    far apart."""
    text = _IN_BRACKETS.sub(r" \1", _ABOUT.sub(r"\\approx ", text))
    left, sign, right = text.partition(r"\approx")
    if not sign:
        return left
    left = left.rstrip(" ,;(")
    if re.fullmatch(r"\s*[a-zA-Z]?", left):
        return right
    exact, near = read_number(left), read_number(right.strip())
    error = abs(exact.value - near.value) if exact and near else 0
    # 4 may be the rounding of 4.3
    far = exact and error > max(abs(exact.value) / 100, Fraction(exact.value.denominator == 1, 2))
    return f"{left}, {right}" if far else left
