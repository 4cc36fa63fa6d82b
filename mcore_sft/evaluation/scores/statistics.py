"""Counts in, shares with their uncertainty out.

n = answers to one problem, c = right ones among them, k = answers that are looked at.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, prod, sqrt
from statistics import fmean, stdev

_Z = 1.959963984540054
"""Half the width of a 95 % interval, in standard errors."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """`hits` of `total`, with its Wilson interval."""

    hits: int
    total: int

    @property
    def percent(self) -> float:
        """The share in percent; 0 of nothing is 0."""
        return 100.0 * self.hits / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in percent."""
        return wilson(self.hits, self.total)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of `hits` out of `total`, in percent."""
    if total == 0:
        return 0.0, 100.0
    share = hits / total
    scale = 1 + _Z * _Z / total
    centre = (share + _Z * _Z / (2 * total)) / scale
    half = _Z * sqrt(share * (1 - share) / total + _Z * _Z / (4 * total * total)) / scale
    low = 0.0 if hits == 0 else 100 * (centre - half)
    return low, 100.0 if hits == total else 100 * (centre + half)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean over problems of something between 0 and 1, with the error of choosing these."""

    values: tuple[float, ...]

    @property
    def percent(self) -> float:
        """The mean in percent; 0 of nothing is 0."""
        return 100 * fmean(self.values) if self.values else 0.0

    @property
    def standard_error(self) -> float:
        """In percent, between problems."""
        if len(self.values) < 2:
            return 0.0
        return 100 * stdev(self.values) / sqrt(len(self.values))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval, in percent: Wilson's where each value is 0 or 1, else the normal one."""
        if set(self.values) <= {0.0, 1.0}:
            return wilson(round(sum(self.values)), len(self.values))
        half = _Z * self.standard_error
        return max(0.0, self.percent - half), min(100.0, self.percent + half)


def pass_at_k(right: Sequence[bool], k: int) -> float:
    """Chance that k answers drawn from these n hold a right one; unbiased (Chen et al., 2021)."""
    n, c = len(right), sum(right)
    if k > n:
        raise ValueError(f"pass@{k} of {n} answers: k may be at most their number")
    return 1.0 - prod(1.0 - k / place for place in range(n - c + 1, n + 1))


def majority(classes: Sequence[int], right: Sequence[bool]) -> float:
    """Whether the largest class of answers is right; the mean where several are largest.

    `classes` numbers what means the same, -1 is no answer; no answer at all is not right.
    """
    sizes = Counter(number for number in classes if number >= 0)
    if not sizes:
        return 0.0
    largest = max(sizes.values())
    chosen = {number for number, size in sizes.items() if size == largest}
    votes = [float(r) for number, r in zip(classes, right, strict=True) if number in chosen]
    return fmean(votes)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two runs on the same problems: how many both, one alone, or neither had right."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def total(self) -> int:
        """Problems."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """B less A, in percent points."""
        return 100 * (self.only_b - self.only_a) / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference, in points (Agresti and Min, 2005: half a problem is
        added to each of the four counts)."""
        a, b, n = self.only_a + 0.5, self.only_b + 0.5, self.total + 2
        centre = (b - a) / n
        half = _Z * sqrt((a + b) / n - centre * centre) / sqrt(n)
        return 100 * max(-1.0, centre - half), 100 * min(1.0, centre + half)

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: how often chance alone parts them at least so."""
        changed = self.only_a + self.only_b
        fewer = min(self.only_a, self.only_b)
        tail = sum(comb(changed, place) for place in range(fewer + 1))
        return min(1.0, 2 * tail / (1 << changed))
