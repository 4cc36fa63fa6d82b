r"""Signs of Unicode in, LaTeX out; what cannot be seen, and pictures, out altogether.

"√3 ≤ x²"  ->  "\sqrt 3 \le  x^{2}"
"""

import re
import unicodedata

_LATEX = {
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
    "\N{BULLET}": r"\cdot ",
    "\N{RIGHTWARDS ARROW}": r"\rightarrow ",
    "\N{RIGHTWARDS DOUBLE ARROW}": r"\Rightarrow ",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{INFINITY}": r"\infty ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{MASCULINE ORDINAL INDICATOR}": r"^\circ ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{IDENTICAL TO}": r"\equiv ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{SQUARE ROOT}": r"\sqrt ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{SET MINUS}": r"\setminus ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{DOUBLE-STRUCK CAPITAL R}": r"\mathbb{R}",
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
    "\N{THEREFORE}": "",
    "\N{END OF PROOF}": "",
    "\N{PRIME}": "'",
    "\N{DOUBLE PRIME}": "''",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
}
_OF_LATEX = str.maketrans(_LATEX)
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207f"
_SUPERSCRIPTS = str.maketrans(_RAISED, "0123456789-n")
_SUBSCRIPTS = {0x2080 + digit: str(digit) for digit in range(10)}
# Of Unicode's categories: formats, what is private or has no meaning, and pictures.
_UNSEEN = {"Cf", "Co", "Cn", "So"}
_VARIATIONS = ("\N{VARIATION SELECTOR-1}", "\N{VARIATION SELECTOR-16}")


def from_unicode(text: str) -> str:
    """`text` in LaTeX's signs; letters of other alphabets stay."""
    if text.isascii():
        return text
    text = re.sub(f"[{_RAISED}]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[\u2080-\u2089]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    return "".join(map(_plain, unicodedata.normalize("NFKC", text.translate(_OF_LATEX))))


def _plain(sign: str) -> str:
    if sign.isascii():
        return sign
    kind = unicodedata.category(sign)
    if kind in _UNSEEN or _VARIATIONS[0] <= sign <= _VARIATIONS[1]:
        return ""
    return " " if kind == "Zs" else sign
