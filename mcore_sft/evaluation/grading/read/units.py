r"""Quantities: a number with words of measure in, the number and its unit out.

    "5 square feet", "5\text{ cm}^2", "2.5 million dollars", "7th"  ->  "5", "5", "2500000", "7"

Words that make another number of it ("5 or more", "5 thirds", "5 theta") are left, and so is all
that measures no plain number. A unit may be left out; where both answers have one, `in_units_of`
says how the one is told in the other: 80 cents are 80/100 dollars, and no hours are dollars.
"""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from mcore_sft.evaluation.grading.read.number import read_number

# --- what units there are ----------------------------------------------------------------------

_KINDS: dict[str, dict[str, str | int]] = {
    "length": {
        "millimeter mm": "1/1000", "centimeter cm": "1/100", "decimeter dm": "1/10",
        "meter": 1, "kilometer km": 1000, "inch in": "127/5000", "foot feet ft": "381/1250",
        "yard yd": "1143/1250", "mile mi": "201168/125",
    },
    "length length length": {
        "milliliter ml": "1/1000000", "liter": "1/1000", "gallon": "473176473/125000000000",
        "quart": "473176473/500000000000", "pint": "473176473/1000000000000",
    },
    "mass": {
        "milligram mg": "1/1000", "gram": 1, "kilogram kg": 1000,
        "pound lb": "45359237/100000", "ounce oz": "45359237/1600000",
    },
    "time": {"second sec": 1, "minute min": 60, "hour hr": 3600, "day": 86400, "week": 604800},
    "year": {"month": "1/12", "year yr": 1, "decade": 10, "century centurie": 100},
    "dollar": {"cent": "1/100", "dollar usd": 1},
    "euro": {"euro": 1},
    "sterling": {"pence": "1/100", "sterling": 1},
    "rupee": {"rupee": 1},
    "yen": {"yen": 1},
    "degree": {"degree deg": 1, "radian rad": 180},
    "unit": {"unit": 1},
    "newton": {"newton": 1}, "joule": {"joule": 1}, "watt": {"watt": 1}, "volt": {"volt": 1},
    "ampere": {"ampere": 1}, "kelvin": {"kelvin": 1},
}  # fmt: skip
_SIZES = {
    name: (kind, Fraction(size))
    for kind, units in _KINDS.items()
    for names, size in units.items()
    for name in names.split()
}
# Of one letter, and only where it is set upright: 5\text{ m} is a length, 5m a product.
_LETTERS = {
    "m": "meter", "s": "second", "g": "gram", "h": "hour", "l": "liter", "L": "liter",
    "N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "ampere", "K": "kelvin",
}  # fmt: skip
_SPEEDS = {"mph": "mile per hour", "kph": "kilometer per hour", "kmh": "kilometer per hour"}
_COUNTED = re.compile(
    "square|cubic|sq|cu|people|students?|ways?|points?|times|coins?|marbles?|apples?", re.IGNORECASE
)
_MONEY = {"dollar", "euro", "sterling", "rupee", "yen"}


@dataclass(frozen=True)
class Unit:
    """What is measured, as powers of kinds, and how much one unit of it is."""

    powers: tuple[tuple[str, int], ...]
    size: Fraction = Fraction(1)
    per_pi: bool = False
    """The size is divided by pi: of radians, in degrees."""
    amount: "Unit | None" = None
    """Of a rate, what stands before "per"."""


