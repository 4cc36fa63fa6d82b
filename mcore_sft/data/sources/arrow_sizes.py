"""An Arrow table in, the bytes of each of its rows out, counted as if nothing were shared.

A text that a dictionary, a run or a view repeats counts each time: so large the rows become once
they are read. N = rows, or values of an array.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mcore_sft.data.indexed import running_sum
from mcore_sft.data.sources.arrow_values import members, stretches

Sizes = npt.NDArray[np.int64]


def row_sizes(table: pa.Table | pa.RecordBatch) -> Sizes:
    """Bytes of each row [N]."""
    sizes = np.zeros(len(table), np.int64)
    for column in table.columns:
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        sizes += np.concatenate([_sizes(chunk) for chunk in chunks]) if chunks else 0
    return sizes


def _sizes(array: pa.Array) -> Sizes:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _sizes(array.storage)
    if pa.types.is_struct(kind):
        sizes = np.zeros(len(array), np.int64)
        for i in range(kind.num_fields):
            sizes += _sizes(array.field(i))
        return sizes
    if pa.types.is_dictionary(kind):
        return _taken(_sizes(array.dictionary), array.indices)
    if pa.types.is_run_end_encoded(kind):
        runs = pa.array(np.arange(len(array.values)))
        which = pa.RunEndEncodedArray.from_arrays(array.run_ends, runs)
        return _taken(
            _sizes(array.values), pc.run_end_decode(which.slice(array.offset, len(array)))
        )
    if pa.types.is_union(kind):
        return _of_union(array)
    if pa.types.is_nested(kind):  # what is left are lists of all kinds, and maps
        begins, ends = stretches(array)
        held = running_sum(_sizes(array.values))
        return np.asarray(held[ends] - held[begins])
    return _of_leaves(array)


def _of_leaves(array: pa.Array) -> Sizes:
    """Of values that hold no others; what the type says of a null counts as well."""
    kind, mine = array.type, slice(array.offset, array.offset + len(array))
    if pa.types.is_null(kind) or not len(array):
        return np.zeros(len(array), np.int64)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)
        return views[mine, 0].astype(np.int64)
    if (wide := pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)) or _is_text(kind):
        offsets = np.frombuffer(array.buffers()[1], np.int64 if wide else np.int32)
        return np.diff(offsets[mine.start : mine.stop + 1]).astype(np.int64)
    return np.full(len(array), -(-kind.bit_width // 8), np.int64)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _of_union(array: pa.UnionArray) -> Sizes:
    codes, places = members(array)
    sizes = np.zeros(len(array), np.int64)
    for i, code in enumerate(array.type.type_codes):
        own = codes == code
        sizes[own] = _sizes(array.field(i))[places[own]]
    return sizes


def _taken(sizes: Sizes, indices: pa.Array) -> Sizes:
    """The sizes at `indices` [N]; 0 for a null."""
    which = indices.fill_null(0).to_numpy(zero_copy_only=False)
    there = np.asarray(indices.is_valid().to_numpy(zero_copy_only=False), np.bool_)
    return np.where(there, sizes[which], 0) if len(sizes) else np.zeros(len(indices), np.int64)
