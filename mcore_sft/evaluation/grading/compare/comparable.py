r"""Two answers as they are written in, two texts in canonical spelling out that can be compared.

    "x = 5 \text{ cm}", "\text{Answer: } 0.05\text{ m}"  ->  "5", "\frac{100}{1} \cdot (0.05)"

What only one of both says is taken off (names, units, letters of choices, labels), and what can be
written in two ways (sets of numbers, points, binomials) is brought into the way of the other.
"""

import re
from fractions import Fraction
from math import prod

from mcore_sft.evaluation.grading.compare.inequalities import as_intervals, bounded_letters
from mcore_sft.evaluation.grading.compare.names import without_names
from mcore_sft.evaluation.grading.compare.scalars import numeral_value
from mcore_sft.evaluation.grading.compare.series import read_series
from mcore_sft.evaluation.grading.read.normalize import (
    Spelled,
    in_radians,
    spell,
    squeeze,
    without_degrees,
)
from mcore_sft.evaluation.grading.read.number import read_number
from mcore_sft.evaluation.grading.read.units import (
    DEGREE,
    RADIAN,
    Unit,
    in_units_of,
    read_unit,
    without_units,
)


def forms(gold: str) -> tuple[str, ...]:
    r"""The forms in which a gold answer is given: `\$\frac23 \approx \$0.67` is two."""
    exact, sign, rounded = gold.partition(r"\approx")
    if sign and exact.strip() and rounded.strip():
        return gold, rounded
    sides = gold.split("=")
    if len(sides) > 1 and all(read_number(spell(side).text) for side in sides):
        return tuple(sides)
    return (gold,)


def comparable(gold: str, prediction: str) -> tuple[str, str] | None:
    """Both in canonical spelling, without names, units and letters of choices; none where their
    units measure different things."""
    left, right = spell(gold), spell(prediction)
    left, right = _with_letter_unit(left, right.unit), _with_letter_unit(right, left.unit)
    scaled = _in_unit_of(left, right)
    if scaled is None or _oppose(gold, prediction):
        return None
    return _alike(gold, prediction, left.text, scaled)


def _alike(gold: str, prediction: str, left: str, right: str) -> tuple[str, str]:
    # 200,100 is a list where the other is one
    if "," in left and "," in prediction and "," not in right:
        right = _as_list(prediction, right, like=left)
    elif right.count(",") > 1 and "," in gold and "," not in left:
        left = _as_list(gold, left, like=right)
    left, right = _without_labels(left, right)
    if _bare_angles(left) != _bare_angles(right):
        left, right = in_radians(left), in_radians(right)
    else:  # many leave the degrees of an angle out
        left = right = without_degrees(left)
    left, right = without_names(*_without_choices(left, right))
    if _is_region(left) or _is_region(right):
        letters = bounded_letters(left), bounded_letters(right)
        if not (letters[0] and letters[1]) or letters[0] == letters[1]:
            left, right = as_intervals(left) or left, as_intervals(right) or right
    left, right = (re.sub(r"\s*\\l(?:and|or)(?![a-zA-Z])", ",", text) for text in (left, right))
    left, right = _without_set(*_points(left, right))
    return _evaluated(left, other=right), _evaluated(right, other=left)


# --- units ---------------------------------------------------------------------------------------


_LETTER_UNIT = re.compile(r"(\d[\d.]*)\s*([a-zA-Z])\s*(\^\s*\{?\s*\d\s*\}?)?")


def _with_letter_unit(text: Spelled, other: Unit | None) -> Spelled:
    """`3000 m` as a length where the other side is one; elsewhere it may be a product."""
    found = _LETTER_UNIT.fullmatch(text.text) if other and not text.unit else None
    unit = read_unit(found[2] + (found[3] or "")) if found else None
    if not found or not unit or not other or unit.powers != other.powers:
        return text
    return Spelled(found[1], unit)


def _in_unit_of(gold: Spelled, given: Spelled) -> str | None:
    """The text of `given` as a number of units of `gold`; none where they measure other things."""
    unit, of_given = gold.unit, given.unit
    if DEGREE in {unit, of_given}:  # pi/6 without a unit are radians
        unit = unit or (RADIAN if r"\pi" in gold.text else None)
        of_given = of_given or (RADIAN if r"\pi" in given.text else None)
    if unit is None or of_given is None:
        percent = [each.text.endswith(r"\%") for each in (gold, given)]
        return None if any(percent) and (unit or of_given) and not all(percent) else given.text
    factor = in_units_of(unit, of_given)
    if not factor:
        return factor if factor is None else given.text
    name, equals, quantity = given.text.rpartition("=")
    series = read_series(quantity)
    if series is None or len(series.parts) > 1:
        return None
    number, scale = read_number(quantity.strip()), read_number(factor)
    if number and scale:
        return f"{name}{equals} {_fraction(number.value * scale.value)}".strip()
    return rf"{name}{equals} {factor} \cdot ({quantity.strip()})".strip()


