r"""An answer as somebody wrote it in, one canonical way of writing it out.

    "$\dfrac12\text{ cm}^2$."  ->  "\frac{1}{2}"

Both sides of a comparison go through here. Nothing is evaluated beyond mixed numbers: the meaning
is for `equivalence`, this is about spelling alone.
"""

import re
import unicodedata

from mcore_sft.evaluation.units import scaled, without_units

_UNICODE = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{HYPHEN}": "-",
    "\N{NON-BREAKING HYPHEN}": "-",
    "\N{CUBE ROOT}": r"\sqrt[3] ",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots ",
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
    **{
        sign: f" {top}/{bottom}"
        for sign, top, bottom in zip("⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "1234151357", "5555668888", strict=True)
    },
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

_TEXT = re.compile(
    r"\\(text|mbox|mathrm|textrm|textnormal|textbf|mathbf|textit|mathit|textsf|texttt|mathsf|bf|rm|"
    r"operatorname)\s*\*?\s*\{([^{}]*)\}"
)
# One letter is a unit only where it is set upright: 5\\text{ m} is a length, 5m a product.
_LETTER_UNIT = re.compile(
    r"(?<=\d)\s*\\(?:text|textrm|mbox|mathrm|rm)\s*\{\s*[msghLlNJWVAK](?:\s*/\s*[a-z]+)?\s*\}"
    r"(?:\s*\^\s*\{?\d\}?)?\s*$"
)
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
    (r"\\neq(?![a-zA-Z])|(?<!\d)!=|\\not\s*=", r"\\ne "),
    (r"\\(?:text|math)?color(?:box)?\s*\{[a-zA-Z]+\}", ""),
    (r"\\(?:boldsymbol|bm|underline)\s*\{([^{}]*)\}", r"\1"),
    (r"\{\s*\\(?:bf|rm|it|boldmath)(?![a-zA-Z])([^{}]*)\}", r"\1"),
    (r"\\(?:checkmark|blacksquare|square|qed|Box)(?![a-zA-Z])", ""),
    (r"\\(?:vee|lor)(?![a-zA-Z])", ", "),
    (r"\+\s*/\s*-", r"\\pm "),
    (r"\\(?:ldots|dots|cdots|dotsc)(?![a-zA-Z])|\.\.\.", r"\\ldots "),
    (r"(\d*\.\d*?)(\d)\2{2,}\s*\\ldots\s*$", r"\1\\overline{\2}"),  # 0.333...
    (r"(\d*\.\d*?)(\d{2,6}?)\2+\s*\\ldots\s*$", r"\1\\overline{\2}"),  # 0.1212...
    (r"(\d*\.\d*?)(\d)\s+(?:repeating|recurring)\s*$", r"\1\\overline{\2}"),
    (r"(\d*\.\d*)\((\d+)\)\s*$", r"\1\\overline{\2}"),
    (r"\\dot\s*\{(\d)\}", r"\\overline{\1}"),
    (r"\\begin\s*\{cases\}(.*?)\\end\s*\{cases\}", lambda m: m[1].replace(r"\\", ",")),
    (r"(?<![<>=])>=|=>", r"\\ge "),
    (r"<=", r"\\le "),
    (r"\\(?:begin|end)\s*\{[bBp]?matrix\}", lambda m: re.sub(r"[bBp]?matrix", "pmatrix", m[0])),
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
    (r"\\sqrt\s*(\[\d+\])\s*(\d+|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt\1{\2}"),
    (r"\\log\s*_\s*\{?e\}?(?![a-zA-Z])", r"\\ln "),
    (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    (r"(?<![\\a-zA-Z])(?:inf|infty|infinity)(?![a-zA-Z])", r"\\infty "),
    (r"(?<=[\w)}])\s*\*\*\s*\(([^()]*)\)", r"^{\1}"),
    (r"(?<=[\w)}])\s*\*\*\s*(-?\d+|[a-zA-Z])", r"^{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\^\s*-\s*(\d+|[a-zA-Z])", r"^{-\1}"),
    (r"\s*\*\s*(?=\\sqrt|\\pi|\\frac)", " "),
    (r"\*", r"\\cdot "),
    (r"(?<![_\d])(?<!_\{)(\d+)\s*(?=\(\d+\)$|\(\\frac)", r"\1 \\cdot "),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r" \\times "),
    (r"(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|cot|csc|exp|ln|log)(?![a-zA-Z])", r"\\\1 "),
    (r"^(\d+)\s+(?:out\s+of|in)\s+(\d+)$", r"\\frac{\1}{\2}"),
    (r"^(\d+)\s+to\s+(\d+)$", r"\1:\2"),
    (r"^=\s*", ""),
    # intervals and vectors as they are written elsewhere: ]0, 1[ and <1, 2>
    (r"(?<![\w)\]}])\]([^][()]{1,80}[,;][^][()]{1,80})\[", r"(\1)"),
    (r"(?<![\w)\]}])\]([^][()]{1,80}[,;][^][()]{1,80})\]", r"(\1]"),
    (r"\[([^][()]{1,80}[,;][^][()]{1,80})\[", r"[\1)"),
    (r"^<([^<>]+,[^<>]+)>$", r"(\1)"),
    (r"\\in\s*\\mathbb\s*\{?R\}?\s*(?=:|\||\\mid)", ""),
    (r"^\\\{\s*([a-zA-Z])\s*(?::|\||\\mid)\s*(.*\1.*)\\\}$", r"\2"),  # \{x : 0 < x < 1\}
    (r"(?<=\d)\s*\\cdot\s*(?=i(?![a-zA-Z]))", ""),
    (r"(?<=[\])])\s*U\s*(?=[\[(])", r" \\cup "),
    (r"(?<=[\da-zA-Z])\s+\(?(?:in\s+)?base\s+(\d+)\)?\s*$", r"_{\1}"),
    (r"^\((\w+)\)\s*(?=_)", r"\1"),
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
        text = re.sub(r"\s*(?:\\\\|\\?&)\s*", ", ", text)
    text = _apply(_GROUPS, text)
    text = _without_braces(_apply(_MARKUP, text).strip())
    text = _without_currency(text)
    text = re.sub(r"\\text(?:normal)?\s*\{\s*(and|or)\s*\}", r" \1 ", text)
    text = _LETTER_UNIT.sub("", _apply(_SPACES, text))
    text = _unwrap_text(text)
    text = _without_degrees(text)
    text = _apply(_PLAIN, text)
    text = without_units(scaled(text))
    text = _join_thousands(text) if thousands else text
    text = _mixed_numbers(text)
    text = re.sub(r"\s*,\s*(?:,\s*)+|\s+,\s*", ", ", _join_conjunctions(text))
    text = _without_approximation(text)
    text = re.sub(r"\s+", " ", text).lstrip(" ;:,'\"").rstrip(' .;:,"\\')
    return re.sub(r"^([\d.]+)\s*'$", r"\1", text)


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
        inner = re.sub(r"(?<![\\.])\.$", "", text.strip()).strip()
        for wrapper in _WRAPPERS:
            match = wrapper.fullmatch(inner)
            if match and not inner.endswith(r"\$"):
                inner = match[1].strip()
        if inner == text:
            return text
        text = inner


def _without_braces(text: str) -> str:
    """`{(1, 2)}` -> `(1, 2)`, as colours leave it."""
    while re.fullmatch(r"\{.*(?<!\\)\}", text, re.DOTALL) and r"\choose" not in text:
        depth = [0]
        for sign in text[:-1]:
            depth.append(depth[-1] + (sign == "{") - (sign == "}"))
        if 0 in depth[1:]:
            break
        text = text[1:-1].strip()
    return text


def _without_currency(text: str) -> str:
    return re.sub(r"\\?\$|\\(?:pounds|euro)(?![a-zA-Z])|[¥¢₹]|^Rs\.?(?=\s*\d)", "", text)


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
    if not re.search(r"(?:[\d}=)]|\b[A-Z]|\b[a-z])\s*,?\s*(?:and|or)\b", text):
        return text
    if re.search(r"[<>]|\\[lgn]e(?![a-zA-Z])", text):  # of inequalities, which one matters
        return re.sub(r"\s*,?\s*(?<![a-zA-Z\\])(and|or)(?=[\s\d\-\\(])\s*", r" \\l\1 ", text)
    return re.sub(r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?=[\s\d\-\\(a-zA-Z])\s*", ", ", text)


def _without_approximation(text: str) -> str:
    r"""`a \approx b` -> `a`, the exact one, where `a` is more than a name."""
    left, sign, right = text.partition(r"\approx")
    if not sign:
        return text
    return right if re.fullmatch(r"\s*[a-zA-Z]?\s*", left) else left
