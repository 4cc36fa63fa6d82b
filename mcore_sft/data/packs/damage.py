"""A packed dataset in, what is wrong with it out: the file, the example or pack, found, expected.

    manifest -> sizes, checksums -> arrays -> examples -> spans, packs -> counts

Each finding is a sentence. What rests on something broken is not looked at, and at most LISTED
findings of one kind are spelt out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_sft.base.progress import progress
from mcore_sft.base.terminal import Console
from mcore_sft.data import manifest as manifests
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.packs.dataset import Array, Arrays
from mcore_sft.data.rows import num_trained

LISTED = 3

_CHUNK = 1 << 24


def find_damage(folder: Path, *, console: Console) -> list[str]:
    """All that is wrong with a packed dataset, a sentence each; every byte is read.

    `DataError` if there is no manifest to compare with, or it was changed.
    """
    manifest = manifests.read(folder)
    files = manifest["files"]
    found: list[str] = []
    total = sum(described["bytes"] for described in files.values())
    with progress("checksums", total=total, console=console) as advance:
        for name, described in files.items():
            found += _check_file(folder, name, described)
            advance(described["bytes"])
    missing = [name for name in files if not (folder / name).is_file()]  # and it was said
    for split in manifest["splits"]:
        if not any(name.startswith(f"{split}.") for name in missing):
            found += find_structural_damage(folder, manifest, split)
    return found


def find_structural_damage(
    folder: Path, manifest: dict[str, Any], split: str, *, tokens: bool = True
) -> Iterator[str]:
    """What the files of one split say that cannot be; without `tokens`, the .bin is not read."""
    try:
        arrays = Arrays.open(folder, split)
    except DataError as error:
        yield str(error)
        return
    examples = list(_examples(arrays))
    yield from examples
    if examples:
        return
    if tokens:
        yield from _tokens(arrays, manifest["inputs"]["tokenizer"]["vocab_size"])
    spans = list(_spans(arrays))
    packs = list(_packs(arrays, manifest["sequence_length"]))
    yield from spans + packs
    if not spans and not packs:
        yield from _supervised(arrays)
        yield from _counts(arrays, folder / manifests.NAME, split, manifest["splits"][split])


def _check_file(folder: Path, name: str, described: dict[str, Any]) -> Iterator[str]:
    try:
        manifests.check_files(folder, {name: described}, verify=True)
    except DataError as error:
        yield str(error)
    except OSError as error:
        yield f"{folder / name}: cannot be read ({error.strerror})"


def _examples(arrays: Arrays) -> Iterator[str]:
    """Lengths, and whether the sequences lie one after another."""
    lengths, offsets = arrays.tokens.lengths, arrays.tokens.offsets
    expected = (running_sum(lengths)[:-1]) * arrays.tokens.dtype.itemsize
    yield from _each(
        arrays.file("idx"),
        lengths < 1,
        lambda i: f"example {i}: {lengths[i]} tokens, expected at least 1",
    )
    yield from _each(
        arrays.file("idx"),
        offsets != expected,
        lambda i: f"example {i}: begins at byte {offsets[i]}, expected {expected[i]}",
    )


def _tokens(arrays: Arrays, vocab_size: int) -> Iterator[str]:
    """Whether the vocabulary has every token."""
    file, raw = arrays.file("bin"), arrays.tokens.values
    begins = running_sum(arrays.tokens.lengths)
    count = 0
    for begin in range(0, len(raw), _CHUNK):
        part = raw[begin : begin + _CHUNK]
        bad = np.flatnonzero((part >= vocab_size) | (part < 0)) + begin
        for place in bad[: max(0, LISTED - count)].tolist():
            example = int(np.searchsorted(begins, place, side="right")) - 1
            yield (
                f"{file}: example {example}: token {place - begins[example]} has id "
                f"{raw[place]}, expected one of the vocabulary, 0 to {vocab_size - 1}"
            )
        count += len(bad)
    if count > LISTED:
        yield f"{file}: ... and {count - LISTED} more"


def _spans(arrays: Arrays) -> Iterator[str]:
    """Whether the trained spans lie in their examples, one after another."""
    lengths, spans = arrays.tokens.lengths, arrays.spans
    if spans.shape[1] != 2:
        yield f"{arrays.file('spans')}: rows of {spans.shape[1]} numbers, expected start and end"
        return
    offsets = list(_offsets(arrays, "span_offsets", "example", len(lengths), "spans", empty=True))
    yield from offsets
    if offsets:
        return
    owners = np.repeat(np.arange(len(lengths)), np.diff(arrays.span_offsets))
    starts, ends = spans[:, 0], spans[:, 1]
    least = np.zeros(len(spans), dtype=np.int32)  # where a span may begin
    least[1:] = np.where(owners[1:] == owners[:-1], ends[:-1], 0)
    yield from _each(
        arrays.file("spans"),
        (starts < least) | (starts >= ends) | (ends > lengths[owners]),
        lambda s: (
            f"example {owners[s]}: trained span {s - arrays.span_offsets[owners[s]]} goes from "
            f"{starts[s]} to {ends[s]}, expected not empty and within {least[s]} to "
            f"{lengths[owners[s]]}"
        ),
    )


def _packs(arrays: Arrays, sequence_length: int) -> Iterator[str]:
    """Whether every example is in a pack, and no pack is empty or too long."""
    packs, lengths = arrays.packs, arrays.tokens.lengths
    file = arrays.file("packs")
    num_packs = len(arrays.supervised)
    offsets = list(_offsets(arrays, "pack_offsets", "pack", num_packs, "packs", empty=False))
    yield from offsets
    if offsets:
        return
    strange = (packs < 0) | (packs >= len(lengths))
    yield from _each(
        file,
        strange,
        lambda i: (
            f"pack {arrays.pack_of(i)}: holds example {packs[i]}, expected 0 to {len(lengths) - 1}"
        ),
    )
    missing = np.bincount(packs[~strange], minlength=len(lengths)) == 0
    yield from _each(
        file, missing, lambda i: f"example {i}: is in no pack, expected in one or more"
    )
    if strange.any():
        return
    sizes = _per_pack(arrays, lengths)
    yield from _each(
        file,
        sizes > sequence_length,
        lambda p: f"pack {p}: {sizes[p]} tokens, expected at most {sequence_length}",
    )


def _supervised(arrays: Arrays) -> Iterator[str]:
    """Whether the supervised tokens of each pack are those of its spans."""
    found, expected = arrays.supervised, _per_pack(arrays, _trained(arrays))
    yield from _each(
        arrays.file("supervised"),
        found != expected,
        lambda p: (
            f"pack {p}: {found[p]} supervised tokens, expected the {expected[p]} of its spans"
        ),
    )


def _counts(arrays: Arrays, file: Path, split: str, said: dict[str, Any]) -> Iterator[str]:
    """Whether the manifest counts what the files hold."""
    lengths = arrays.tokens.lengths
    held = {
        "examples": len(lengths),
        "visits": len(arrays.packs),
        "tokens": int(lengths[arrays.packs].sum(dtype=np.int64)),
        "supervised_tokens": int(arrays.supervised.sum(dtype=np.int64)),
        "longest": int(lengths.max()),
        "packs": len(arrays.supervised),
    }
    for name, number in held.items():
        if said[name] != number:
            yield f"{file}: {split}.{name} is {said[name]}, expected the {number} of the files"


def _offsets(
    arrays: Arrays, name: str, owner: str, owners: int, into: str, *, empty: bool
) -> Iterator[str]:
    """Whether `name` cuts the array `into` into one part for each owner."""
    file, offsets, total = arrays.file(name), getattr(arrays, name), len(getattr(arrays, into))
    if len(offsets) != owners + 1:
        yield f"{file}: {len(offsets)} offsets, expected {owners + 1} (one more than {owner}s)"
        return
    if offsets[0] != 0:
        yield f"{file}: {owner} 0: begins at {offsets[0]}, expected 0"
    if offsets[-1] != total:
        yield (
            f"{file}: {owner} {owners - 1}: ends at {offsets[-1]}, "
            f"expected {total}, the length of {arrays.file(into).name}"
        )
    yield from _each(
        file,
        offsets[1:] < offsets[:-1] if empty else offsets[1:] <= offsets[:-1],
        lambda i: (
            f"{owner} {i}: goes from {offsets[i]} to {offsets[i + 1]}, "
            f"expected {'not backwards' if empty else 'at least one more'}"
        ),
    )


def _trained(arrays: Arrays) -> npt.NDArray[np.int64]:
    """Supervised tokens of each example."""
    return np.diff(running_sum(num_trained(arrays.spans))[arrays.span_offsets])


def _per_pack(arrays: Arrays, of_examples: Array) -> npt.NDArray[np.int64]:
    """Sums over the examples of each pack."""
    return np.diff(running_sum(of_examples[arrays.packs])[arrays.pack_offsets])


def _each(file: Path, wrong: npt.NDArray[np.bool_], say: Callable[[int], str]) -> Iterator[str]:
    """A sentence for each of the first few that are wrong, and how many more there are."""
    indices = np.flatnonzero(wrong)
    yield from (f"{file}: {say(index)}" for index in indices[:LISTED].tolist())
    if len(indices) > LISTED:
        yield f"{file}: ... and {len(indices) - LISTED} more"
