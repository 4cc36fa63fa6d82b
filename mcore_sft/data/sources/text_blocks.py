"""A file of text in, its blocks out: JSON lines and JSON arrays, plain or compressed.

Of plain lines a block says where its bytes lie; what only one process can read in order, it holds.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import xxhash

from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.blocks import Block, LineBlock, TextBlock, ValueBlock
from mcore_sft.data.sources.columns import texts_in
from mcore_sft.data.sources.json_array import JsonArray
from mcore_sft.data.sources.known_columns import Columns
from mcore_sft.data.sources.single_row import MAX_ROW_BYTES, BadRow, parse_line
from mcore_sft.data.sources.source_file import SourceFile

BLOCK_BYTES = 8 << 20
"""Text of one block; at most MAX_ROW_BYTES, as a line may be longer than a block."""


def survey_lines(
    columns: Columns, file: SourceFile, advance: Callable[[int], None]
) -> tuple[str, list[Block]]:
    """Checksum of a file of lines, and its blocks, which say where they lie."""
    digest = hashlib.sha256()
    blocks: list[Block] = []
    start, line = 0, 1
    with file.path.open("rb") as opened:

        def read(size: int) -> bytes:
            piece = opened.read(size)
            digest.update(piece)
            advance(len(piece))
            return piece

        for size, data in _whole_lines(read):
            block = LineBlock(
                columns=columns,
                name=str(file.path),
                first=line,
                size=size,
                file=file,
                start=start,
                digest=xxhash.xxh3_64_intdigest(data),
            )
            blocks.append(block)
            start += size
            line += _count_lines(data)

    return digest.hexdigest(), blocks


def first_row(file: SourceFile, texts: Iterable[str]) -> Mapping[str, Any] | None:
    """The first row of a file; of one that Arrow alone can read, those of `texts`.

    None if there is no row; `DataError` if none of the first block can be used.
    """
    block = next(text_blocks(Columns(), file, None), None)
    if isinstance(block, ValueBlock):
        return next((value for value in block.values if isinstance(value, dict)), {})
    data = block.data if isinstance(block, TextBlock) else b""
    wrong: list[str] = []
    for number, line in enumerate(io.BytesIO(data.removeprefix(codecs.BOM_UTF8)), start=1):
        try:
            if line.strip():
                return parse_line(line)
        except BadRow as error:
            if row := texts_in(line, texts):
                return row
            wrong.append(f"{file.path}:{number}: {error}")
    if wrong:
        raise DataError(wrong[0])
    return None


def _whole_lines(read: Callable[[int], bytes]) -> Iterator[tuple[int, bytes]]:
    """Bytes of some whole lines, and these; of a line far too long, which is alone, a beginning."""
    size, open_line = 0, b""
    while piece := read(BLOCK_BYTES):
        while end := (piece.rfind if size < BLOCK_BYTES else piece.find)(b"\n") + 1:
            yield size + end, open_line + memoryview(piece)[:end]
            size, open_line, piece = 0, b"", piece[end:]
        size += len(piece)
        open_line = (open_line + piece)[: 2 * MAX_ROW_BYTES]
    if size:
        yield size, open_line


def _count_lines(data: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n")))


def text_blocks(columns: Columns, file: SourceFile, most: int | None) -> Iterator[Block]:
    """Blocks of lines, or of a JSON array, that are read from the beginning on."""
    file.require_unchanged()
    with _opened(file) as (stream, position):
        inner = Path(file.path.stem).suffix.lower() if file.kind in COMPRESSED else file.kind
        begin = stream.read(BLOCK_BYTES) if inner == ".json" else b""
        if begin.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            blocks = _value_blocks(columns, file, _after(begin, stream))
        else:
            blocks = _line_blocks(columns, file, _after(begin, stream), most)
        done = 0
        for block in blocks:
            file.require_unchanged()
            at = position()
            yield replace(block, size=at - done)
            done = at
    file.require_unchanged()


def _after(begin: bytes, stream: IO[bytes]) -> Callable[[int], bytes]:
    """What reads `begin` first, and then the stream."""
    waiting = [begin] if begin else []
    return lambda size: waiting.pop() if waiting else stream.read(size)


def _line_blocks(
    columns: Columns, file: SourceFile, read: Callable[[int], bytes], most: int | None
) -> Iterator[Block]:
    line, left = 1, most
    for _, data in _whole_lines(read):
        rows = None
        lines = _count_lines(data)
        if left is not None:
            data, rows = _first_rows(data, left)
            left -= rows
        yield TextBlock(
            columns=columns, name=str(file.path), first=line, size=0, rows=rows, data=data
        )
        line += lines


def _first_rows(data: bytes, most: int) -> tuple[bytes, int]:
    """The lines up to the row that is number `most`, and how many rows they are."""
    rows, end = 0, 0
    for line in data.split(b"\n"):
        if rows == most:
            break
        end += len(line) + 1
        rows += bool(line.strip())
    return data[:end], rows


def _value_blocks(
    columns: Columns, file: SourceFile, read: Callable[[int], bytes]
) -> Iterator[Block]:
    first, values, characters = 1, [], 0
    for value, length in JsonArray(lambda: read(BLOCK_BYTES), str(file.path)):
        values.append(value)
        characters += length
        if characters >= BLOCK_BYTES:
            yield _value_block(columns, file, first, values)
            first, values, characters = first + len(values), [], 0
    if values:
        yield _value_block(columns, file, first, values)


def _value_block(
    columns: Columns, file: SourceFile, first: int, values: Sequence[Any]
) -> ValueBlock:
    return ValueBlock(
        columns=columns,
        name=str(file.path),
        first=first,
        size=0,
        rows=len(values),
        values=tuple(values),
    )


@contextmanager
def _opened(file: SourceFile) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The decompressed bytes of a file, and how many of its own have been read."""
    open_stream = COMPRESSED.get(file.kind, nullcontext)
    try:
        if file.kind in COMPRESSED and not file.size:
            raise EOFError("it is empty")  # gzip and zstd would take nothing for no rows
        with file.path.open("rb") as raw, open_stream(raw) as stream:
            yield stream, lambda: file.size if raw.closed else raw.tell()
    except DataError:
        file.require_unchanged()
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        file.require_unchanged()
        raise DataError(f"{file.path}: {_what_is_wrong(file, error)}") from None


