"""Texts with answers in them, and their tokens, in; which of these are trained out.

    Written + Located -> spans of tokens -> Examples

A span of characters must be whole tokens, and what stands before an answer must have the ids that
it has by itself, as an engine sends it. A row where this does not hold is refused.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mcore_sft.data.rows import Examples
from mcore_sft.data.sources.conversation import UnfitRow
from mcore_sft.data.text.render import Written
from mcore_sft.data.text.tokenizer import Located, Offsets, Tokenizer, byte_places

_SHORT = 200
"""Bytes of a text whose ids are remembered."""


class Masks:
    """Tells which tokens of texts are trained. stop_ids: what an answer ends with."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._isolates = np.zeros(tokenizer.vocab_size, np.bool_)
        self._isolates[list(tokenizer.isolating_ids)] = True
        self._alone: dict[bytes, list[int]] = {}

    def examples(
        self,
        rows: Sequence[int],
        written: Sequence[Written],
        found: Located,
        refuse: Callable[[int, UnfitRow], None],
    ) -> tuple[Examples, list[int]]:
        """Examples of the texts `written`, one of each of `rows`; which texts are not refused.

        found: their tokens.
        """
        spans = [
            [place for answer in one.answers for span in answer.spans for place in span]
            for one in written
        ]
        counts = np.array([len(some) for some in spans], np.int64)
        cuts, spanned = found.cut(_in_bytes(found, written, spans))
        ends = np.array([len(a.spans) for one in written for a in one.answers], np.int64)
        stops = cuts[2 * np.cumsum(ends) - 1] - 1
        faults = self._unlike(written, found)
        owners = np.repeat(np.arange(len(written)), [len(one.answers) for one in written])
        unstopped = ~np.isin(found.ids[stops], self._stop_ids)
        for k, token in zip(owners[unstopped].tolist(), stops[unstopped].tolist(), strict=True):
            faults.setdefault(k, self._without_stop(int(found.ids[token])))
        owners = np.repeat(np.arange(len(written)), counts)
        for k, cut in zip(owners[spanned].tolist(), cuts[spanned].tolist(), strict=True):
            faults[k] = self._spanned(found, cut - 1)
        for k in sorted(faults):
            refuse(rows[k], faults[k])
        kept = np.ones(len(written), np.bool_)
        kept[list(faults)] = False
        return _cut_out(found, rows, cuts, counts, kept), np.flatnonzero(kept).tolist()

    def _unlike(self, written: Sequence[Written], found: Located) -> dict[int, UnfitRow]:
        """What is wrong with texts in which a prompt has other ids than by itself.

        What stands before a token that cuts texts changes nothing behind it.
        """
        begins = [[answer.begin for answer in one.answers] for one in written]
        places = _in_bytes(found, written, begins)
        prompts, _ = found.cut(places)
        isolating = np.flatnonzero(self._isolates[found.ids])
        owners = np.repeat(np.arange(len(written)), [len(some) for some in begins])
        since = np.append(-1, isolating)[np.searchsorted(isolating, prompts)]
        since = np.maximum(since, found.offsets[owners])
        starts = np.where(since < prompts, np.append(found.begins, 0)[since], places)
        faults: dict[int, UnfitRow] = {}
        every = zip(*(a.tolist() for a in (owners, since, prompts, starts, places)), strict=True)
        for k, first, last, start, end in every:
            text = bytes(found.data[start:end])
            alone = self._alone.get(text)
            if alone is None:
                alone = self._tokenizer.encode(text.decode())
                if len(text) <= _SHORT:
                    self._alone[text] = alone
            if (trained := found.ids[first:last].tolist()) != alone:
                faults.setdefault(k, self._asked_otherwise(trained[-3:], alone[-3:]))
        return faults

    def _asked_otherwise(self, trained: list[int], alone: list[int]) -> UnfitRow:
        return UnfitRow(
            f"before an answer an engine would send {alone} ({self._tokenizer.spell(alone)!r}), "
            f"expected {trained} ({self._tokenizer.spell(trained)!r}), as the conversation has "
            "them. Fix: mend the row (does an answer begin with white space?), or name another "
            "prompt.template"
        )

    def _spanned(self, found: Located, token: int) -> UnfitRow:
        number = int(found.ids[token])
        around = found.ids[max(0, token - 8) : token + 8].tolist()
        return UnfitRow(
            f"the token {self._tokenizer.spell([number])!r} ({number}) stands for the end of what "
            "is not trained and the beginning of what is, or the other way round, near "
            f"{self._tokenizer.spell(around)!r}. Fix: mend the row (does an answer begin or end "
            "with white space?), or name another prompt.template"
        )

    def _without_stop(self, number: int) -> UnfitRow:
        return UnfitRow(
            f"an answer ends with the token {self._tokenizer.spell([number])!r} ({number}), "
            f"expected a stop token ({', '.join(map(str, self._stop_ids))}). Fix: mend the row, or "
            "name another prompt.template"
        )


def _cut_out(
    found: Located,
    rows: Sequence[int],
    cuts: Offsets,
    counts: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
) -> Examples:
    """The tokens of each text that is `kept`, up to the end of its last trained run.

    cuts: where trained runs begin and end, in turn, so many of each text as `counts` says.
    """
    firsts = found.offsets[:-1]
    lasts = np.append(cuts, 0)[np.cumsum(counts) - 1]
    mine = np.zeros(len(found.ids) + 1, np.int8)
    mine[firsts[kept]] += 1
    mine[lasts[kept]] -= 1
    spans = (cuts - np.repeat(firsts, counts))[np.repeat(kept, counts)]
    return Examples(
        tokens=found.ids[np.cumsum(mine[:-1], dtype=np.int8).astype(np.bool_)],
        lengths=(lasts - firsts)[kept].astype(np.int32),
        spans=spans.reshape(-1, 2).astype(np.int32),
        span_counts=(counts // 2)[kept].astype(np.int32),
        rows=np.array(rows, np.int64)[kept],
    )


def _in_bytes(
    found: Located, written: Sequence[Written], places: Sequence[Sequence[int]]
) -> Offsets:
    """`places` in the characters of each text as places in the bytes of all."""
    made = [
        place
        for one, some, start in zip(written, places, found.starts.tolist(), strict=False)
        for place in (
            [start + at for at in some]
            if one.text.isascii()
            else (start + byte_places(one.text, np.array(some, np.int64))).tolist()
        )
    ]
    return np.array(made, np.int64)
