r"""An answer in LaTeX in, the same without sizes, colours, fonts and frames out.

"{\\large \\underline{42}}"  ->  "{ 42}"
"""

import re

from mcore_sft.evaluation.grading.read.latex import group_end
from mcore_sft.evaluation.grading.read.rules import apply, rules

_SWITCHES = (
    "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm|it|sf|tt|em|sl|"
    "boldmath|displaystyle|textstyle|scriptstyle|scriptscriptstyle|limits|nolimits|mathstrut|strut|"
    "centering|noindent|hfill|therefore|because|checkmark|blacksquare|square|qed|Box"
)
_DRESSES = (
    "boldsymbol|bm|pmb|underline|uline|underbrace|overbrace|ensuremath|mathord|mathbin|mathop|"
    "framebox|boxed|fbox|mathnormal|smash"
)
_LAYOUT = rules(
    (r"\\(?:left|right|[bB]igg?[lrm]?|!)(?![a-zA-Z])", ""),
    (r"\\(?:left|right)(?!arrow|harpoon)(?=[a-zA-Z\\|(\[.])", ""),
    (rf"\\(?:{_SWITCHES})(?![a-zA-Z])(?!(?<=\\bf|\\rm)\s*\{{)", " "),
    (r"\\(?:text|math)?color(?:box)?\s*(?:\[\w*\])?\s*\{[\w!.,#\s\-]+\}", ""),
    (r"\\(?:raisebox|tag|label|vspace)\*?\s*\{[^{}]*\}", ""),
    (r"\\(?:bbox|enclose)\s*(?:\[[^][]*\]|\{\w*\})", ""),
    (r"^\s*\\(?:implies|Rightarrow|Longrightarrow|rightarrow|to)(?![a-zA-Z])", ""),
)  # fmt: skip
_DRESS = re.compile(rf"\\(?:{_DRESSES})\s*(?=\{{)")


def without_layout(text: str) -> str:
    """Without sizes, colours, fonts and frames."""
    text = apply(_LAYOUT, text)
    while found := _DRESS.search(text):
        end = group_end(text, found.end())
        if end < 0:
            break
        inner = text[found.end() + 1 : end - 1]
        kept = inner if re.fullmatch(r"[\w.\s]*", inner) else f"{{{inner}}}"
        text = text[: found.start()] + kept + text[end:]
    return text


def without_braces(text: str) -> str:
    """`{(1, 2)}` -> `(1, 2)`, as colours leave it."""
    while text.startswith("{") and group_end(text, 0) == len(text):
        text = text[1:-1].strip()
    return text
