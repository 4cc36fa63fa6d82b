r"""Training problems in, those that a benchmark holds too out, each pair with both texts.

    benchmark problems -> Contamination;    training problems -> check -> findings

A word is a run of letters, digits and `_`, or one Chinese or Japanese character, of the case-folded
text. An n-gram is n words in a row; a repeated one counts once. The kinds, strongest first:

exact       the same text
normalized  the same text but for case and white space, wherever it stands
contained   all of a benchmark problem of fewer than 8 words stands in the training problem
8-gram      at least 0.9 of the benchmark problem's 8-grams are in the training problem
13-gram     any 13-gram is in both

Of few words, signs and operators are what tells problems apart ($\cos 150^\circ$ from
$\cos(-150^\circ)$), and they are no words. So a benchmark problem too short for an 8-gram must be
there as a whole, every word and sign of it in a row, at least 6 of them: `What is 2+2?` has 6, and
a shorter one, such as `1+1`, is part of too many problems and is compared with whole ones alone.
MATH's test set has 199 problems of fewer than 8 words; none stands in another problem of its own,
of MATH's training set or of GSM8K's.

Why 0.9: in MATH, test against train, 31 test problems find that much of themselves in one training
problem, in 37 pairs. Seven of these ask the same question; the others change a number, a sign or
what is asked for. Between 0.5 and 0.9 lie 559 pairs, of which seven ask the same and the rest are
one template with other numbers; and each of those seven shares a 13-gram.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import Pairs
from mcore_sft.data.sources import Survey

Kind = Literal["exact", "normalized", "contained", "8-gram", "13-gram"]

THRESHOLD = 0.9
"""Share of a benchmark problem's 8-grams that is a finding."""

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]")
_WORD_OR_SIGN = re.compile(rf"[^\W{_CJK}]+|\S")
_GRAM = 8
_SHORTEST = 6  # words and signs of a problem that is looked for within others
_ASCII = bytes(ord(chr(i).lower()) if i < 128 and _WORD.match(chr(i)) else 32 for i in range(256))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A training problem and a benchmark problem, and the strongest kind of their overlap."""

    problem: str
    benchmark_problem: str
    kind: Kind
    overlap: float
    """Share of the benchmark problem's n-grams in the training problem; 1 where all of it is."""
    where: str = ""
    """The row that has the training problem first, as FILE:NUMBER; "" where nobody said."""
    benchmark: str = ""
    """The row of the benchmark, likewise."""


def read_benchmarks(benchmarks: Iterable[Survey]) -> dict[str, str]:
    """The distinct problems of benchmarks, and the row that each stands in, as FILE:NUMBER.

    `DataError` names a row that cannot be used, or a benchmark that holds no problem.
    """
    places: dict[str, str] = {}
    for surveyed in benchmarks:
        count = 0
        for block in surveyed.blocks():
            rows = block.read(skip_bad=False)
            if not isinstance(rows, Pairs):
                raise DataError(f"{block.name}: it holds tokens, expected the texts of problems")
            for index, problem in enumerate(rows.problems.to_pylist()):
                places.setdefault(problem, rows.where(index))
            count += len(rows)
        if not count:
            raise DataError(
                f"benchmark {surveyed.source.path!r}: it holds no problem, so that nothing would "
                "be compared with it; mend its path, or take it out of data.contamination.against"
            )
    return places


