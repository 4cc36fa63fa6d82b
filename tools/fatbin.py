"""A shared library with code for many GPUs in, the same one with code for some of them out.

Of each fat binary in the library only the machine code of the architectures that are named stays,
moved to its front; what is left over is zero. The file keeps its size and all its addresses, and
compresses to a fraction. What the driver is given is a shorter fat binary, as nvcc would write it.

NVIDIA does not document the form. A header (magic, version, own size, size of what follows) is
followed by elements: kind (1 PTX, 2 machine code), size of the element's header and of its content,
and at byte 28 the architecture, 90 for sm_90 and sm_90a alike.
"""

import struct
from collections import Counter
from collections.abc import Collection, Iterator

MAGIC, MACHINE_CODE = 0xBA55ED50, 2


class FatbinError(Exception):
    """The library is not of the form that is known."""


def keep(library: bytearray, architectures: Collection[int]) -> Counter[str]:
    """Cut `library` in place; bytes that were kept and dropped, and the number of fat binaries."""
    counted: Counter[str] = Counter()
    for start, size in _sections(library, b".nv_fatbin"):
        at, end = start, start + size
        while at < end - 16:
            magic, _, header, length = struct.unpack_from("<IHHQ", library, at)
            if magic != MAGIC:
                at += 8  # they are aligned, with zeros between
                continue
            begin, stop = at + header, at + header + length
            if stop > end:
                raise FatbinError(f"a fat binary at {at:#x} ends beyond its section")
            wanted = bytearray()
            for kind, architecture, place, following in _elements(library, begin, stop):
                of_wanted = kind == MACHINE_CODE and architecture in architectures
                counted["kept" if of_wanted else "dropped"] += following - place
                if of_wanted:
                    wanted += library[place:following]
            if not wanted:
                raise FatbinError(f"a fat binary at {at:#x} has nothing for {architectures}")
            struct.pack_into("<Q", library, at + 8, len(wanted))
            library[begin:stop] = wanted.ljust(length, b"\0")
            counted["fat binaries"] += 1
            at = stop
    if not counted:
        raise FatbinError("there is no section .nv_fatbin with a fat binary")
    return counted


def _sections(library: bytearray, name: bytes) -> Iterator[tuple[int, int]]:
    """Offset and size of the sections of this name, of a 64-bit little-endian ELF file."""
    if library[:6] != b"\x7fELF\x02\x01":
        raise FatbinError("it is no 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, count, names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", library, table + number * size) for number in range(count)
    ]
    if not headers:
        return
    strings = headers[names][4]
    for of_name, _, _, _, offset, length in headers:
        if library.startswith(name + b"\0", strings + of_name):
            yield offset, length


def _elements(library: bytearray, place: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Kind, architecture, begin and end of each element."""
    while place < stop:
        kind, _, header, length = struct.unpack_from("<HHIQ", library, place)
        (architecture,) = struct.unpack_from("<I", library, place + 28)
        following = place + header + length
        if header < 32 or following > stop:
            raise FatbinError(f"an element at {place:#x} ends beyond its fat binary")
        yield kind, architecture, place, following
        place = following
