"""Texts with answers in them, and their tokens, in; which of these are trained out.

    Written + Located -> spans of tokens -> Examples

A span of characters must be whole tokens, and what stands before an answer must have the ids that
it has by itself, as an engine sends it. A row where this does not hold is refused.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mcore_sft.data.conversation import UnfitRow
from mcore_sft.data.render import Written
from mcore_sft.data.rows import Examples
from mcore_sft.data.tokenizer import Located, Offsets, Tokenizer

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
        edges = [
            [place for a in one.answers for span in a.spans for place in span] for one in written
        ]
        begins = [[answer.begin for answer in one.answers] for one in written]
        cuts, spanned = found.cut(_in_bytes(found, written, edges))
        asked = _in_bytes(found, written, begins)
        prompts, _ = found.cut(asked)
        isolating = np.flatnonzero(self._isolates[found.ids])
        since = np.append(-1, isolating)[np.searchsorted(isolating, prompts)]
        made, kept, edge, prompt = _Made(), [], 0, 0
        for k, (row, one) in enumerate(zip(rows, written, strict=True)):
            mine = slice(edge, edge := edge + len(edges[k]))
            asks = range(prompt, prompt := prompt + len(begins[k]))
            first = int(found.offsets[k])
            try:
                if spanned[mine].any():
                    raise self._spanned(found, int(cuts[mine][spanned[mine]][0]) - 1)
                for ask in asks:
                    start = max(int(since[ask]), first)
                    self._require_asked_alike(found, start, int(prompts[ask]), int(asked[ask]))
                for answer in np.cumsum([2 * len(answer.spans) for answer in one.answers]):
                    self._require_stop(found, int(cuts[mine][answer - 1]) - 1)
            except UnfitRow as error:
                refuse(row, error)
            else:
                kept.append(k)
                made.add(row, found.ids[first : cuts[mine][-1]], cuts[mine] - first)
        return made.examples(), kept

    def _require_asked_alike(self, found: Located, start: int, end: int, place: int) -> None:
        """`UnfitRow` if tokens `start` to `end`, up to `place`, are not those of this text alone.

        Nothing before `start` changes them.
        """
        text = bytes(found.data[int(found.begins[start]) if end > start else place : place])
        alone = self._alone.get(text)
        if alone is None:
            alone = self._tokenizer.encode(text.decode())
            if len(text) <= _SHORT:
                self._alone[text] = alone
        trained = found.ids[start:end].tolist()
        if trained != alone:
            raise UnfitRow(
                f"before an answer an engine would send {alone[-3:]} "
                f"({self._tokenizer.spell(alone[-3:])!r}), expected {trained[-3:]} "
                f"({self._tokenizer.spell(trained[-3:])!r}), as the conversation has them. Fix: "
                "mend the row (does an answer begin with white space?), or name another "
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

    def _require_stop(self, found: Located, token: int) -> None:
        number = int(found.ids[token])
        if number not in self._stop_ids:
            raise UnfitRow(
                f"an answer ends with the token {self._tokenizer.spell([number])!r} ({number}), "
                f"expected a stop token ({', '.join(map(str, self._stop_ids))}). Fix: mend the "
                "row, or name another prompt.template"
            )


class _Made:
    """Examples, one by one."""

    def __init__(self) -> None:
        self._tokens = [np.zeros(0, np.int32)]
        self._cuts = [np.zeros(0, np.int64)]
        self._rows: list[int] = []

    def add(self, row: int, tokens: npt.NDArray[np.int32], cuts: Offsets) -> None:
        """One more: where its trained runs begin and end, in turn."""
        self._rows.append(row)
        self._tokens.append(tokens)
        self._cuts.append(cuts)

    def examples(self) -> Examples:
        """All of them."""
        return Examples(
            tokens=np.concatenate(self._tokens),
            lengths=np.array([len(tokens) for tokens in self._tokens[1:]], np.int32),
            spans=np.concatenate(self._cuts).reshape(-1, 2).astype(np.int32),
            span_counts=np.array([len(cuts) // 2 for cuts in self._cuts[1:]], np.int32),
            rows=np.array(self._rows, np.int64),
        )


def _in_bytes(
    found: Located, written: Sequence[Written], places: Sequence[Sequence[int]]
) -> Offsets:
    """`places` in the characters of each text as places in the bytes of all."""
    made = [found.places(k, one.text, places[k]) for k, one in enumerate(written)]
    return np.concatenate([np.zeros(0, np.int64), *made])
