"""The files of one split in, what holds for every example out; `DataError` where it does not.

    Arrays -> parts of the examples, read once, by several processes -> Proof

Every example has supervised tokens, ends with a stop token that is trained, does not begin with
two BOS tokens, and is in a pack; no pack is longer than a sequence. Nothing is taken from what the
writer said: the tokens are those of the .bin. N = examples.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.packs.dataset import Arrays
from mcore_sft.data.packs.trained_parts import Parts
from mcore_sft.data.rows import num_trained
from mcore_sft.data.workers import Workers, no_tool

_TOKENS_AT_ONCE = 1 << 21
_TOKENS_OF_A_TASK = 1 << 24
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


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is asked of every example of the split `split` in `folder`."""

    folder: Path
    split: str
    longest: int
    stop_ids: Sequence[int] | None
    bos_id: int | None
    parts: Parts


def prove(
    arrays: Arrays,
    *,
    sequence_length: int,
    stop_ids: Sequence[int] | None,
    bos_id: int | None,
    vocab: Mapping[str, int],
    workers: Workers | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Proof:
    """Look at every token, span and pack of a split; holds some tens of MB and 4 bytes a row.

    Without `stop_ids`, as for tokens that others made by rules of their own, neither the ends of
    examples nor BOS tokens are judged. `advance` counts bytes of tokens.
    """
    times = _times(arrays, sequence_length)
    asked = _Asked(
        folder=arrays.prefix.parent,
        split=arrays.prefix.name,
        longest=int(arrays.tokens.lengths.max(initial=0)),
        stop_ids=stop_ids,
        bos_id=None if stop_ids is None else bos_id,
        parts=Parts.of(vocab, stop_ids or ()),
    )
    cuts = _cut(arrays, _TOKENS_OF_A_TASK)
    tasks = [(asked, first, last, times[first:last]) for first, last in cuts]
    found: list[Proof] = []
    pool = workers or Workers(1, no_tool)
    for (first, last), part in zip(cuts, pool.each(_prove, tasks), strict=True):
        found.append(part)
        size = int(arrays.tokens.lengths[first:last].sum(dtype=np.int64))
        advance(size * arrays.tokens.dtype.itemsize)
    nothing = np.zeros(asked.longest + 1, np.int64)
    parts = Counter[str]()
    for part in found:
        parts.update(part.parts)
    return Proof(
        lengths=sum((part.lengths for part in found), nothing),
        supervised=sum((part.supervised for part in found), nothing),
        tokens=sum(part.tokens for part in found),
        supervised_tokens=sum(part.supervised_tokens for part in found),
        with_bos=None if asked.bos_id is None else sum(part.with_bos or 0 for part in found),
        parts=parts,
    )


def _prove(_: None, asked: _Asked, first: int, last: int, times: npt.NDArray[np.int32]) -> Proof:
    """What is found in the examples `first` to `last`, which an epoch shows so many `times` [n]."""
    arrays = Arrays.open(asked.folder, asked.split)
    lengths = np.zeros(asked.longest + 1, dtype=np.int64)
    supervised = np.zeros(asked.longest + 1, dtype=np.int64)
    tokens, supervised_tokens, with_bos = 0, 0, 0
    parts = Counter[str]()
    for some in _read(arrays, first, last):
        _require_supervised(arrays, some)
        if asked.stop_ids is not None:
            _require_trained_stop(arrays, some, asked.stop_ids)
        with_bos += _require_one_bos(arrays, some, asked.bos_id)
        parts.update(asked.parts.count(some.tokens, some.begins, some.spans))
        lengths += np.bincount(some.lengths, minlength=len(lengths))
        supervised += np.bincount(some.supervised, minlength=len(lengths))
        visits = times[some.first - first :][: len(some.lengths)].astype(np.int64)
        tokens += int(visits @ some.lengths)
        supervised_tokens += int(visits @ some.supervised)
    return Proof(
        lengths=lengths,
        supervised=supervised,
        tokens=tokens,
        supervised_tokens=supervised_tokens,
        with_bos=with_bos,
        parts=parts,
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


def _cut(
    arrays: Arrays, size: int, begin: int = 0, end: int | None = None
) -> list[tuple[int, int]]:
    """Examples `begin` to `end` in parts of about `size` tokens."""
    index = arrays.tokens
    end = len(index) if end is None else end
    size *= index.dtype.itemsize
    if begin == end:
        return []
    starts = np.arange(int(index.offsets[begin]), int(index.offsets[end - 1]) + 1, size)
    places = np.searchsorted(index.offsets[begin:end], starts) + begin
    return list(pairwise(np.unique([*places.tolist(), end]).tolist()))


def _read(arrays: Arrays, begin: int, end: int) -> Iterator[_Some]:
    """Examples `begin` to `end`; tokens are read, not mapped, so that no page of them stays."""
    index = arrays.tokens
    with arrays.file("bin").open("rb") as opened:
        opened.seek(int(index.offsets[begin]))
        for first, last in _cut(arrays, _TOKENS_AT_ONCE, begin, end):
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
