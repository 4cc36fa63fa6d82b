r"""Quantities: a number with words of measure in, the number out.

    "5 square feet", "5\text{ cm}^2", "2.5 million dollars", "7th"  ->  "5", "5", "2500000", "7"

Words that make another number of it ("5 or more", "5 thirds", "5 theta") are left, and so is all
that measures no plain number.
"""

import re
from fractions import Fraction

_UNITS = re.compile(
    "units?|square|cubic|sq|cu|centimet(?:er|re)s?|millimet(?:er|re)s?|kilomet(?:er|re)s?|"
    "met(?:er|re)s?|inch(?:es)?|in|feet|foot|ft|yards?|yds?|miles?|mi|cm|mm|km|kg|mg|grams?|"
    "kilograms?|pounds?|lbs?|ounces?|oz|lit(?:er|re)s?|ml|gallons?|seconds?|secs?|minutes?|mins?|"
    "hours?|hrs?|hr|days?|weeks?|months?|years?|yrs?|mph|kph|dollars?|cents?|usd|degrees?|deg|"
    "radians?|rad|people|students?|ways?|points?|times|coins?|marbles?|apples?|"
    "(?:[kcm]?m|mi|ft)/(?:s|h|hr|sec|min)",
    re.IGNORECASE,
)
_FILLERS = {"per", "an", "a", "of", "the", "in", "to", "at", "on"}
# Other words of so few letters may be products.
_SHORT = {"men", "red", "odd", "new", "big", "old", "all"}
# Units that may touch their number, for no product of letters is written so.
_TIGHT = {"cm", "mm", "km", "kg", "ft", "mph", "lb", "lbs"}
_NUMBER = r"(?:\\(?:frac|sqrt|pi|times|cdot|pm)(?![a-zA-Z])|[\d\s.,/^{}()+\-!])+"
_QUANTITY = re.compile(rf"({_NUMBER})([a-zA-Z][a-zA-Z\s/.,^{{}}\d\-']*)")
_WORD = re.compile(r"(?:[kcm]?m|mi|ft)/[a-z]+|[a-zA-Z']+")
_POWER = re.compile(r"\s*\^\s*(?:\{\s*\d\s*\}|\d)")
_ORDINAL = re.compile(r"(\d+)\s*(?:-|\^\s*\{?\s*)?(?:st|nd|rd|th)\s*\}?\.?", re.IGNORECASE)
_LONGEST = 200

_CHANGES_VALUE = re.compile(
    "and|or|mod|base|than|hundreds?|thousands?|[a-z]+illions?|lakhs?|crores?|dozens?|scores?|gross|"
    "tens|half|halves|thirds?|quarters?|[a-z]+ths?|plus|minus|times|over|squared|cubed|factorial|"
    "negative|below|above|sqrt|root|log|ln|exp|(?:arc)?(?:sin|cos|tan)|less|more|least|most|greater|"
    "fewer|not|never|undefined|was|were|incorrect|wrong|modulo|recurring|repeating|divided|by|choose|power|point|ones|twos|threes|one|two|three|four|five|six|seven|eight|"
    "nine|ten|eleven|twelve|twenty|zero|twice|doubled|binary|octal|decimal|hexadecimal|reciprocal|"
    "inverse|conjugate|prime|fails|false|impossible|excluded|without|except|maybe|negatives|kappa|alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|omega|phi|psi|rho|tau",
    re.IGNORECASE,
)


def without_units(text: str) -> str:
    """`text` without the words of measure behind its number, which may be named: `x = 5 cm`."""
    name, equals, quantity = text.rpartition("=")
    if ordinal := _ORDINAL.fullmatch(quantity.strip()):
        return name + equals + ordinal[1]
    found = _QUANTITY.fullmatch(quantity.strip()) if len(quantity) <= _LONGEST else None
    if not found or not re.search(r"(?:\d[\s{}().!]*|\\pi\s*)$", found[1]):
        return text
    if not _measures(found[2], tight=not found[1][-1:].isspace()):
        return text
    return name + equals + found[1].rstrip()


def _measures(words: str, *, tight: bool) -> bool:
    """Whether `words` say of what there is so much, and nothing else."""
    plain = _POWER.sub(" ", words)
    if re.search(r"[\d^{}]", plain) or not re.fullmatch(r"[a-zA-Z'/.,\s\-]+", plain):
        return False
    each = _WORD.findall(plain)
    if tight and each[0].lower() not in _TIGHT:
        return False
    known = [word for word in each if _UNITS.fullmatch(word)]
    rest = [word for word in each if word.lower() not in _FILLERS and not _UNITS.fullmatch(word)]
    if not rest:
        return bool(known)
    return all(
        (len(word) > 3 or word.lower() in _SHORT) and not _CHANGES_VALUE.fullmatch(word)
        for word in rest
    )


_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(
    rf"(?<![\d.,/}}])(\d[\d,]*(?:\.\d+)?)\s*({'|'.join(_SCALES)})(?![a-zA-Z])", re.IGNORECASE
)


def scaled(text: str) -> str:
    """`2.5 million` -> `2500000`, where no digit is left behind the point."""

    def whole(match: re.Match[str]) -> str:
        value = Fraction(match[1].replace(",", "")) * 10 ** _SCALES[match[2].lower()]
        return str(value.numerator) if value.denominator == 1 else match[0]

    return _SCALED.sub(whole, text)
