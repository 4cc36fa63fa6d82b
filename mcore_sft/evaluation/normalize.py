r"""An answer as somebody wrote it in, one canonical way of writing it out.

    "$\dfrac12\text{ cm}^2$."  ->  "\frac{1}{2}"

Both sides of a comparison go through here. Nothing is evaluated beyond mixed numbers: the meaning
is for `equivalence`, this is about spelling alone.
"""

import re
import unicodedata
from fractions import Fraction

_UNICODE = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{HYPHEN}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DIVISION SIGN}": "/",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{BULLET OPERATOR}": r"\cdot ",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{INFINITY}": r"\infty ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{MASCULINE ORDINAL INDICATOR}": r"^\circ ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{SQUARE ROOT}": r"\sqrt ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{GREEK SMALL LETTER THETA}": r"\theta ",
    "\N{GREEK SMALL LETTER ALPHA}": r"\alpha ",
    "\N{GREEK SMALL LETTER BETA}": r"\beta ",
    "\N{FRACTION SLASH}": "/",
    "\N{VULGAR FRACTION ONE HALF}": " 1/2",
    "\N{VULGAR FRACTION ONE QUARTER}": " 1/4",
    "\N{VULGAR FRACTION THREE QUARTERS}": " 3/4",
    "\N{VULGAR FRACTION ONE THIRD}": " 1/3",
    "\N{VULGAR FRACTION TWO THIRDS}": " 2/3",
    "\N{EURO SIGN}": "",
    "\N{POUND SIGN}": "",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{NO-BREAK SPACE}": " ",
    "\N{ZERO WIDTH SPACE}": "",
}
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207f"
_SUPERSCRIPTS = str.maketrans(_RAISED, "0123456789-n")
_SUBSCRIPTS = {0x2080 + digit: str(digit) for digit in range(10)}

_UNITS = (
    "units?|square|cubic|sq|cu|centimet(?:er|re)s?|millimet(?:er|re)s?|kilomet(?:er|re)s?|"
    "met(?:er|re)s?|inch(?:es)?|feet|foot|ft|yards?|yds?|miles?|mi|cm|mm|km|kg|mg|grams?|"
    "kilograms?|pounds?|lbs?|ounces?|oz|lit(?:er|re)s?|ml|gallons?|seconds?|secs?|minutes?|mins?|"
    "hours?|hrs?|days?|weeks?|months?|years?|yrs?|mph|kph|dollars?|cents?|usd|degrees?|deg|"
    "radians?|per|an|a|of|the|people|students?|ways?|points?|times|coins?|marbles?|apples?|in|"
    "(?:[kcm]?m|mi|ft)/(?:s|h|hr|sec|min)"
)  # fmt: skip
_UNIT_TAIL = re.compile(
    rf"(?:[\s/.\-]*\b(?:{_UNITS})\b\.?(?:\s*\^\s*(?:\{{\s*\d\s*\}}|\d))?)+\s*$", re.IGNORECASE
)
_NUMERIC = re.compile(r"(?:\\(?:frac|sqrt|pi|times|cdot|pm)\b|[\d\s.,/^{}()+\-])*\d[\d\s{}().!]*"
                      r"(?:\\pi\s*)?")  # fmt: skip
_TEXT = re.compile(
    r"\\(text|mbox|mathrm|textrm|textnormal|textbf|mathbf|textit|mathit|textsf|texttt|mathsf|bf|rm|"
    r"operatorname)\s*\*?\s*\{([^{}]*)\}"
)
# One letter is a unit only where it is set upright: 5\\text{ m} is a length, 5m a product.
_LETTER_UNIT = re.compile(
    r"(?<=\d)\s*\\(?:text|textrm|mbox|mathrm|rm)\s*\{\s*[msghLlNJWVAK](?:\s*/\s*[a-z]+)?\s*\}"
    r"(?:\s*\^\s*\{?\d\}?)?\s*$"
)
_ORDINAL = re.compile(r"(\d+)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\s*\}?\.?", re.IGNORECASE)
_FUNCTIONS = re.compile("(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|min|max|gcd|lcm")
_ANGLE = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?")
_TRIGONOMETRIC = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")

