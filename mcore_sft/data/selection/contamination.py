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
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Literal

import numpy as np
import numpy.typing as npt

from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import ranges, running_sum
from mcore_sft.data.rows import Pairs
from mcore_sft.data.sources.survey import Survey

Kind = Literal["exact", "normalized", "contained", "8-gram", "13-gram"]

THRESHOLD = 0.9
"""Share of a benchmark problem's 8-grams that is a finding."""

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]")
_WORD_OR_SIGN = re.compile(rf"[^\W{_CJK}]+|\S")
_END = b"Q"  # behind the words of a text: none of theirs has a capital
_UNKNOWN, _ENDED = 0, -1  # numbers of words that no benchmark has, and of _END
_AT_ONCE = 1024  # texts
_MIX = np.uint64(0x9E3779B97F4A7C15)
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
        words = _words(self._problems)
        self._numbers = {word: number for number, word in enumerate(sorted({*words} - {_END}), 1)}
        text = _Words(words, self._numbers)
        self._eights = _Grams(_GRAM, text, len(self._problems))
        self._thirteens = _Grams(13, text, len(self._problems))
        self._spelt: dict[int, str] = {}
        """Problems of few words, which are looked for as a whole."""
        counts = text.counts(len(self._problems))
        for index in np.flatnonzero((counts > 0) & (counts < _GRAM)).tolist():
            spelt = _spelt(self._problems[index])
            if len(spelt.split()) >= _SHORTEST:
                self._spelt[index] = spelt
        self._short = [
            _Grams(count, text.of(np.flatnonzero(counts == count)), len(self._problems))
            for count in range(1, _GRAM)
        ]

    def check(self, problems: Iterable[str]) -> list[Finding]:
        """Every overlapping pair, in the order of `problems`; a repeated problem counts once."""
        texts = list(dict.fromkeys(problems))
        return [
            found
            for first in range(0, len(texts), _AT_ONCE)
            for found in self._check(texts[first : first + _AT_ONCE])
        ]

    def _check(self, texts: Sequence[str]) -> Iterator[Finding]:
        """The findings of each text, strongest kind first, one for each benchmark problem."""
        words = _Words(_words(texts), self._numbers)
        eights, thirteens = self._eights.shares(words), self._thirteens.shares(words)
        candidates: dict[int, list[int]] = defaultdict(list)
        for grams in self._short:
            for number, shares in grams.shares(words).items():
                candidates[number] += shares
        for number, text in enumerate(texts):
            same = self._normalized.get(_normalize(text), ())
            # Every 13-gram holds six 8-grams.
            if not same and number not in eights and number not in candidates:
                continue
            kinds: list[tuple[Kind, dict[int, float]]] = [
                ("exact", {index: 1.0 for index in same if self._problems[index] == text}),
                ("normalized", dict.fromkeys(same, 1.0)),
                ("contained", self._contained(text, candidates.get(number, ()))),
                ("8-gram", self._enough(eights.get(number, {}))),
                ("13-gram", thirteens.get(number, {})),
            ]
            told: set[int] = set()
            for kind, found in kinds:
                for index, overlap in found.items():
                    if index not in told:
                        told.add(index)
                        yield Finding(
                            problem=text,
                            benchmark_problem=self._problems[index],
                            kind=kind,
                            overlap=overlap,
                        )

    def _contained(self, text: str, candidates: Sequence[int]) -> dict[int, float]:
        """The short benchmark problems that are part of `text`, sign by sign."""
        if not candidates:
            return {}
        spelt = _spelt(text)
        return {
            index: 1.0
            for index in sorted(candidates)
            if index in self._spelt and self._spelt[index] in spelt
        }

    def _enough(self, shares: dict[int, float]) -> dict[int, float]:
        return {index: share for index, share in shares.items() if share >= self._threshold}


class _Words:
    """The words of some texts as numbers, and which text each is of. W = words, ends included."""

    def __init__(self, words: Sequence[bytes], numbers: dict[bytes, int]) -> None:
        known = {**numbers, _END: _ENDED}
        self.numbers = np.fromiter(
            map(known.get, words, repeat(_UNKNOWN)), np.int64, count=len(words)
        )
        self.texts = np.cumsum(self.numbers == _ENDED) - (self.numbers == _ENDED)

    def counts(self, texts: int) -> npt.NDArray[np.int64]:
        """How many words each of the `texts` has."""
        return np.bincount(self.texts[self.numbers != _ENDED], minlength=texts)

    def of(self, texts: npt.NDArray[np.int64]) -> "_Words":
        """The words of some of the texts."""
        some = object.__new__(_Words)
        which = np.isin(self.texts, texts)
        some.numbers, some.texts = self.numbers[which], self.texts[which]
        return some

    def grams(self, size: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """A hash of each `size` words in a row, all known, and which text they are of."""
        unknown = running_sum(self.numbers <= _UNKNOWN)
        starts = np.flatnonzero(unknown[size:] == unknown[:-size])
        hashes = np.zeros(len(starts), np.uint64)
        for place in range(size):
            hashes = hashes * _MIX + self.numbers[starts + place].astype(np.uint64)
        hashes ^= hashes >> np.uint64(31)
        return hashes * _MIX, self.texts[starts]


class _Grams:
    """The n-grams of texts, and which of the texts each is in."""

    def __init__(self, size: int, words: _Words, texts: int) -> None:
        self._size = size
        hashes, owners = words.grams(size)
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        new = np.append(True, (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1]))
        hashes, self._owners = hashes[new[: len(hashes)]], owners[new[: len(hashes)]]
        self._counts = np.bincount(self._owners, minlength=texts)
        self._hashes, starts = np.unique(hashes, return_index=True)
        self._offsets = np.append(starts, len(hashes))
        # By their first bits most n-grams are known to be none of these.
        bits = max(8, (8 * len(self._hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._worth = np.zeros(1 << bits, np.bool_)
        self._worth[self._hashes >> self._shift] = True

    def shares(self, words: _Words) -> dict[int, dict[int, float]]:
        """For each text of `words` that shares n-grams, whose and which share of that one's."""
        hashes, texts = words.grams(self._size)
        worth = self._worth[hashes >> self._shift]
        hashes, texts = hashes[worth], texts[worth]
        if not len(hashes):
            return {}
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        there = self._hashes[at] == hashes
        pairs = np.unique(texts[there] * len(self._hashes) + at[there])
        sharing, grams = np.divmod(pairs, len(self._hashes))
        owners = self._owners[ranges(self._offsets, grams)]
        sharing = np.repeat(sharing, np.diff(self._offsets)[grams])
        found, counts = np.unique(sharing * len(self._counts) + owners, return_counts=True)
        shares: dict[int, dict[int, float]] = defaultdict(dict)
        for number, count in zip(found.tolist(), counts.tolist(), strict=True):
            text, owner = divmod(number, len(self._counts))
            shares[text][owner] = count / int(self._counts[owner])
        return dict(shares)


def _normalize(text: str) -> str:
    return "".join(text.split()).casefold()


def _spelt(text: str) -> str:
    """Its words and signs with one space before, between and behind them."""
    return f" {' '.join(_WORD_OR_SIGN.findall(text.casefold()))} "


def _words(texts: Iterable[str]) -> list[bytes]:
    """The words of all texts, in UTF-8, with _END behind those of each."""

    def words(text: str) -> bytes:
        if text.isascii():  # the same words, at a quarter of the time
            return text.encode().translate(_ASCII)
        return " ".join(_WORD.findall(text.casefold())).encode(errors="surrogatepass")

    return b"".join([words(text) + b" " + _END + b" " for text in texts]).split()
