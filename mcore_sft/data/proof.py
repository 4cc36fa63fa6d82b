"""The files of one split in, what holds for every example out; `DataError` where it does not.

    Arrays -> read once, some millions of tokens at a time -> Proof

Every example has supervised tokens, ends with a stop token that is trained, does not begin with
two BOS tokens, and is in a pack; no pack is longer than a sequence. Nothing is taken from what the
writer said: the tokens are those of the .bin. N = examples.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data.dataset import Arrays
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.rows import num_trained
from mcore_sft.data.trained_parts import Parts

_TOKENS_AT_ONCE = 1 << 21
_PACKS_AT_ONCE = 1 << 16
_MEND = "the tokenizer, the prompt.template and the source do not fit each other; name other ones"


@dataclass(frozen=True, kw_only=True, eq=False)
class Proof:
    """What was found in all examples of a split.

    lengths, supervised int64 [longest + 1]: how many examples have so many tokens, and so many
    supervised ones. tokens, supervised_tokens: of an epoch, which shows some examples more often
    than others. with_bos: examples that begin with a BOS token; None where the tokenizer has none,
    or others made the tokens. parts: what of them answers, reasons and calls tools
    (`trained_parts`).
    """

    lengths: npt.NDArray[np.int64]
    supervised: npt.NDArray[np.int64]
    tokens: int
    supervised_tokens: int
    with_bos: int | None
    parts: Mapping[str, int]

    @property
    def examples(self) -> int:
        """How many."""
        return int(self.lengths.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Some:
    """Examples `first`, ... one after another: lengths and supervised [n], tokens end to end."""

    first: int
    lengths: npt.NDArray[np.int32]
    tokens: npt.NDArray[Any]
    supervised: npt.NDArray[np.int64]
    trained_to: npt.NDArray[np.int32]
    """Where the last trained run ends; 0 where there is none."""
    spans: npt.NDArray[np.int64]
    """Trained runs [S, 2], from where to where in `tokens`."""

    @property
    def begins(self) -> npt.NDArray[np.int64]:
        """Where each begins in `tokens`, and the last ends."""
        return running_sum(self.lengths)


def prove(
    arrays: Arrays,
    *,
    sequence_length: int,
    stop_ids: Sequence[int] | None,
    bos_id: int | None,
    vocab: Mapping[str, int],
) -> Proof:
    """Look at every token, span and pack of a split; holds some tens of MB and 4 bytes a row.

    Without `stop_ids`, as for tokens that others made by rules of their own, neither the ends of
    examples nor BOS tokens are judged.
    """
    times = _times(arrays, sequence_length)
    longest = int(arrays.tokens.lengths.max(initial=0))
    lengths = np.zeros(longest + 1, dtype=np.int64)
    supervised = np.zeros(longest + 1, dtype=np.int64)
    bos = None if stop_ids is None else bos_id
    tokens, supervised_tokens, with_bos = 0, 0, 0
    parts, found = Parts.of(vocab, stop_ids or ()), Counter[str]()
    for some in _read(arrays):
        _require_supervised(arrays, some)
        if stop_ids is not None:
            _require_trained_stop(arrays, some, stop_ids)
        with_bos += _require_one_bos(arrays, some, bos)
        found.update(parts.count(some.tokens, some.begins, some.spans))
        lengths += np.bincount(some.lengths, minlength=longest + 1)
        supervised += np.bincount(some.supervised, minlength=longest + 1)
        visits = times[some.first : some.first + len(some.lengths)].astype(np.int64)
        tokens += int(visits @ some.lengths)
        supervised_tokens += int(visits @ some.supervised)
    return Proof(
        lengths=lengths,
        supervised=supervised,
        tokens=tokens,
        supervised_tokens=supervised_tokens,
        with_bos=None if bos is None else with_bos,
        parts=found,
    )


def _times(arrays: Arrays, sequence_length: int) -> npt.NDArray[np.int32]:
    """In how many packs each example is [N], none of which is too long."""
    times = np.zeros(len(arrays.tokens), dtype=np.int32)
    for first in range(0, len(arrays.pack_offsets) - 1, _PACKS_AT_ONCE):
        offsets = np.array(arrays.pack_offsets[first : first + _PACKS_AT_ONCE + 1])
        examples = np.array(arrays.packs[offsets[0] : offsets[-1]])
        np.add.at(times, examples, 1)
        sizes = np.diff(running_sum(arrays.tokens.lengths[examples])[offsets - offsets[0]])
        bad = np.flatnonzero(sizes > sequence_length)
        if len(bad):
            raise DataError(
                f"{arrays.file('packs')}: pack {first + bad[0]}: {sizes[bad[0]]} tokens, expected "
                f"at most {sequence_length}; run preprocess again with --overwrite"
            )
    if not times.all():
        raise DataError(
            f"{arrays.file('packs')}: example {times.argmin()}: is in no pack, expected in one or "
            "more; run preprocess again with --overwrite"
        )
    return times


def _read(arrays: Arrays) -> Iterator[_Some]:
    """All examples in order; the tokens are read, not mapped, so that no page of them stays."""
    index = arrays.tokens
    size = index.dtype.itemsize
    total = int(index.offsets[-1]) // size + int(index.lengths[-1]) if len(index) else 0
    starts = np.arange(0, total, _TOKENS_AT_ONCE) * size
    cuts = np.unique([*np.searchsorted(index.offsets, starts).tolist(), len(index)])
    with arrays.file("bin").open("rb") as opened:
        for first, last in pairwise(cuts.tolist()):
            lengths = np.array(index.lengths[first:last])
            offsets = np.array(arrays.span_offsets[first : last + 1])
            spans = np.array(arrays.spans[offsets[0] : offsets[-1]])
            sums = running_sum(num_trained(spans))
            offsets -= offsets[0]
            some = np.diff(offsets) > 0
            trained_to = np.zeros_like(lengths)
            trained_to[some] = spans[offsets[1:][some] - 1, 1]
            begins = np.repeat(running_sum(lengths)[:-1], np.diff(offsets))
            yield _Some(
                first=first,
                lengths=lengths,
                tokens=np.fromfile(opened, index.dtype, int(lengths.sum(dtype=np.int64))),
                supervised=np.diff(sums[offsets]),
                trained_to=trained_to,
                spans=spans + begins[:, None],
            )


def _require_supervised(arrays: Arrays, some: _Some) -> None:
    bad = np.flatnonzero(some.supervised < 1)
    if len(bad):
        raise DataError(
            f"{arrays.file('spans')}: example {some.first + bad[0]}: no supervised token, so that "
            f"nothing is learned from it; {_MEND}"
        )


def _require_trained_stop(arrays: Arrays, some: _Some, stop_ids: Sequence[int]) -> None:
    last = some.tokens[some.begins[1:] - 1]
    bad = np.flatnonzero(~np.isin(last, stop_ids) | (some.trained_to != some.lengths))
    if len(bad):
        at = bad[0]
        trained = "trained" if some.trained_to[at] == some.lengths[at] else "not trained"
        raise DataError(
            f"{arrays.file('bin')}: example {some.first + at}: ends with token {last[at]}, "
            f"{trained}; expected a stop token ({', '.join(map(str, stop_ids)) or 'there is none'})"
            f" that is trained, or a model would never learn to stop; {_MEND}"
        )


def _require_one_bos(arrays: Arrays, some: _Some, bos: int | None) -> int:
    """How many of the examples begin with a BOS token, of which none begins with two."""
    if bos is None:
        return 0
    begins = some.begins[:-1]
    with_bos = some.tokens[begins] == bos
    second = np.minimum(begins + 1, len(some.tokens) - 1)
    bad = np.flatnonzero(with_bos & (some.tokens[second] == bos) & (some.lengths > 1))
    if len(bad):
        raise DataError(
            f"{arrays.file('bin')}: example {some.first + bad[0]}: begins with two BOS tokens "
            f"(id {bos}), expected at most one; {_MEND}"
        )
    return int(np.count_nonzero(with_bos))
