"""An answer in, why it must not reach a parser out: what would take forever, or all memory."""

import re

MAX_LENGTH = 2000
_MAX_DIGITS = 400
_MAX_NESTING = 60
_MAX_EXPONENT = 100_000
_MAX_FACTORIAL = 10_000


def danger(prediction: str) -> str | None:
    """Why `prediction` must not reach a parser; none where it may."""
    if len(prediction) > MAX_LENGTH:
        return "length"
    if re.search(rf"\d{{{_MAX_DIGITS}}}", prediction):
        return "digits"
    depth = deepest = 0
    for sign in prediction:
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    if deepest > _MAX_NESTING:
        return "nesting"
    return _explosion(prediction)


def _explosion(prediction: str) -> str | None:
    # a blank parts the numbers of 2^6 3^5, and nothing elsewhere
    bare = re.sub(r"\\left|\\right|(?<!\d)\s+|\s+(?!\d)", "", prediction)
    # brackets go where a power is of a power, and part what they hold where it is not
    flat = re.sub(r"[{}()]", " ", re.sub(r"(?<=\^)[{(]+|[})]+(?=\^)", "", bare))
    if re.search(r"\d\^-?\d+\^-?\d+\^-?\d", flat):
        return "tower"
    for low, high in re.findall(r"\^-?(\d+)\^-?(\d+)", flat):
        if int(low[:6]) ** min(int(high[:6]), 40) > _MAX_EXPONENT:
            return "tower"
    if any(int(power[:12]) > _MAX_EXPONENT for power in re.findall(r"\^-?(\d+)", flat)):
        return "exponent"
    factorials = re.findall(r"(\d+)!", re.sub(r"[{}()]", " ", re.sub(r"[})]+(?=!)", "", bare)))
    if any(int(number[:12]) > _MAX_FACTORIAL for number in factorials):
        return "factorial"
    return None