def _fraction(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


_OPPOSITES = tuple(
    tuple(re.compile(rf"(?<![a-z\\])(?:{words})(?![a-z])", re.IGNORECASE) for words in pair)
    for pair in (
        ("increased?|gain(?:ed)?|profit|more|growth", "decreased?|loss|lost|less|fewer|discount"),
        ("north|northern", "south|southern"),
        ("east|eastern", "west|western"),
        ("left", "right"),
        ("up|upwards?", "down|downwards?"),
    )
)


def _oppose(left: str, right: str) -> bool:
    """Whether one says `decrease` where the other says `increase`."""
    for one, other in _OPPOSITES:
        said = [(bool(one.search(text)), bool(other.search(text))) for text in (left, right)]
        if sorted(said) == [(False, True), (True, False)]:
            return True
    return False


# --- lists, labels, choices ----------------------------------------------------------------------


def _as_list(answer: str, number: str, *, like: str) -> str:
    """`answer` with commas that part elements, if those are as many as in `like`; else `number`."""
    listed = spell(answer, thousands=False).text
    parts, wanted = read_series(listed), read_series(like)
    if not parts or not wanted or len(parts.parts) != len(wanted.parts):
        return number
    return number if any(re.match(r"0\d", part) for part in parts.parts) else listed


_LABEL = re.compile(
    r"(?!.*\b(?:not|never|no|wrong|incorrect|cannot|impossible|false)\b)"
    r"[^\W\d_][^\W\d_ ]{2,}(?: [^\W\d_]+){0,3}\s*:\s*(?=\S)"
    r"|(?:the\s+)?(?:final\s+)?answer\s+is\s*:?\s*",
    re.IGNORECASE,
)
# Which of them it is, `_oppose` has looked at.
_CHANGE = re.compile(
    r"^(?:an?\s+)?(?:increased?|decreased?|discount|profit|loss|gain)\s+(?:of|by)\s+", re.IGNORECASE
)


def _without_labels(gold: str, prediction: str) -> tuple[str, str]:
    """`Answer: 42` is 42 where no label is asked for."""
    label = None if ":" in gold else _LABEL.match(prediction)
    prediction = without_units(prediction[label.end() :])[0] if label else prediction
    return _CHANGE.sub("", gold), _CHANGE.sub("", prediction)


_LETTER = re.compile(r"\(?([A-H])[).]?")
_LETTERED = re.compile(
    r"(?:\(([A-H])\)|([A-H])\s?(?:[).:]|\s+-+(?=\s+[a-zA-Z]{3,})|,(?=\s+[a-z]{3,}\s)))"
    r"\s+(?![-+*/^=,])(\S.*)"
)
_OPTION = re.compile(r"(?:option|choice|answer)\s+(?=\(?[A-H]\b)", re.IGNORECASE)


def _without_choices(gold: str, prediction: str) -> tuple[str, str]:
    """`(C) 5` is C where a letter is asked for, and 5 where it is not."""
    prediction = _OPTION.sub("", prediction, count=1)
    left, right = _LETTERED.fullmatch(gold), _LETTERED.fullmatch(prediction)
    if left and not right:
        gold = (left[1] or left[2]) if _LETTER.fullmatch(prediction) else left[3]
    if right and not left:
        prediction = (right[1] or right[2]) if _LETTER.fullmatch(gold) else right[3]
    return gold, prediction


# --- what can be written in two ways -------------------------------------------------------------


def _without_set(gold: str, prediction: str) -> tuple[str, str]:
    """The set of one thing that is no set stands for the thing."""
    left, right = read_series(gold), read_series(prediction)
    if left and right and left.is_singleton != right.is_singleton:
        inner = (left if left.is_singleton else right).parts[0]
        other = right if left.is_singleton else left
        if "\\{" not in inner and r"\emptyset" not in inner and other.opening != "{":
            return (inner, prediction) if left.is_singleton else (gold, inner)
    return gold, prediction


def _bare_angles(text: str) -> str:
    bare = squeeze(without_degrees(text))
    return re.sub(r"(\\(?:sin|cos|tan|cot|sec|csc))\((\d+)\)", r"\1\2", bare)


def _is_region(text: str) -> bool:
    """Whether `text` is an interval, a union, or inequalities that only a union can be."""
    series = read_series(text)
    interval = bool(series and series.is_interval)
    return interval or "\\cup" in text or bool(re.search(r"[<>]|\\[lgn]e\b|\\mathbb", text))


_POINT = re.compile(r"(?:[Tt]he )?(?:point )?(?:[A-Z]\s*)?(\([^()]*,[^()]*\))")


def _points(gold: str, prediction: str) -> tuple[str, str]:
    """`P(1, 2)` and `the point (1, 2)` are (1, 2) where a tuple stands on the other side."""
    left, right = _POINT.fullmatch(gold), _POINT.fullmatch(prediction)
    if left and right and (left[0] == left[1] or right[0] == right[1]):
        return left[1], right[1]
    return gold, prediction


_CHOOSE = re.compile(r"(?<![a-zA-Z\\])(?:C|nCr)\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)")
_MULTIFACTORIAL = re.compile(r"(?<![\d.])(?:(\d{1,3})|\((\d{1,3})\))(!{2,3})(?!!)")
_MODULO = re.compile(r"(?:^|(?<==))\s*(-?\d{1,40})\s*\\bmod\s*(\d{1,40})\s*(?==|$)")
_SUBSCRIPT = re.compile(r"[\dA-Fa-f]*\d[\dA-Fa-f]*_\{\d+\}")


def _evaluated(text: str, *, other: str) -> str:
    """`text` with binomials, double factorials and remainders as everybody reads them."""
    if not read_series(other) or not other.startswith("("):
        text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    text = _MULTIFACTORIAL.sub(_multifactorial, text)
    text = _MODULO.sub(_remainder, text)
    if not _SUBSCRIPT.fullmatch(text) and "=" not in text:  # 101_2 + 1 is 6
        text = _SUBSCRIPT.sub(_value_of_numeral, text)
    return text


def _multifactorial(match: re.Match[str]) -> str:
    """Every second number counts in `n!!`, every third in `n!!!`."""
    return str(prod(range(int(match[1] or match[2]), 0, -len(match[3]))))


def _remainder(match: re.Match[str]) -> str:
    return str(int(match[1]) % int(match[2])) if int(match[2]) else match[0]


def _value_of_numeral(match: re.Match[str]) -> str:
    value = numeral_value(match[0])
    return match[0] if value is None else f"({value})"