_MARKUP = (
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|!)(?![a-zA-Z])", ""),
    (r"\\(?:left|right)(?=[a-zA-Z\\|(\[.])", ""),
    (r"\\(?:dfrac|tfrac|cfrac)(?![a-zA-Z])", r"\\frac"),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
    (r"\\leq(?:slant)?(?![a-zA-Z])", r"\\le "),
    (r"\\geq(?:slant)?(?![a-zA-Z])", r"\\ge "),
    (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
    (r"(?<![<>=])>=|=>", r"\\ge "),
    (r"<=", r"\\le "),
    (r"\\(?:begin|end)\s*\{[bBvp]?matrix\}", lambda m: re.sub(r"[bBvp]?matrix", "pmatrix", m[0])),
)  # fmt: skip
_GROUPS = (
    (r"(?<=\d)\s*\{,\}\s*(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\{?,\}?\s*\\!\s*(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", ","),
)
_SPACES = (
    (r"\\(?:quad|qquad|enspace|thinspace|hspace\*?\{[^{}]*\})(?![a-zA-Z])", " "),
    (r"(?<!\\)\\[,;:> ]|(?<!\\)~", " "),
    (r"\\phantom\s*(?:\{[^{}]*\}|.)", " "),
    (r"\\\\\s*\[[\d.]+\s*[a-z]{2}\]", r"\\\\"),  # \\[2mm], a line break with its height
)
_PLAIN = (
    (r"(?<![\\a-zA-Z])(?:sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\d+)(?!\d)", r"\\sqrt{\1}"),
    (r"\\sqrt\s+([a-zA-Z])", r"\\sqrt{\1}"),
    (r"\\sqrt\s+\{", r"\\sqrt{"),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![\\a-zA-Z])(?:inf|infty|infinity)(?![a-zA-Z])", r"\\infty "),
    (r"(?<=[\w)}])\s*\*\*\s*\(([^()]*)\)", r"^{\1}"),
    (r"(?<=[\w)}])\s*\*\*\s*(-?\d+|[a-zA-Z])", r"^{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\^\s*-\s*(\d+|[a-zA-Z])", r"^{-\1}"),
    (r"\s*\*\s*(?=\\sqrt|\\pi|\\frac)", " "),
    (r"\*", r"\\cdot "),
    (r"(?<=\d)\s*(?=\(\d+\)$|\(\\frac)", r" \\cdot "),
    # intervals and vectors as they are written elsewhere: ]0, 1[ and <1, 2>
    (r"(?<![\w)\]}])\]([^][]+[,;][^][]+)\[", r"(\1)"),
    (r"(?<![\w)\]}])\]([^][]+[,;][^][]+)\]", r"(\1]"),
    (r"\[([^][]+[,;][^][]+)\[", r"[\1)"),
    (r"^<([^<>]+,[^<>]+)>$", r"(\1)"),
    (r"^\\\{\s*([a-zA-Z])\s*(?::|\||\\mid)\s*(.*\1.*)\\\}$", r"\2"),  # \{x : 0 < x < 1\}
    (r"(?<=\d)\s*\\cdot\s*(?=i(?![a-zA-Z]))", ""),
    (r"(?<=[\])])\s*U\s*(?=[\[(])", r" \\cup "),
    (r"(?<=[\da-zA-Z])\s+base\s+(\d+)$", r"_{\1}"),
    (r"\\frac\s*(\\pi|\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\d|[a-zA-Z])", r"\\frac\1{\2}"),
    (r"\\frac\s+\{", r"\\frac{"),
    (r"\\frac(\{[^{}]*\})\s+\{", r"\\frac\1{"),
    (r"_\s*\{?\s*\(?(?:base\s*)?(\d+)\)?\s*\}?", r"_{\1}"),
    (r"(?<![a-zA-Z_^])\{([a-zA-Z][a-zA-Z ]+)\}$", r" \1"),
)  # fmt: skip


def normalize(answer: str, *, thousands: bool = True) -> str:
    """The canonical spelling of `answer`; equal results mean the same answer.

    Without `thousands`, commas between digits part the elements of a list.
    """
    text = _from_unicode(answer)
    text = _without_wrapping(text)
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    text = _apply(_GROUPS, text)
    text = _apply(_MARKUP, text)
    text = _without_currency(text)
    text = re.sub(r"\\text(?:normal)?\s*\{\s*(?:and|or)\s*\}", ", ", text)
    text = _LETTER_UNIT.sub("", _apply(_SPACES, text))
    text = _unwrap_text(text)
    text = _without_degrees(text)
    text = _apply(_PLAIN, text)
    text = _without_units(_scaled(text))
    text = _join_thousands(text) if thousands else text
    text = _mixed_numbers(text)
    text = re.sub(r"\s*,\s*(?:,\s*)+|\s+,\s*", ", ", _join_conjunctions(text))
    text = _without_approximation(text)
    text = re.sub(r"\s+", " ", text).lstrip(" ;:,'\"").rstrip(' .;:,"\\')
    return re.sub(r"(?<=\d)\s*'$", "", text)


