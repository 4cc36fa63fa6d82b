"""The trained tokens of examples in, how many of them answer, reason and call tools out.

Reasoning and calls are told by the tokens that open and close them in the usual templates. What a
template spells in letters alone is not seen. T = tokens, S = trained runs, M = examples.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data.indexed import running_sum

REASONING, CALLS = "reasoning", "tool calls"
ANSWERS, STOPPED = "answers", "answers that stop"
"""What is counted: trained tokens of either kind, and trained runs."""

TAGS: Mapping[str, Sequence[tuple[str, str | None]]] = {
    REASONING: [("<think>", "</think>"), ("[THINK]", "[/THINK]")],
    CALLS: [
        ("<tool_call>", "</tool_call>"),
        ("<|tool_call>", "<tool_call|>"),
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"),
        ("[TOOL_CALLS]", None),
        ("<|python_tag|>", None),
    ],
}
"""Tokens that open and close each kind; a call without a token that closes it ends the answer."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Counts by the tokens of one tokenizer. pairs: ids of tags by kind; -1 closes nothing."""

    pairs: Mapping[str, Sequence[tuple[int, int]]]
    stop_ids: Sequence[int]

    @classmethod
    def of(cls, vocab: Mapping[str, int], stop_ids: Sequence[int]) -> "Parts":
        """Those of a vocabulary; a kind of which it has no tag is not counted."""
        pairs = {
            kind: [(vocab[a], vocab[b] if b else -1) for a, b in tags if {a, b or a} <= set(vocab)]
            for kind, tags in TAGS.items()
        }
        return cls(pairs={kind: ids for kind, ids in pairs.items() if ids}, stop_ids=stop_ids)

    def count(self, tokens: npt.NDArray[Any], begins: Ids, spans: Ids) -> Counter[str]:
        """Counts of the examples that begin at `begins` [M + 1] in `tokens` [T].

        spans [S, 2]: trained runs, from where to where in `tokens`.
        """
        stopped = np.isin(tokens[spans[:, 1] - 1], self.stop_ids)
        found = Counter({ANSWERS: len(spans), STOPPED: int(stopped.sum())})
        trained = np.zeros(len(tokens) + 1, np.int8)
        np.add.at(trained, spans[:, 0], 1)
        np.add.at(trained, spans[:, 1], -1)
        sums = running_sum(np.cumsum(trained[:-1]))
        for kind, pairs in self.pairs.items():
            found[kind] = sum(self._inside(tokens, begins, sums, *pair) for pair in pairs)
        return found

    def _inside(
        self, tokens: npt.NDArray[Any], begins: Ids, sums: Ids, opening: int, closing: int
    ) -> int:
        """Trained tokens from each `opening` to the next `closing`, both included."""
        opens = np.flatnonzero(tokens == opening)
        if not len(opens):
            return 0
        closes = np.flatnonzero(tokens == closing) + 1
        if closing < 0:
            closes = np.flatnonzero(np.isin(tokens, self.stop_ids))
        ends = np.union1d(closes, begins)
        # Of several that open before one closes, the first counts.
        ends = ends[np.searchsorted(ends, opens, side="right")]
        first = np.append(True, ends[1:] != ends[:-1])
        return int(np.sum(sums[ends[first]] - sums[opens[first]]))