DEGREE, RADIAN = Unit((("degree", 1),)), Unit((("degree", 1),), Fraction(180), per_pi=True)
DOLLAR, CENT = Unit((("dollar", 1),)), Unit((("dollar", 1),), Fraction(1, 100))
CURRENCIES = {
    r"¢|\\(?:text)?cent(?![a-z])": CENT,
    r"€|\\euro(?![a-z])": Unit((("euro", 1),)),
    r"£|\\(?:pounds|textsterling)(?![a-z])": Unit((("sterling", 1),)),
    r"¥|\\yen(?![a-z])": Unit((("yen", 1),)),
    r"₹|^Rs\.?(?=\s*\d)": Unit((("rupee", 1),)),
}
"""What is written for money, besides the dollar."""
# 15' are minutes of an angle or feet, 15'' seconds or inches, as the other side has it.
PRIME, DOUBLE_PRIME = Unit((("prime", 1),)), Unit((("prime", 2),))
_PRIMES = {
    (PRIME, "degree"): Fraction(1, 60),
    (PRIME, "length"): Fraction(381, 1250),
    (DOUBLE_PRIME, "degree"): Fraction(1, 3600),
    (DOUBLE_PRIME, "length"): Fraction(127, 5000),
}
_MARK = re.compile(r"[a-zA-Z']+|/|\^\s*\{?\s*\d\s*\}?")
_PER = {"per", "/", "a", "an", "each", "every"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def read_unit(words: str) -> Unit | None:
    """What `words` measure; none where they name no unit."""
    marks = _MARK.findall(" ".join(_SPEEDS.get(mark.lower(), mark) for mark in words.split()))
    powers: Counter[str] = Counter()
    size, per_pi, sign, power = Fraction(1), False, 1, 1
    amount: Unit | None = None
    last: tuple[str, Fraction] | None = None
    for place, mark in enumerate(marks):
        word = mark.lower()
        known = _kind_of(mark)
        if word == "in" and marks[place + 1 :][:1] and not marks[place + 1].startswith("^"):
            known = None  # "5 in total"
        if word in _PER and place:
            amount, sign = Unit(_sorted(powers), size, per_pi) if powers else None, -1
        elif word in _POWERS:
            power = _POWERS[word]
        elif mark[0] == "^" and last:
            more = int(re.sub(r"\D", "", mark)) - 1
            powers.update({kind: sign * more for kind in last[0].split()})
            size *= last[1] ** (sign * more)
        elif known:
            for kind in known[0].split():
                powers[kind] += sign * power
            size *= known[1] ** (sign * power)
            per_pi |= word.startswith("rad")
            last, power = known, 1
    if not powers:
        return None
    return Unit(_sorted(powers), size, per_pi, amount)


def _sorted(powers: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((kind, power) for kind, power in powers.items() if power))


def _kind_of(word: str) -> tuple[str, Fraction] | None:
    if len(word) == 1:
        return _SIZES.get(_LETTERS.get(word, ""))
    name = word.lower().replace("metre", "meter").replace("litre", "liter")
    return (
        _SIZES.get(name)
        or _SIZES.get(name.removesuffix("s"))
        or _SIZES.get(name.removesuffix("es"))
    )


def in_units_of(gold: Unit, given: Unit) -> str | None:
    """The LaTeX of what a number of `given` is to be multiplied with; none where they measure two
    things."""
    ratio = _ratio(gold, given)
    if ratio is None:
        return None
    value = rf"\frac{{{ratio.numerator}}}{{{ratio.denominator}}}"
    if gold.per_pi == given.per_pi:
        return value if ratio != 1 else ""
    return (
        rf"{value} \cdot \frac{{\pi}}{{1}}" if gold.per_pi else rf"{value} \cdot \frac{{1}}{{\pi}}"
    )


def _ratio(gold: Unit, given: Unit) -> Fraction | None:
    if gold.powers == given.powers:
        return given.size / gold.size
    for prime, other in ((gold, given), (given, gold)):
        if prime in {PRIME, DOUBLE_PRIME} and len(other.powers) == 1:
            size = _PRIMES.get((prime, other.powers[0][0]))
            if size is None or other.powers[0][1] != 1:
                return None
            return other.size / size if prime is gold else size / other.size
    kinds = {kind for kind, _ in (*gold.powers, *given.powers)}
    if kinds <= {"degree", "celsius"} or kinds <= {"degree", "fahrenheit"}:
        return Fraction(1)
    if kinds == {"sterling", "mass"} and _kind_of("pound") in {
        (each.powers[0][0], each.size) for each in (gold, given)
    }:
        return Fraction(1)  # £5 are 5 pounds
    if "unit" in kinds:
        return _of_any_length(gold, given)
    if kinds & _MONEY and (gold.amount or given.amount):  # dollars, and dollars a pound
        return _ratio(gold.amount or gold, given.amount or given)
    return None


def _of_any_length(gold: Unit, given: Unit) -> Fraction | None:
    """Square units may be cm^2, and units may be anything."""
    powers = [dict(each.powers) for each in (gold, given)]
    units = [each.get("unit", each.get("length")) for each in powers]
    plain = any(each.get("unit") == 1 for each in powers)
    return Fraction(1) if plain or units[0] == units[1] else None


# --- what stands behind a number ---------------------------------------------------------------

_FILLERS = {"per", "an", "a", "of", "the", "in", "to", "at", "on", "each", "every", "us"}
# Other words of so few letters may be products.
_SHORT = {"men", "red", "odd", "new", "big", "old", "all", "off"}
# Units that may touch their number, for no product of letters is written so.
_TIGHT = {
    "cm",
    "mm",
    "km",
    "kg",
    "ft",
    "mph",
    "lb",
    "lbs",
    "ml",
    "hrs",
    "mins",
    "secs",
    "oz",
    "yds",
}
_NUMBER = r"(?:\\(?:frac|sqrt|pi|times|cdot|pm|%)(?![a-zA-Z])|[\d\s.,/^{}()+\-!])+"
_QUANTITY = re.compile(rf"({_NUMBER})([a-zA-Z][a-zA-Z\s/.,^{{}}\d\-']*)")
_WORD = re.compile(r"(?:[kcm]?m|mi|ft)/[a-z]+|[a-zA-Z']+")
_POWER = re.compile(r"\s*\^\s*(?:\{\s*\d\s*\}|\d)")
_ORDINAL = re.compile(r"(\d+)\s*(?:-|\^\s*\{?\s*)?(?:st|nd|rd|th)\s*\}?\.?", re.IGNORECASE)
_PART = re.compile(r"([\d.,/]+)\s*([a-zA-Z]+)\.?(?:\s*,?\s*(?:and\s+)?(?=\d)|$)")
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


def without_units(text: str) -> tuple[str, Unit | None]:
    """`text` without the words of measure behind its number, which may be named: `x = 5 cm`; and
    what they measure."""
    name, equals, quantity = text.rpartition("=")
    if ordinal := _ORDINAL.fullmatch(quantity.strip()):
        return name + equals + ordinal[1], None
    if len(quantity) > _LONGEST:
        return text, None
    if summed := _sum_of_parts(quantity.strip()):
        return name + equals + summed[0], summed[1]
    found = _QUANTITY.fullmatch(quantity.strip())
    if not found or not re.search(r"(?:\d[\s{}().!]*|\\pi\s*|\\%\s*)$", found[1]):
        return text, None
    words = found[2]
    if found[1].rstrip().endswith(r"\%"):  # of how much more is no other number
        words = re.sub(r"^(?:more|less|fewer|greater|higher|lower)\b", "change", words)
    if not _measures(words, tight=not found[1][-1:].isspace()):
        return text, None
    return name + equals + found[1].rstrip(), read_unit(found[2])


def _sum_of_parts(text: str) -> tuple[str, Unit] | None:
    """`5 feet 3 inches` as 63 inches: several parts, each of a smaller unit than the one before."""
    parts = [found.groups() for found in _PART.finditer(text)]
    if len(parts) < 2 or _PART.sub("", text).strip():
        return None
    numbers = [read_number(digits) for digits, _ in parts]
    units = [read_unit(word) for _, word in parts]
    total, last = Fraction(0), units[-1]
    for number, unit in zip(numbers, units, strict=True):
        if number is None or unit is None or last is None or unit.powers != last.powers:
            return None
        total += number.value * unit.size / last.size
    sizes = [unit.size for unit in units if unit]
    if last is None or sizes != sorted(set(sizes), reverse=True):
        return None
    whole = total.denominator == 1
    return str(
        total.numerator
    ) if whole else rf"\frac{{{total.numerator}}}{{{total.denominator}}}", last


def _measures(words: str, *, tight: bool) -> bool:
    """Whether `words` say of what there is so much, and nothing else."""
    plain = _POWER.sub(" ", words)
    if re.search(r"[\d^{}]", plain) or not re.fullmatch(r"[a-zA-Z'/.,\s\-]+", plain):
        return False
    each = _WORD.findall(plain)
    if tight and each[0].lower() not in _TIGHT and (len(each[0]) < 4 or not _is_unit(each[0])):
        return False
    rest = [word for word in each if word.lower() not in _FILLERS and not _is_unit(word)]
    if not rest:
        return any(map(_is_unit, each))
    return all(
        (len(word) > 3 or word.lower() in _SHORT) and not _CHANGES_VALUE.fullmatch(word)
        for word in rest
    )


def _is_unit(word: str) -> bool:
    parts = word.lower().split("/")
    if len(parts) == 2:
        return bool(re.fullmatch("[kcm]?m|mi|ft", parts[0]))
    plural = len(word) > 1 and _kind_of(word) is not None
    return plural or word.lower() in _SPEEDS or bool(_COUNTED.fullmatch(word))


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