def _apply(rules: tuple[tuple[str, object], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)  # type: ignore[call-overload]
    return text


def _from_unicode(text: str) -> str:
    text = re.sub(f"[{_RAISED}]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[\u2080-\u2089]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    for sign, latex in _UNICODE.items():
        text = text.replace(sign, latex)
    return unicodedata.normalize("NFKC", text)


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
        inner = re.sub(r"(?<!\\)[.\s]+$", "", text.strip())
        for wrapper in _WRAPPERS:
            match = wrapper.fullmatch(inner)
            if match and not inner.endswith(r"\$"):
                inner = match[1].strip()
        if inner == text:
            return text
        text = inner


def _without_currency(text: str) -> str:
    return re.sub(r"\\?\$|\\pounds(?![a-zA-Z])|\\euro(?![a-zA-Z])", "", text)


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


def _without_degrees(text: str) -> str:
    r"""Degrees are dropped, except beside a function, where `\sin 30^\circ` is not `\sin 30`."""
    text = re.sub(r"\s*(?<![\\a-zA-Z])deg(?:rees?)?\b", r"^\\circ", text)
    if _TRIGONOMETRIC.search(text):
        return text
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF]\b)?|\\degrees?(?![a-zA-Z])", " ", text)
    return re.sub(r"\\?%|(?<=\d)\s*\b(?:pct|percent)\b\.?", r"\\%", text)


def without_degrees(text: str) -> str:
    r"""`\sin 30^\circ` -> `\sin 30`."""
    return _ANGLE.sub(r"\1", text)


def in_radians(text: str) -> str:
    r"""`\sin 30^\circ` -> `\sin (\frac{30 \pi}{180})`."""
    return _ANGLE.sub(r"(\\frac{\1 \\pi}{180})", text)


_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(
    rf"(?<![\d.,}}])(\d[\d,]*(?:\.\d+)?)\s*({'|'.join(_SCALES)})(?![a-zA-Z])", re.IGNORECASE
)


def _scaled(text: str) -> str:
    """`2.5 million` -> `2500000`, where no digit is left behind the point."""

    def whole(match: re.Match[str]) -> str:
        value = Fraction(match[1].replace(",", "")) * 10 ** _SCALES[match[2].lower()]
        return str(value.numerator) if value.denominator == 1 else match[0]

    return _SCALED.sub(whole, text)


def _without_units(text: str) -> str:
    """Drop words of measure at the end, where what they measure is a number and nothing else."""
    if ordinal := _ORDINAL.fullmatch(text.strip()):
        return ordinal[1]
    tail = _UNIT_TAIL.search(text)
    if tail and _NUMERIC.fullmatch(text[: tail.start()].strip()):
        return text[: tail.start()]
    words = re.fullmatch(
        r"(.*?\d\)?)((?:\s+(?:of|in|to|at|on|[a-zA-Z]{3,}))+)(?:\s*\^\s*\{?\d\}?)?\.?\s*", text
    )
    if words and _NUMERIC.fullmatch(words[1].strip()) and not _joins(words[2]):
        return words[1]
    return text


_CHANGES_VALUE = re.compile(
    r"\b(?:and|or|mod|base|than|hundreds?|thousands?|[mb]illions?|trillions?|dozens?|halves|half|"
    r"thirds?|quarters?|\w+ths?|plus|minus|times|over|squared|cubed|factorial|negative|sqrt|root|"
    r"less|more|least|most|greater|fewer|not|divided|by)\b",
    re.IGNORECASE,
)


def _joins(words: str) -> bool:
    """Whether `words` say more of a number than what it counts: a scale, a fraction, a sum."""
    return bool(_CHANGES_VALUE.search(words))


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


def _join_conjunctions(text: str) -> str:
    """`3 and 5`, `3 or 5`, `3, 5, and 7` -> elements with commas between."""
    if not re.search(r"[\d}=)]\s*,?\s*(?:and|or)\b", text):
        return text
    return re.sub(r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?=[\s\d\-\\(a-zA-Z])\s*", ", ", text)


def _without_approximation(text: str) -> str:
    r"""`a \approx b` -> `a`, the exact one, where `a` is more than a name."""
    left, sign, right = text.partition(r"\approx")
    if not sign:
        return text
    return right if re.fullmatch(r"\s*[a-zA-Z]?\s*", left) else left
