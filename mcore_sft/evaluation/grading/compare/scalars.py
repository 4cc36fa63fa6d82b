r"""Rules for answers of one part: numerals, numbers, times of day, residues, words.

Each takes gold and prediction in canonical spelling, and what decides their parts; it says whether
they are the same, or nothing where it is not its matter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from mcore_sft.evaluation.grading.read.number import read_number, same_number

# Whether two parts of answers are the same; none where nobody can tell.
Same = Callable[[str, str], bool | None]

# --- numerals with a base ------------------------------------------------------------------------

_NUMERAL = r"[+-]?[\dA-Za-z]*\d[\dA-Za-z]*"
_BASE = re.compile(rf"({_NUMERAL}|[A-Fa-f]{{2,}}(?=\s*_\s*\{{1[1-6]\}}))\s*_\s*\{{(\d{{1,3}})\}}")


def numeral_value(text: str) -> int | None:
    """The number that a numeral with its base is, whose digits are digits of that base."""
    found = _BASE.fullmatch(text)
    try:
        return int(found[1], int(found[2])) if found else None
    except ValueError:
        return None


def by_base(gold: str, prediction: str, same: Same) -> bool | None:
    """Numerals with a base: digits and base both count; a base that is left out is understood."""
    sides = [side.strip() for side in prediction.split("=")]
    if len(sides) > 1 and any(numeral_value(side) is not None for side in sides):
        return _by_conversion(gold, sides)
    return _same_numeral(gold, prediction)


def _same_numeral(gold: str, prediction: str) -> bool | None:
    left, right = _BASE.fullmatch(gold), _BASE.fullmatch(prediction)
    if numeral_value(gold) is None or not left:
        return right.groups() == (gold, "10") if right and read_number(gold) else None
    if right:
        alike = left[1].casefold().lstrip("+0") == right[1].casefold().lstrip("+0")
        return alike and left[2] == right[2]
    alike = left[1].lower() == prediction.lower()
    return alike if alike or read_number(prediction) else None


def _by_conversion(gold: str, sides: list[str]) -> bool | None:
    """`66_8 = 54_{10}`: one number throughout, and one side of it the answer."""
    values = {int(s) if re.fullmatch(r"-?\d{1,40}", s) else numeral_value(s) for s in sides}
    if None in values:
        return None
    if numeral_value(gold) is not None:
        sides = [side for side in sides if _BASE.fullmatch(side)]
    return len(values) == 1 and any(side == gold or _same_numeral(gold, side) for side in sides)


# --- numbers -------------------------------------------------------------------------------------


def by_number(gold: str, prediction: str, same: Same) -> bool | None:
    """Rational numbers."""
    left = read_number(gold)
    right = left and (read_number(prediction) or read_number(_with_point(prediction)))
    return same_number(left, right) if left and right else None


def _with_point(text: str) -> str:
    """A decimal comma read as a point; three digits after it may be thousands and are left."""
    return re.sub(r"^(-?\d+),(\d{1,2}|\d{4,})$", r"\1.\2", text)


# --- times of day --------------------------------------------------------------------------------

_CLOCK = re.compile(
    r"(\d{1,2})(?:\s*(?::|\.(?=\d\d\s*[ap]))\s*(\d{2}))?\s*"
    r"(?:([ap])\s*\.?\s*m\b\.?|(noon|midnight))?"
    r"(?:\s+(?:in the (?:morning|afternoon|evening)|on [a-z]+day))?",
    re.IGNORECASE,
)


_HOURS = {"noon": "12 noon", "midnight": "12 midnight"}


def by_clock(gold: str, prediction: str, same: Same) -> bool | None:
    """`3:00 p.m.`, `3 pm`, `15:00`; a half of the day that is left out is understood."""
    left, right = (_CLOCK.fullmatch(_HOURS.get(text, text)) for text in (gold, prediction))
    if not left or not right or not any((left[3], left[4], right[3], right[4])):
        return None
    a, b = _minutes(left), _minutes(right)
    if a is None or b is None:
        return False
    halves = [bool(each[3] or each[4]) or int(each[1]) > 12 for each in (left, right)]
    return a == b if all(halves) else (a - b) % 720 == 0


def _minutes(clock: re.Match[str]) -> int | None:
    """Since midnight."""
    hour, minute = int(clock[1]), int(clock[2] or 0)
    half = (clock[3] or {"noon": "p", "midnight": "a"}.get((clock[4] or "").lower(), "")).lower()
    if minute > 59 or hour > (12 if half else 24):
        return None
    return (hour % 12 + 12 * (half == "p") if half else hour) * 60 + minute


# --- residues ------------------------------------------------------------------------------------

_RESIDUE = re.compile(
    r"(?:([a-zA-Z](?:_\{\w+\})?)\s*(?:\\equiv|=)\s*)?(.+?)"
    r"\s*[,(]*\s*\\?[pb]?mod(?:ulo)?(?![a-z])\s*\{?\s*(\d{1,40})\s*\}?\s*\)*"
)
_UNKNOWN = re.compile(r"[a-zA-Z](?:_\{\w+\})?\s*(?:\\equiv|=)\s*")


@dataclass(frozen=True)
class _Residues:
    name: str | None
    written: str
    modulus: int

    def values(self) -> set[int] | None:
        """The residues themselves, none where one is no whole number."""
        parts = re.split(r"\s*[,;]\s*", self.written)
        if not all(re.fullmatch(r"-?\d{1,40}", part) for part in parts):
            return None
        return {int(part) % self.modulus for part in parts}


def by_residue(gold: str, prediction: str, same: Same) -> bool | None:
    r"""`x \equiv 10 \pmod 7` is `3 \pmod 7`; a modulus may be left out, and then 3 is asked for."""
    left, right = _residues(gold), _residues(prediction)
    if left and right:
        if left.name and right.name and left.name != right.name:
            return False
        a, b = left.values(), right.values()
        if left.modulus != right.modulus:
            return False
        return a == b if a is not None and b is not None else same(left.written, right.written)
    if right:
        return same(gold, right.written)
    return same(left.written, _UNKNOWN.sub("", prediction, count=1)) if left else None


def _residues(text: str) -> _Residues | None:
    found = _RESIDUE.fullmatch(text) if "mod" in text else None
    if not found or not int(found[3]):
        return None
    return _Residues(name=found[1], written=found[2].strip(), modulus=int(found[3]))


# --- words ---------------------------------------------------------------------------------------

_LETTER = re.compile(r"\(?([A-H])[).]?")
_WORDS = re.compile(r"[A-Za-z](?:[A-Za-z ']|(?<=[A-Za-z])-(?=[A-Za-z]))*")
_NOTHING = re.compile(
    r"(?:there (?:is|are) )?no (?:real )?solutions?|(?:the )?empty set|\\(?:emptyset|varnothing)|"
    r"\\\{\s*\\\}|none",
    re.IGNORECASE,
)
_SETS = tuple(
    re.compile(rf"(?:the set of )?(?:all )?(?:the )?(?:{words})|{sign}", re.IGNORECASE)
    for words, sign in (
        ("integers|whole numbers", r"\\mathbb\s*\{?Z\}?"),
        ("positive integers|natural numbers",
         r"\\mathbb\s*\{?(?:N\}?|Z\}?\s*[\^_]\s*\{?\s*(?:\+|>\s*0)\s*\}?)"),
        ("rationals?(?: numbers)?", r"\\mathbb\s*\{?Q\}?"),
        ("complex numbers", r"\\mathbb\s*\{?C\}?"),
    )
)  # fmt: skip
_NOUNS = "functions?|numbers?|integers?|triangles?|curves?|balls?|marbles?|cards?|teams?|players?"
_DOUBT = re.compile(
    r"\b(?:not|never|neither|nor|no|or|either|maybe|perhaps|except|instead|if|unless|wrong|false|"
    r"incorrect|than|but)\b|n't\b",
    re.IGNORECASE,
)
_LED_IN = re.compile(
    r"(?:it|this|that|he|she|they|(?:the|his|her|its|their) [a-z ]{1,40}?)(?:'s\s+|\s+"
    r"(?:is|are|was|were|will be|must be|would be|becomes?|falls on)\s+)(?:an?\s+|the\s+|on\s+)?",
    re.IGNORECASE,
)


def by_text(gold: str, prediction: str, same: Same) -> bool | None:
    """Choices and words: case, punctuation and articles do not count."""
    if any(each.fullmatch(gold) and each.fullmatch(prediction) for each in (_NOTHING, *_SETS)):
        return True
    if not _is_prose(gold):
        return None
    left, right = _words(gold), _words(prediction)
    if left and (left == right or _is_said(gold, prediction)):
        return True
    if _same_members(gold, prediction):
        return True
    if left and right and sorted(left) == sorted(right) and re.fullmatch("[a-z]{1,4}", left):
        return None  # abc and cab may be products
    if (choice := _LETTER.fullmatch(gold)) and choice[1] not in prediction:
        return False
    return False if left and (right or read_number(prediction)) else None


def _is_said(gold: str, sentence: str) -> bool:
    """`It is Monday` says Monday, `Evelyn runs fastest` Evelyn; what is denied is not said."""
    if gold.casefold() in {"yes", "no", "true", "false"}:
        return bool(re.match(rf"{gold}\s*[,.;:-]", sentence, re.IGNORECASE))
    if gold.casefold() == "neither":
        return bool(re.match(r"neither [a-z]+ nor [a-z]+", sentence, re.IGNORECASE))
    if len(gold) < 3 or _DOUBT.search(sentence) or re.search(r"\d", sentence):
        return False
    said = _LED_IN.sub("", re.sub(r"^(?:[Oo]n|[Ii]n|[Aa]t)\s+", "", sentence), count=1)
    said = re.sub(rf"(?<=[a-z])\s+(?:{_NOUNS})$", "", said)  # an even function
    if _words(said) == _words(gold):
        return True
    # the rest of what is said of somebody: small words, and no second name
    return gold[0].isupper() and bool(
        re.fullmatch(rf"{re.escape(gold)}(?:'s)?(?:\s+[a-z]+){{0,8}}", sentence)
    )


def _same_members(gold: str, prediction: str) -> bool:
    """Whether both are lists of the same words, whatever their order."""
    left, right = (
        sorted(part.casefold() for part in re.split(r"\s*,\s*(?:and )?| and ", text))
        for text in (gold, prediction)
    )
    return len(left) > 1 and left == right


def _words(text: str) -> str | None:
    bare = re.sub(r"[()\[\]{}.,:;\"'!?]", " ", text)
    bare = re.sub(r"^(?:an?|the) (?=[A-Za-z])", "", re.sub(r"\s+", " ", bare).strip())
    if _WORDS.fullmatch(bare):
        return bare.casefold()
    # figures with words, without mathematics
    figures = re.fullmatch(r"[\w \-]+", bare) and re.search(r"\d", bare)
    return bare.casefold() if figures and re.search(r"[A-Za-z]{2,}", bare) else None


def _is_prose(text: str) -> bool:
    """Words and not a product of variables: a run of letters that has a vowel and some length."""
    return bool(
        re.search(r"(?<!\\)\b(?=[A-Za-z]*[aeiouyAEIOUY])[A-Za-z]{3,}\b", text)
        or re.fullmatch(r"\(?[A-H]\)?|[Nn]o", text)
        or re.search(r"\d\s*[aApP]\.?\s?[mM]\b", text)
    )
