"""An Arrow array in, the JSON values that it stands for out, whichever types it keeps them in.

struct                              -> object, without the keys that are null
map                                 -> object
list, of any kind                   -> array
dictionary, run-end encoded, union  -> what they hold
arrow.json                          -> the value that its text spells
text, bytes                         -> text (bytes must be UTF-8)
date, time, timestamp, UUID         -> text, times in ISO 8601, and in UTC where they have a zone
decimal                             -> number

They are the values of the same rows as JSON lines, with one exception: all structs of a column have
the same keys, so that a key that is null there may be one that the row never had.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import repeat
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mcore_sft.base import json_text

Values = list[Any]
Places = npt.NDArray[np.int64]
Names = frozenset[str]

EXTENSION = b"ARROW:extension:name"
"""What the metadata of a field calls an extension type that this pyarrow does not know."""


def json_values(array: pa.Array, field: pa.Field, texts: Names = frozenset()) -> Values:
    """The values [N] of `array` [N], whose field is `field`; a null is None.

    `texts` names the fields that hold text: this one, or those of its objects. That decides what
    arrow.json means: where texts and lists are mixed, `datasets` writes the text `Hi` with quotes
    and the text `42` without.

    `ValueError` says what JSON has no value for.
    """
    extension = _extension(field)
    if extension is None:
        return _plain(array, field, texts)
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    if extension == "arrow.json":
        spelt = _plain(array, pa.field("", array.type))
        return _each(spelt, lambda text: _parsed(text, field.name in texts))
    if extension == "arrow.bool8":
        return _each(array.to_pylist(), bool)
    if extension == "arrow.uuid":
        return _each(array.to_pylist(), lambda raw: str(UUID(bytes=raw)))
    raise ValueError(f"its Arrow type is the extension {extension}, which is not read")


def _extension(field: pa.Field) -> str | None:
    """The name of an extension type, also of one that this pyarrow does not know."""
    if isinstance(field.type, pa.BaseExtensionType):
        return str(field.type.extension_name)
    name = (field.metadata or {}).get(EXTENSION)
    return None if name is None else name.decode()


def _each(values: Sequence[Any], make: Callable[[Any], Any]) -> Values:
    return [None if value is None else make(value) for value in values]


def _plain(array: pa.Array, field: pa.Field, texts: Names = frozenset()) -> Values:
    """The values of an array whose type is no extension."""
    kind = array.type
    for is_one, read in _NESTED.items():
        if is_one(kind):
            return read(array, texts)
    if pa.types.is_dictionary(kind):
        held = json_values(array.dictionary, field.with_type(kind.value_type), texts)
        return _each(array.indices.to_pylist(), held.__getitem__)
    if pa.types.is_run_end_encoded(kind):
        decoded = pc.run_end_decode(array)
        return json_values(decoded, field.with_type(decoded.type), texts)
    if pa.types.is_timestamp(kind):
        moments = array.cast(pa.timestamp("us"), safe=kind.unit != "ns").to_pylist()
        return _each(moments, lambda moment: _moment(moment, kind.tz is not None))
    if pa.types.is_time(kind):
        array = array.cast(pa.time64("us"), safe=False)
    values: Values = array.to_pylist()
    for is_leaf, make in _LEAVES.items():
        if is_leaf(kind):
            return _each(values, make)
    return values


def _structs(array: pa.StructArray, texts: Names) -> Values:
    fields = [array.type.field(i) for i in range(array.type.num_fields)]
    columns = [
        json_values(array.field(i), field, texts & {field.name}) for i, field in enumerate(fields)
    ]
    names = [field.name for field in fields]
    rows = zip(*columns, strict=True) if columns else repeat((), len(array))
    made: Values = [dict(zip(names, row, strict=True)) for row in rows]
    if any(None in column for column in columns):
        made = [{key: it[key] for key in it if it[key] is not None} for it in made]
    return _where_valid(array, made)


def _lists(array: pa.Array, texts: Names) -> Values:
    held, begins, ends = _stretches(array)
    values = json_values(held, array.type.value_field, texts)
    made = [values[begin:end] for begin, end in zip(begins, ends, strict=True)]
    return _where_valid(array, made)


def _maps(array: pa.MapArray, _: Names) -> Values:
    held, begins, ends = _stretches(array)
    names = [_key(name) for name in json_values(held.field(0), array.type.key_field)]
    values = json_values(held.field(1), array.type.item_field)
    places = zip(begins, ends, strict=True)
    return _where_valid(array, [_object(names[i:j], values[i:j]) for i, j in places])


def _unions(array: pa.UnionArray, _: Names) -> Values:
    kind = array.type
    held = [json_values(array.field(i), kind.field(i)) for i in range(kind.num_fields)]
    of_code = dict(zip(kind.type_codes, held, strict=True))
    codes, places = members(array)
    return [of_code[code][at] for code, at in zip(codes.tolist(), places.tolist(), strict=True)]


def members(array: pa.UnionArray) -> tuple[npt.NDArray[np.int8], Places]:
    """Which type each of N values of a union has, and its place among the values of that [N]."""
    mine = slice(array.offset, array.offset + len(array))  # pyarrow's own properties forget it
    _, codes, *offsets = array.buffers()
    places = np.arange(len(array), dtype=np.int64)
    if array.type.mode == "dense":
        places = np.frombuffer(offsets[0], np.int32)[mine].astype(np.int64)
    return np.frombuffer(codes, np.int8)[mine], places


def _where_valid(array: pa.Array, values: Values) -> Values:
    if not array.null_count:
        return values
    there = array.is_valid().to_pylist()
    return [value if is_there else None for value, is_there in zip(values, there, strict=True)]


def _stretches(array: pa.Array) -> tuple[pa.Array, list[int], list[int]]:
    """What lists or maps [N] hold end to end, and where in it each begins and ends."""
    begins, ends = stretches(array)
    used = begins < ends
    low = int(begins[used].min(initial=len(array.values)))
    high = int(ends[used].max(initial=low))
    return array.values.slice(low, high - low), (begins - low).tolist(), (ends - low).tolist()


def stretches(array: pa.Array) -> tuple[Places, Places]:
    """Where in `array.values` each of N lists or maps begins and ends [N]; a null is empty."""
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        begins = (np.arange(len(array), dtype=np.int64) + array.offset) * kind.list_size
        ends = begins + kind.list_size
    else:
        offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        viewed = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
        begins = offsets if viewed else offsets[:-1]
        ends = begins + array.sizes.to_numpy(zero_copy_only=False) if viewed else offsets[1:]
    if array.null_count:
        there = array.is_valid().to_numpy(zero_copy_only=False).astype(np.bool_)
        begins, ends = np.where(there, begins, 0), np.where(there, ends, 0)
    return begins, ends


def _object(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    made = dict(zip(names, values, strict=True))
    if len(made) < len(names):
        raise ValueError(f"a map has a key twice: {', '.join(names)}")
    return made


def _key(value: Any) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"a map has the key {value!r:.60}, expected text")


def _parsed(text: str, is_text: bool) -> Any:
    """The value that `text` spells; where it stands for a text, that or the parts of a content."""
    try:
        value = json_text.loads(text)
    except ValueError as error:
        if is_text:
            return text
        raise ValueError(f"broken JSON ({error}): {text[:60]!r}") from None
    return value if not is_text or isinstance(value, str) or _is_parts(value) else text


def _is_parts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in value)
    )


def _moment(moment: datetime, has_zone: bool) -> str:
    return (moment.replace(tzinfo=UTC) if has_zone else moment).isoformat()


def _decimal(value: Decimal) -> int | float:
    return int(value) if value.as_tuple().exponent == 0 else float(value)


_NESTED: dict[Callable[[pa.DataType], bool], Callable[[Any, Names], Values]] = {
    pa.types.is_struct: _structs,
    pa.types.is_map: _maps,
    pa.types.is_union: _unions,
    pa.types.is_list: _lists,
    pa.types.is_large_list: _lists,
    pa.types.is_fixed_size_list: _lists,
    pa.types.is_list_view: _lists,
    pa.types.is_large_list_view: _lists,
}
_LEAVES: dict[Callable[[pa.DataType], bool], Callable[[Any], Any]] = {
    pa.types.is_binary: bytes.decode,
    pa.types.is_large_binary: bytes.decode,
    pa.types.is_binary_view: bytes.decode,
    pa.types.is_fixed_size_binary: bytes.decode,
    pa.types.is_decimal: _decimal,
    pa.types.is_date: lambda date: date.isoformat(),
    pa.types.is_time: lambda time: time.isoformat(),
    pa.types.is_duration: timedelta.total_seconds,
    pa.types.is_interval: str,
}
