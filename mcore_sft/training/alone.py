"""One run at a time in a folder, which can be written: known before anything else is.

    output --made, locked, written to--> this run alone, until it has ended

Two runs in one folder would sweep away what the other writes.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mcore_sft.base import files
from mcore_sft.base.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make `folder` and keep other runs from it, where its file system has locks.

    `UserError` if another run is there or the folder cannot be written. This process alone holds
    the lock: processes that it forks do not, and may outlive it. Folders that stay empty are
    removed.
    """
    with contextlib.ExitStack() as held:
        _take(folder, held)
        yield


def _take(folder: Path, held: contextlib.ExitStack) -> None:
    try:
        _make(folder, held)
        held.enter_context(files.lock(folder / LOCK, by="lockf"))
        tempfile.TemporaryFile(dir=folder).close()  # the lock may be an old one
    except files.Locked as other:
        raise UserError(
            f"{folder}: another run is training there{other.by}. Fix: wait until it has ended, or "
            "name another folder with output=DIR"
        ) from None
    except OSError as error:
        raise unwritable(folder, _reason(folder, error)) from None


def unwritable(folder: Path, reason: str) -> UserError:
    """The error of a run's folder that cannot be written."""
    return UserError(
        f"output {folder}: cannot be written ({reason}). Fix: name another folder with output=DIR, "
        "or make this one writable"
    )


def _make(folder: Path, held: contextlib.ExitStack) -> None:
    """Make what is missing of `folder`, so that it is still there after a power loss."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():  # another run may have made it meanwhile
                raise
            continue
        held.callback(_remove_if_empty, path)
        with contextlib.suppress(PermissionError):  # a folder that may be written and not read
            files.sync(path.parent)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _reason(folder: Path, error: OSError) -> str:
    place, lock = Path(error.filename or folder), folder / LOCK
    if place.is_symlink() and not place.exists():
        return f"{place} is a symbolic link to {place.readlink()}, where nothing is"
    if isinstance(error, PermissionError) and lock.exists():
        return f"{lock} belongs to another user"
    return f"{error.strerror}: {place}"
