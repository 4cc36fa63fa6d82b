"""Tokens that other tools prepared in, examples out.

FILE.idx, FILE.bin of Megatron-LM -> read_megatron -> Examples
packed Parquet of Megatron-Bridge -> read_bridge   -> Examples

T = tokens, M = examples, R = rows of a table.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import IndexedTokens, running_sum
from mcore_sft.data.rows import Examples

Array = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]

_LARGEST = np.iinfo(np.int32).max
_MEND = "write it again with the tool that made it, or give another source"
BRIDGE = ("input_ids", "loss_mask", "seq_start_id")
"""Columns of a packed dataset of Megatron-Bridge."""


def count_megatron(file: Path) -> int:
    """Documents of a token file of Megatron-LM, given its .idx: the examples it makes."""
    return len(_open(file).documents) - 1


def read_megatron(file: Path, mask: Path | Literal["all"], start: int, stop: int) -> Examples:
    """Documents `start` to `stop` of a token file of Megatron-LM, given its .idx: an example each.

    A document is what came from one line of text: one sequence or, where sentences were split,
    several, which are joined again. `mask` is the .idx of a second such file with sequences of the
    same lengths and 1 for each token that is trained, 0 for the others; `all` trains every token.
    An example's first token is predicted by nothing and never trained. Empty documents make empty
    examples.

    `DataError` names the file and the first sequence that cannot be.
    """
    tokens = _open(file)
    documents = tokens.documents[start : stop + 1]
    begins, ends = documents[:-1], documents[1:]
    if (at := _first((begins < 0) | (ends < begins) | (ends > len(tokens)))) is not None:
        raise DataError(
            f"{file}: document {start + at}: goes from sequence {begins[at]} to {ends[at]}, "
            f"expected not backwards and within 0 to {len(tokens)}; {_MEND}"
        )
    first, last = int(documents[0]), int(documents[-1])
    ids = _values(file, tokens, first, last, largest=_LARGEST)
    lengths = np.diff(running_sum(tokens.lengths[first:last])[documents - first])
    trained = np.ones(len(ids), dtype=np.bool_)
    if mask != "all":
        trained = _read_mask(mask, file, tokens, first, last)
    return _examples(ids, trained, lengths, rows=np.arange(stop - start))


def is_bridge(schema: pa.Schema) -> bool:
    """Whether a table is a packed dataset of Megatron-Bridge."""
    names = schema.names
    return all(name in names and _is_list(schema.types[names.index(name)]) for name in BRIDGE)


def read_bridge(table: pa.Table, *, name: str, first: int, eos: int | None) -> Examples:
    """The examples of the packs in a packed dataset of Megatron-Bridge, a pack in each row.

    input_ids holds the whole examples of a pack end to end, seq_start_id where each begins, from 0
    on and without a last end. loss_mask is as long as input_ids and belongs to the labels: entry i
    says whether the token at i + 1 is trained. So it stands one place left of our spans, and the
    entry at an example's last token means nothing: Megatron-Bridge cuts that token off the inputs
    when it makes a batch (and a 1 does stand there in packs of prompts and completions).

    Examples made for context parallelism are padded with end-of-sequence tokens, and their
    loss_mask may be 1: in a batch Megatron-Bridge trains nothing that follows such a token. Hence
    of `eos` repeated at the end of an example only the first stays.

    `DataError` names the row as NAME:NUMBER, `first` being the number of the table's first row.
    """
    packs = _Packs(table, name, first)
    ids, sizes = packs.column("input_ids", largest=_LARGEST)
    mask, mask_sizes = packs.column("loss_mask", largest=1)
    starts, counts = packs.column("seq_start_id", largest=_LARGEST)
    if (row := _first(sizes != mask_sizes)) is not None:
        packs.refuse(row, f"{sizes[row]} input_ids, but a loss_mask of {mask_sizes[row]}")
    if (row := _first(counts == 0)) is not None:
        packs.refuse(row, "seq_start_id is empty, expected 0 and where other examples begin")
    rows = np.repeat(np.arange(len(sizes)), counts)
    ends = np.append(starts[1:], 0)
    ends[running_sum(counts)[1:] - 1] = sizes
    begins_pack = np.append(True, rows[1:] != rows[:-1])[: len(rows)]
    if (at := _first((starts >= ends) | (begins_pack & (starts != 0)))) is not None:
        packs.refuse(
            int(rows[at]),
            f"an example from {starts[at]} to {ends[at]} in seq_start_id, expected the first at 0 "
            f"and each after the one before, within {sizes[rows[at]]} tokens",
        )
    lengths = ends - starts
    trained = np.append(False, mask[:-1] == 1)[: len(mask)]
    kept = _without_padding(ids, lengths, eos)
    lengths = np.diff(running_sum(kept)[running_sum(lengths)])
    return _examples(ids[kept], trained[kept], lengths, rows=rows)


def _open(file: Path) -> IndexedTokens:
    try:
        tokens = IndexedTokens(file.with_suffix(""), mend=_MEND)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); {_MEND}") from None
    documents = tokens.documents
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(tokens):
        raise DataError(
            f"{file}: its documents do not go from sequence 0 to {len(tokens)}, the last; {_MEND}"
        )
    return tokens


def _values(file: Path, tokens: IndexedTokens, first: int, last: int, *, largest: int) -> Array:
    """Values of the sequences `first` to `last`, end to end, all of them from 0 to `largest`."""
    if first == last:
        return tokens.values[:0]
    size, before = tokens.dtype.itemsize, max(first - 1, 0)
    ends = tokens.offsets[before:last] + tokens.lengths[before:last].astype(np.int64) * size
    begins = ends[:-1] if first else np.append(0, ends[:-1])
    ends = ends[len(ends) - (last - first) :]
    lengths, offsets = tokens.lengths[first:last], tokens.offsets[first:last]
    if (at := _first((lengths < 0) | (offsets != begins))) is not None:
        raise DataError(
            f"{file}: sequence {first + at}: {lengths[at]} tokens at byte {offsets[at]}, expected "
            f"at least 0 tokens at byte {begins[at]}, where the one before ends; {_MEND}"
        )
    values = tokens.values[int(begins[0]) // size : int(ends[-1]) // size]
    if (at := _first((values < 0) | (values > largest))) is not None:
        sequence = first + int(np.searchsorted(ends, begins[0] + at * size, side="right"))
        raise DataError(
            f"{file}: sequence {sequence}: holds {values[at]}, expected 0 to {largest}; {_MEND}"
        )
    return values


def _read_mask(mask: Path, file: Path, tokens: IndexedTokens, first: int, last: int) -> Flags:
    """Which tokens of the sequences `first` to `last` are trained."""
    flags = _open(mask)
    if len(flags) != len(tokens):
        raise DataError(f"{mask}: {len(flags)} sequences, but {file} has {len(tokens)}; {_MEND}")
    found, expected = flags.lengths[first:last], tokens.lengths[first:last]
    if (at := _first(found != expected)) is not None:
        raise DataError(
            f"{mask}: sequence {first + at}: {found[at]} flags, but {file} has {expected[at]} "
            f"tokens there; {_MEND}"
        )
    trained: Flags = _values(mask, flags, first, last, largest=1) == 1
    return trained


@dataclass(frozen=True)
class _Packs:
    """A table whose columns are lists of integers; its rows have the names NAME:FIRST and on."""

    table: pa.Table
    name: str
    first: int

    def refuse(self, row: int, what: str) -> NoReturn:
        raise DataError(f"{self.name}:{self.first + row}: {what}; {_MEND}")

    def column(self, column: str, *, largest: int) -> tuple[Ids, Ids]:
        """Values of all rows end to end, each from 0 to `largest`, and their number in each row."""
        lists = self.table[column].combine_chunks()
        sizes: Ids = pc.list_value_length(lists).fill_null(-1).to_numpy().astype(np.int64)
        if (row := _first(sizes < 0)) is not None:
            self.refuse(row, f"{column} is null, expected a list")
        flat = lists.flatten()
        kind = flat.type
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            self.refuse(0, f"{column} holds {kind}, expected integers")
        values: Ids = flat.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
        if (at := _first((values < 0) | (values > largest))) is not None:
            begins = running_sum(sizes)
            row = int(np.searchsorted(begins, at, side="right")) - 1
            self.refuse(row, f"{column}[{at - begins[row]}] is {flat[at]}, expected 0 to {largest}")
        return values, sizes


def _without_padding(ids: Ids, lengths: Ids, eos: int | None) -> Flags:
    """All tokens [T] but each `eos` that repeats the one before it up to the end of an example."""
    if eos is None:
        return np.ones(len(ids), dtype=np.bool_)
    new = np.append(True, (ids[1:] != eos) | (ids[:-1] != eos))[: len(ids)]
    ends = running_sum(lengths)[1:]
    new[ends[:-1]] = True
    runs = np.flatnonzero(new)
    last = runs[np.searchsorted(runs, ends) - 1]
    kept: Flags = np.arange(len(ids)) <= np.repeat(last, lengths)
    return kept


def _examples(ids: Array, trained: Flags, lengths: Ids, *, rows: Ids) -> Examples:
    """Examples of `lengths` [M], of which the `trained` [T] tokens but each first one are."""
    begins = running_sum(lengths)
    trained[begins[:-1][lengths > 0]] = False  # which also ends a run at the end of an example
    spans = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
    owners = np.searchsorted(begins, spans[:, 0], side="right") - 1
    return Examples(
        tokens=ids.astype(np.int32),
        lengths=lengths.astype(np.int32),
        spans=(spans - begins[owners, np.newaxis]).astype(np.int32),
        span_counts=np.bincount(owners, minlength=len(lengths)).astype(np.int32),
        rows=rows.astype(np.int64),
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _first(wrong: Flags) -> int | None:
    """Where the first of them is, if any."""
    at = int(wrong.argmax()) if len(wrong) else 0
    return at if at < len(wrong) and wrong[at] else None
