"""Files and folders that are there whole or not at all, and stay there after a power loss.

    written beside -> fsync -> rename -> fsync of the folder

A rename alone is not enough: a file system may keep the new name and lose the content.
"""

import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mcore_sft.base.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_HELD = (errno.EACCES, errno.EAGAIN)
_HOLDER = re.compile(r"process \d+ on [\w.-]+\n")
_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY)


class Locked(Exception):
    """Another process holds the lock."""

    def __init__(self, file: str, holder: str) -> None:
        super().__init__(file)
        self.by = f" ({holder})" if holder else ""
        """Who holds it, for the end of a clause: ` (process 12 on node1)`, or nothing."""


class Occupied(Exception):
    """Something else has taken the place meanwhile, and was left as it is."""


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and all that lies in it are on the disk; raises OSError."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def write(path: Path, content: str | bytes) -> None:
    """Write a new file, which is on the disk when this returns; raises OSError."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def replace(path: Path, content: str | bytes) -> None:
    """Write a file that holds all of `content`, or what it held before; raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside, content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it lies in, which are still there after a power loss.

    Raises OSError.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)


def write_named(path: Path, content: str) -> None:
    """Write the file that a command line names, whole or not at all; raises `UserError`.

    A link is followed to its target. What is no regular file (a device, a pipe), or is this
    process's own output, is written straight into. Half a surrogate pair becomes a question mark.
    """
    encoded = content.encode("utf-8", "replace")
    try:
        if _is_standard_output(path):
            sys.stdout.flush()
            with open(sys.stdout.fileno(), "wb", closefd=False) as output:
                output.write(encoded)
        elif path.exists() and not path.is_file():
            path.write_bytes(encoded)
        else:
            replace(Path(os.path.realpath(path)), encoded)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); give another file, or make room there"
        ) from None


def _is_standard_output(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        return False


def check_writable(path: Path) -> None:
    """Raise `UserError`, before any work is done, where `path` could not be written."""
    folder = Path(os.path.realpath(path)).parent
    if path.is_dir():
        raise UserError(f"{path}: it is a folder; name a file in it")
    if not folder.is_dir():
        raise UserError(
            f"{path}: there is no folder {folder}; make it (mkdir -p), or name another file"
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{path}: writing is not permitted there; name another file")


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name, which it keeps after a power loss; raises OSError."""
    path.rename(target)
    for folder in {path.parent, target.parent}:
        sync(folder)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes; raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def lock(file: Path, by: Literal["flock", "lockf"] = "flock") -> Iterator[bool]:
    """Hold the lock `file`, which is made and removed; False where the file system has no locks.

    The file says which process of which host holds it. Raises `Locked` if another does, and OSError
    if it cannot be made. Processes that are forked meanwhile hold an `flock` too; a `lockf` is held
    by this process alone, and by all of its threads at once.
    """
    handle = _open_lock(file, getattr(fcntl, by))
    try:
        yield handle is not None
    finally:
        with suppress(OSError):
            file.unlink()
        if handle is not None:
            os.close(handle)


def _open_lock(file: Path, take: Callable[[int, int], None]) -> int | None:
    while True:
        # Open for writing: no other lock holds across a network.
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            take(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), file.stat()):
                _sign(handle)
                return handle
        except FileNotFoundError:
            pass  # whoever held it has removed the file meanwhile: once more
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno in _HELD:
                raise Locked(str(file), holder) from None
            if error.errno in _NO_LOCKS:
                return None
            raise
        os.close(handle)


def _sign(handle: int) -> None:
    """Write who holds a lock into its file; a full disk makes the lock no less held."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        os.fsync(handle)  # a network file system shows it to other hosts


def _holder(handle: int) -> str:
    """Who holds the lock in this file; empty where it does not say, as older versions did not."""
    try:
        said = os.pread(handle, 512, 0).decode("utf-8", "replace")
    except OSError:
        return ""
    return said.strip() if _HOLDER.fullmatch(said) else ""


@dataclass(frozen=True)
class Workspace:
    """A folder for one process's files. alone: no other process can have one for the same place.

    Where the file system has no locks, nobody knows.
    """

    folder: Path
    alone: bool


@contextmanager
def workspace(place: Path) -> Iterator[Workspace]:
    """A folder beside `place`, removed in the end.

    Raises `Locked` if another process has one, and OSError. What killed processes left is removed,
    or taken back: see `put`.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with lock(_lock_of(place)) as alone:
        if alone:
            _recover(place)
        partial = Path(tempfile.mkdtemp(prefix=_partial(place), dir=place.parent))
        try:
            partial.chmod(0o755)
            yield Workspace(partial, alone)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_folder(
    place: Path, may_replace: Callable[[Path], bool] = lambda place: False
) -> Iterator[Path]:
    """A folder to write to, which takes the name `place` once it is whole, or is removed.

    Raises as `put` and `workspace` do.
    """
    with workspace(place) as work:
        yield work.folder
        put(work.folder, place, may_replace)


def put(folder: Path, place: Path, may_replace: Callable[[Path], bool]) -> None:
    """Make a folder durable, and give it the name `place`; whoever calls has its workspace.

    What lies there by then is replaced if `may_replace(place)`, and is set aside until the new
    folder bears its name: a process that is killed between the two leaves the old folder to be
    taken back by the next one. Raises `Occupied` and OSError.
    """
    sync_tree(folder)
    old = _replaced(place)
    if place.exists() and may_replace(place):
        shutil.rmtree(old, ignore_errors=True)
        rename(place, old)
    try:
        rename(folder, place)  # which replaces an empty folder and nothing else
    except OSError as error:
        if error.errno in _OCCUPIED:
            raise Occupied(str(place)) from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(place: Path) -> None:
    """Take back what a killed process set aside for a new folder that never came; raises OSError.

    Nothing is done while another process writes there, or where the file system has no locks.
    """
    if _replaced(place).exists():
        with suppress(Locked), lock(_lock_of(place)) as alone:
            if alone:
                _recover(place)


def _recover(place: Path) -> None:
    """The holder of the lock alone may: remove what killed processes left, or take it back."""
    old = _replaced(place)
    is_free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
    if old.exists() and is_free:
        rename(old, place)  # which replaces an empty folder
    for left in [old, *place.parent.glob(f"{glob.escape(_partial(place))}*")]:
        shutil.rmtree(left, ignore_errors=True)


def end_of_links(place: Path) -> Path:
    """Where `place` leads to, if it is a symbolic link: what is renamed must lie beside that."""
    end = Path(os.path.realpath(place))
    if end.is_symlink():
        raise UserError(f"{place}: a symbolic link that leads back to itself; remove it")
    return end


def _lock_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _partial(place: Path) -> str:
    return f".{place.name}.partial-"


def _replaced(place: Path) -> Path:
    return place.with_name(f".{place.name}.replaced")
