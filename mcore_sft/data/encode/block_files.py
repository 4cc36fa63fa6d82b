"""An encoded block in, one file out, and its columns back: what a run keeps until it is packed.

    Encoded -> write -> FILE.block -> BlockFile -> column by column

columns end to end | header: JSON, place and checksum of each, and what is no column | trailer

A file has its name once it is whole; what damages it later is found where it is read.
"""

import dataclasses
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from mcore_sft.data.encode.block import Drops, Encoded, Sample
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.rows import text_offsets

_MAGIC = b"mcsft-b1"
_TRAILER = struct.Struct("<8sQQ")  # magic, length and checksum of the header
_OF_EXAMPLES = ("lengths", "spans", "span_counts", "rows")
_OF_ENCODED = ("numbers", "hashes", "read_hashes", "problems", "systems")
_OF_ASKED = ("counts", "hashes", "text_hashes", "text_numbers")
_TOLD = ("source", "name", "rows", "size", "gigatoken", "kind", "system_texts")
_IN_PAIRS = ("spans", "hashes", "read_hashes", "asked_text_hashes")


def write(file: Path, encoded: Encoded, tokens: np.dtype[Any], *, of: str) -> None:
    """Write `encoded`, its tokens as `tokens`; `of` tells what it was made of. Raises OSError."""
    told = {name: getattr(encoded, name) for name in _TOLD}
    header = {"of": of, "told": told, "drops": dataclasses.asdict(encoded.drops)}
    beside = file.with_suffix(".partial")
    try:
        with beside.open("wb") as out:
            lies = {}
            for name, array in _columns(encoded, tokens).items():
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                checksum = xxhash.xxh3_64_intdigest(data)
                lies[name] = [array.dtype.str, out.tell(), len(data), checksum]
                out.write(data)
            text = json.dumps({**header, "columns": lies}).encode()
            out.write(text)
            out.write(_TRAILER.pack(_MAGIC, len(text), xxhash.xxh3_64_intdigest(text)))
        beside.rename(file)
    finally:
        beside.unlink(missing_ok=True)


def size_of(encoded: Encoded, tokens: np.dtype[Any]) -> int:
    """Bytes that `write` writes, but for the header."""
    return sum(int(column.nbytes) for column in _columns(encoded, tokens).values())


def _columns(encoded: Encoded, tokens: np.dtype[Any]) -> dict[str, npt.NDArray[Any]]:
    examples, asked = encoded.examples, encoded.asked
    offsets = text_offsets(asked.texts)
    texts = np.frombuffer(asked.texts.buffers()[2] or b"", np.uint8)
    return {
        "tokens": examples.tokens.astype(tokens, copy=False),
        **{name: getattr(examples, name) for name in _OF_EXAMPLES},
        **{name: getattr(encoded, name) for name in _OF_ENCODED},
        **{f"asked_{name}": getattr(asked, name) for name in _OF_ASKED},
        "asked_texts": texts[offsets[0] : offsets[-1]],
        "asked_text_lengths": np.diff(offsets),
    }


class BlockFile:
    """A block that was encoded, as it lies on the disk. M = its examples.

    source, name, rows, size, gigatoken, kind, system_texts, drops: as `Encoded`, which see.
    """

    def __init__(self, file: Path, *, mend: str = "run preprocess again") -> None:
        """Read what is no column; `DataError`, ending with `mend`, if the file is damaged."""
        self.file = file
        self.mend = mend
        try:
            with file.open("rb") as opened:
                end = opened.seek(0, 2)
                opened.seek(max(0, end - _TRAILER.size))
                raw = opened.read()
                magic, length, checksum = (
                    _TRAILER.unpack(raw) if len(raw) == _TRAILER.size else (b"", 0, 0)
                )
                begin = end - _TRAILER.size - length
                if magic != _MAGIC or begin < 0:
                    raise self._damaged("it does not end as a block does")
                opened.seek(begin)
                text = opened.read(length)
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from None
        if xxhash.xxh3_64_intdigest(text) != checksum:
            raise self._damaged("its header is not as it was written")
        header = json.loads(text)
        self.of: str = header["of"]
        told = header["told"]
        self.source: int = told["source"]
        self.name: str = told["name"]
        self.rows: int = told["rows"]
        self.size: int = told["size"]
        self.gigatoken: bool = told["gigatoken"]
        self.kind: str = told["kind"]
        self.system_texts: dict[str, int] = told["system_texts"]
        self.drops = _drops(header["drops"])
        self._lies: dict[str, Any] = header["columns"]

    def __len__(self) -> int:
        dtype, _, size, _ = self._lies["lengths"]
        return int(size) // int(np.dtype(dtype).itemsize)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column; `DataError` if it is damaged."""
        dtype, begin, size, checksum = self._lies[name]
        array = np.fromfile(self.file, np.uint8, size, offset=begin)
        if xxhash.xxh3_64_intdigest(array.data) != checksum:
            raise self._damaged(f"its {name} are not as they were written")
        values: npt.NDArray[Any] = array.view(dtype)
        return values.reshape(-1, 2) if name in _IN_PAIRS else values

    def check(self) -> None:
        """Read all of it; `DataError` if anything is damaged."""
        for name in self._lies:
            self.column(name)

    def example(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Tokens and spans of one example."""
        return self._stretch("tokens", "lengths", index), self._stretch(
            "spans", "span_counts", index
        )

    def asked_texts(self) -> list[str]:
        """The texts that are compared with benchmarks."""
        data = self.column("asked_texts").tobytes()
        ends = running_sum(self.column("asked_text_lengths")).tolist()
        return [data[start:end].decode() for start, end in pairwise(ends)]

    def _stretch(self, name: str, counts: str, index: int) -> npt.NDArray[Any]:
        start, end = running_sum(self.column(counts))[index : index + 2].tolist()
        return self.column(name)[start:end]

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.file}: damaged ({what}). Fix: {self.mend}")


def _drops(told: dict[str, Any]) -> Drops:
    samples = {
        reason: [Sample(**sample) for sample in some] for reason, some in told["samples"].items()
    }
    return Drops(counts=told["counts"], samples=samples)
