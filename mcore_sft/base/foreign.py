"""What a download left in place of a file: everything that was fetched may be something else."""

from pathlib import Path

_LOOKED_AT = 512
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body")


def what_instead(file: Path) -> str | None:
    """What lies in place of the file that was meant; None where it is nothing of these.

    At most the first 512 bytes are read. A file that cannot be read is None: whoever reads the
    rest of it says why.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(_LOOKED_AT)
    except OSError:
        return None
    if head.startswith(_POINTER):
        return "a Git LFS pointer (fetch the file: git lfs pull)"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        return "an HTML page (download the file itself)"
    return None
