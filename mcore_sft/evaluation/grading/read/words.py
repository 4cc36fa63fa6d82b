"""A number in English words in, the number out.

"six thousand nine", "minus two thirds", "three and a half", "two point five"  ->  a fraction each
"""

import re
from collections.abc import Sequence
from fractions import Fraction

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 10**3, "dozen": 12}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6}
_PARTS |= {"seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12}
_PARTS |= {"sixteenth": 16, "twentieth": 20, "hundredth": 100, "thousandth": 1000}
_NEGATIVE = {"negative", "minus"}
_LONGEST = 120


def number_in_words(text: str) -> Fraction | None:
    """The number that `text` says; none of anything longer or other."""
    if len(text) > _LONGEST:
        return None
    words = re.findall(r"[^\s,\-]+", text.lower())
    if words and words[0] in _NEGATIVE:
        value = _positive(words[1:])
        return None if value is None else -value
    return _positive(words)


def base_in_words(text: str) -> str:
    """`eight` -> `8`; as it is where that is no number."""
    value = _whole(text.lower().split())
    return text if value is None else str(value)


def _positive(words: Sequence[str]) -> Fraction | None:
    if "point" in words:
        place = words.index("point")
        whole, digits = _whole(words[:place]), [_digit(word) for word in words[place + 1 :]]
        if whole is None or not digits or None in digits:
            return None
        return Fraction(f"{whole}.{''.join(map(str, digits))}")
    if (part := _part(words)) is not None:
        return part
    for place, word in enumerate(words):
        if word == "and" and (part := _part(words[place + 1 :])) is not None:
            whole = _whole(words[:place])
            return None if whole is None else whole + part
    whole = _whole(words)
    return None if whole is None else Fraction(whole)


def _part(words: Sequence[str]) -> Fraction | None:
    """`two thirds`, `a half`."""
    if len(words) < 2:
        return None
    name = words[-1]
    size = _PARTS.get(name) or _PARTS.get(name.removesuffix("s"))
    count = 1 if words[0] in {"a", "an"} and len(words) == 2 else _whole(words[:-1])
    return Fraction(count, size) if size and count is not None else None


def _whole(words: Sequence[str], below: int = 10**15) -> int | None:
    """`six thousand nine`, less than `below`."""
    for name, scale in _SCALES.items():
        if name in words:
            return _in_groups(words, words.index(name), scale, below)
    if "hundred" in words:
        return _in_groups(words, words.index("hundred"), 100, below)
    value = _below_hundred(words)
    return value if value is not None and value < below else None


def _in_groups(words: Sequence[str], place: int, scale: int, below: int) -> int | None:
    """`... thousand ...`, the word of `scale` standing at `place`."""
    count = 1 if list(words[:place]) == ["a"] else _whole(words[:place], 1000)
    rest = words[place + 1 :]
    rest = rest[1:] if len(rest) > 1 and rest[0] == "and" else rest
    more = _whole(rest, scale) if rest else 0
    if not count or more is None or count * scale + more >= below:
        return None
    return count * scale + more


def _below_hundred(words: Sequence[str]) -> int | None:
    match words:
        case [digits] if digits.isascii() and digits.isdecimal():
            return int(digits)
        case [one] if one in _ONES:
            return _ONES.index(one)
        case [tens] if tens in _TENS:
            return 10 * _TENS.index(tens) + 20
        case [tens, one] if tens in _TENS and one in _ONES[1:10]:
            return 10 * _TENS.index(tens) + 20 + _ONES.index(one)
    return None


def _digit(word: str) -> int | None:
    return _ONES.index(word) if word in _ONES[:10] else None
