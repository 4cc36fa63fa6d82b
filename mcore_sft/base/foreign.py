"""What stands in place of a file that was not really fetched: a pointer to it, or a web page."""

from pathlib import Path

_HEAD = 512
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body")


def what_instead(file: Path) -> str | None:
    """What `file` is instead of its content, with its fix; None if it may be what it should be.

    Raises OSError if it cannot be read.
    """
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    if head.startswith(_POINTER):
        return "a Git LFS pointer (fetch the file: git lfs pull)"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        return "an HTML page (download the file itself)"
    return None