class Contamination:
    """Knows a benchmark's problems; its memory grows with the benchmark alone.

    It pickles, for worker processes to check a part each: what is found does not depend on how the
    training problems are divided.
    """

    def __init__(self, benchmark_problems: Iterable[str], *, threshold: float = THRESHOLD) -> None:
        self._problems = tuple(dict.fromkeys(benchmark_problems))
        self._threshold = threshold
        self._normalized: dict[str, list[int]] = defaultdict(list)
        for index, problem in enumerate(self._problems):
            self._normalized[_normalize(problem)].append(index)
        words = [_words(problem) for problem in self._problems]
        self._eights = _Grams(_GRAM, words)
        self._thirteens = _Grams(13, words)
        self._short = self._of_few_words(words)

    def _of_few_words(self, words: Sequence[list[str]]) -> dict[str, dict[int, str]]:
        """Problems of fewer than 8 words by the rarest of them: index, words and signs."""
        common = Counter(word for own in words for word in set(own))
        short: dict[str, dict[int, str]] = defaultdict(dict)
        for index, own in enumerate(words):
            spelt = _spelt(self._problems[index])
            if 0 < len(own) < _GRAM and len(spelt.split()) >= _SHORTEST:
                short[min(own, key=lambda word: common[word])][index] = spelt
        return short

    def check(self, problems: Iterable[str]) -> list[Finding]:
        """Every overlapping pair, in the order of `problems`; a repeated problem counts once."""
        return [found for problem in dict.fromkeys(problems) for found in self._check(problem)]

    def _check(self, problem: str) -> Iterator[Finding]:
        """The findings of one problem, strongest kind first, one for each benchmark problem."""
        told: set[int] = set()
        for kind, shares in self._overlaps(problem):
            for index, overlap in shares.items():
                if index not in told:
                    told.add(index)
                    yield Finding(
                        problem=problem,
                        benchmark_problem=self._problems[index],
                        kind=kind,
                        overlap=overlap,
                    )

    def _overlaps(self, problem: str) -> Iterator[tuple[Kind, dict[int, float]]]:
        """For each kind that holds, the benchmark problems it holds for and their overlap."""
        alike = self._normalized.get(_normalize(problem), [])
        yield "exact", {index: 1.0 for index in alike if self._problems[index] == problem}
        yield "normalized", dict.fromkeys(alike, 1.0)
        words = _words(problem)
        yield "contained", self._contained(problem, words)
        eights = self._eights.shares(words)
        yield "8-gram", {i: share for i, share in eights.items() if share >= self._threshold}
        if eights:  # every 13-gram holds six 8-grams
            yield "13-gram", self._thirteens.shares(words)

    def _contained(self, problem: str, words: list[str]) -> dict[int, float]:
        """The short benchmark problems that are part of `problem`, sign by sign."""
        if self._short.keys().isdisjoint(words):
            return {}
        spelt = _spelt(problem)
        some = (self._short[word] for word in dict.fromkeys(words) if word in self._short)
        return {i: 1.0 for candidates in some for i, own in candidates.items() if own in spelt}


class _Grams:
    """The n-grams of a list of texts, and which texts each is in."""

    def __init__(self, size: int, texts: Iterable[list[str]]) -> None:
        self._size = size
        self._texts: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._counts: list[int] = []
        for index, words in enumerate(texts):
            distinct = dict.fromkeys(self._windows(words))
            self._counts.append(len(distinct))
            for gram in distinct:
                self._texts[gram].append(index)

    def shares(self, words: list[str]) -> dict[int, float]:
        """Of each text that shares an n-gram with `words`, the share of its n-grams found there."""
        known = self._texts
        if known.keys().isdisjoint(self._windows(words)):  # the common case, and it must be fast
            return {}
        shared = {gram for gram in self._windows(words) if gram in known}
        hits = Counter(index for gram in shared for index in known[gram])
        return {index: count / self._counts[index] for index, count in hits.items()}

    def _windows(self, words: list[str]) -> Iterable[tuple[str, ...]]:
        return zip(*(words[start:] for start in range(self._size)), strict=False)


def distinct(problems: Iterable[str], seen: set[bytes]) -> list[str]:
    """Those of `problems` that are new to `seen`, which remembers 16 bytes of each.

    A training set asks the same problem many times over; this is for the one process that reads it.
    """
    new: dict[bytes, str] = {}
    for problem in problems:
        key = blake2b(problem.encode(errors="surrogatepass"), digest_size=16).digest()
        if key not in seen:
            new.setdefault(key, problem)
    seen.update(new)
    return list(new.values())


def _normalize(text: str) -> str:
    return "".join(text.split()).casefold()


def _spelt(text: str) -> str:
    """Its words and signs with one space before, between and behind them."""
    return f" {' '.join(_WORD_OR_SIGN.findall(text.casefold()))} "


def _words(text: str) -> list[str]:
    if text.isascii():  # the same words, at a quarter of the time
        return text.encode().translate(_ASCII).decode().split()
    return _WORD.findall(text.casefold())
