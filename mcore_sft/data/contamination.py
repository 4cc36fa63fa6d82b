r"""Training problems in, those that a benchmark holds too out, each pair with both texts.

    benchmark problems -> Contamination;    training problems -> check -> findings

A word is a run of letters, digits and `_`, or one Chinese or Japanese character, of the case-folded
text. An n-gram is n words in a row; a repeated one counts once. The kinds, strongest first:

exact       the same text
normalized  the same text but for case and white space, wherever it stands
8-gram      at least 0.9 of the benchmark problem's 8-grams are in the training problem
13-gram     any 13-gram is in both

Of few words, signs and operators are what tells problems apart ($\cos 150^\circ$ from
$\cos(-150^\circ)$), and they are no words: a text of fewer than n words has no n-gram and is
compared as a whole.

Why 0.9: in MATH, test against train, 31 test problems find that much of themselves in one training
problem, in 37 pairs. Seven of these ask the same question; the others change a number, a sign or
what is asked for. Between 0.5 and 0.9 lie 559 pairs, of which seven ask the same and the rest are
one template with other numbers; and each of those seven shares a 13-gram.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

Kind = Literal["exact", "normalized", "8-gram", "13-gram"]

THRESHOLD = 0.9
"""Share of a benchmark problem's 8-grams that is a finding."""

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]")
_ASCII = bytes(ord(chr(i).lower()) if i < 128 and _WORD.match(chr(i)) else 32 for i in range(256))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A training problem and a benchmark problem, and the strongest kind of their overlap."""

    problem: str
    benchmark_problem: str
    kind: Kind
    overlap: float
    """Share of the benchmark problem's n-grams in the training problem; 1 where texts are equal."""


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
        self._eights = _Grams(8, words)
        self._thirteens = _Grams(13, words)

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
        eights = self._eights.shares(words)
        yield "8-gram", {i: share for i, share in eights.items() if share >= self._threshold}
        if eights:  # every 13-gram holds six 8-grams
            yield "13-gram", self._thirteens.shares(words)


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


def _words(text: str) -> list[str]:
    if text.isascii():  # the same words, at a quarter of the time
        return text.encode().translate(_ASCII).decode().split()
    return _WORD.findall(text.casefold())
