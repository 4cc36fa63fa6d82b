"""A made-up library with two fat binaries, each of PTX and code for several architectures."""

import struct

import fatbin
import pytest

PTX, CODE = 1, fatbin.MACHINE_CODE


def element(kind: int, architecture: int, content: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 1, 64, len(content)).ljust(28, b"\7")
    return (header + struct.pack("<I", architecture)).ljust(64, b"\7") + content


def binary(*elements: bytes) -> bytes:
    body = b"".join(elements)
    return struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(body)) + body


def library(section: bytes, name: bytes = b".nv_fatbin") -> bytearray:
    """A header, the section, its name, and the table of both."""
    names = b"\0" + name + b"\0.names\0"
    table = 64 + len(section) + len(names)
    header = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", table)
    header = header.ljust(58, b"\0") + struct.pack("<HHH", 64, 3, 2)
    sections = [
        (0, 0, 0, 0, 0, 0),
        (1, 1, 0, 0, 64, len(section)),
        (2 + len(name), 3, 0, 0, 64 + len(section), len(names)),
    ]
    rows = b"".join(struct.pack("<IIQQQQ", *row).ljust(64, b"\0") for row in sections)
    return bytearray(header.ljust(64, b"\0") + section + names + rows)


OLD, HOPPER, NEW = (element(CODE, n, bytes([n]) * 40) for n in (80, 90, 100))
TEXT = element(PTX, 90, b"p" * 24)


def test_only_the_machine_code_of_one_architecture_stays() -> None:
    section = binary(OLD, TEXT, HOPPER, NEW) + b"\0" * 8 + binary(HOPPER, OLD)
    content = library(section)
    before = len(content)
    counted = fatbin.keep(content, {90})
    assert counted == {"fat binaries": 2, "kept": 2 * len(HOPPER), "dropped": 3 * 104 + 88}
    assert len(content) == before, "addresses stay"
    first = struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(HOPPER)) + HOPPER
    rest = len(binary(OLD, TEXT, HOPPER, NEW)) - len(first)
    assert content[64 : 64 + len(section)].startswith(first + b"\0" * (rest + 8) + first)
    # The second begins where it began, though the first says that it is shorter.
    assert fatbin.keep(library(binary(HOPPER)), {90})["dropped"] == 0


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (library(binary(OLD, NEW)), r"has nothing for \{90\}"),
        (library(b"\0" * 64), "no section .nv_fatbin with a fat binary"),
        (library(binary(HOPPER), name=b".text"), "no section .nv_fatbin"),
        (bytearray(b"\x7fELF\x01\x01" + b"\0" * 58), "no 64-bit ELF file"),
        (library(binary(HOPPER)[:-8]), "ends beyond its section"),
        (
            library(binary(HOPPER[:8] + struct.pack("<Q", 99) + HOPPER[16:])),
            "ends beyond its fat binary",
        ),
    ],
)
def test_what_is_of_another_form_is_refused(content: bytearray, error: str) -> None:
    before = bytes(content)
    with pytest.raises(fatbin.FatbinError, match=error):
        fatbin.keep(content, {90})
    assert content == before