def _what_is_wrong(file: SourceFile, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    if "too much memory" in str(error):
        return (
            "compressed with a longer window than is read (`zstd --long`). Fix: unpack it, as with "
            f"`zstd -d --long=31 {shlex.quote(file.path.name)}`, and give the unpacked file"
        )
    return (
        f"cannot be read ({str(error) or type(error).__name__}); it is damaged or cut short: "
        "write it again"
    )


class _Streams(io.RawIOBase):
    """What the compressed streams hold that lie end to end in a file.

    bz2.open and lzma.open take whatever begins no stream for the end of the file, so that all that
    follows some damage is lost. Here it is an error of the decompressor; only `padding`, the bytes
    that the format allows between streams and after them, is passed over.
    """

    def __init__(self, raw: IO[bytes], begin: Callable[[], Any], padding: bytes) -> None:
        self._raw, self._begin, self._padding = raw, begin, padding
        self._stream = begin()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data and (rest := self._rest()) is not None:
            data = self._stream.decompress(rest, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _rest(self) -> bytes | None:
        """What the stream, or a new one, is to be given next; None at the end of the file."""
        if not self._stream.eof:
            rest = self._raw.read(io.DEFAULT_BUFFER_SIZE) if self._stream.needs_input else b""
            if not rest and self._stream.needs_input:
                raise EOFError("it ends within a compressed stream")
            return rest
        rest = self._stream.unused_data or self._raw.read(io.DEFAULT_BUFFER_SIZE)
        while rest and not (rest := rest.lstrip(self._padding)):
            rest = self._raw.read(io.DEFAULT_BUFFER_SIZE)
        if not rest:
            return None
        self._stream = self._begin()
        return rest


def _open_streams(raw: IO[bytes], *, begin: Callable[[], Any], padding: bytes = b"") -> IO[bytes]:
    return io.BufferedReader(_Streams(raw, begin, padding))


COMPRESSED: Mapping[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": partial(_open_streams, begin=bz2.BZ2Decompressor),
    ".xz": partial(
        _open_streams, begin=partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), padding=b"\0"
    ),
    ".zst": lambda raw: pa.input_stream(raw, compression="zstd"),
}
"""What opens the decompressed bytes of a file, by the ending of its name."""
