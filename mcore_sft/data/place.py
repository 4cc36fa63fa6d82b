"""Where prepared data lies: written beside its place by one run at a time, and renamed when whole.

What a run leaves behind that was killed is never taken for data, and swept by the next one.
"""

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mcore_sft.data import manifest as manifests
from mcore_sft.data.errors import DataError

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


def holds_dataset(folder: Path) -> bool:
    """Whether a packed dataset lies there; a `DataError` if something else does."""
    with written(folder):
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        if not (folder / manifests.NAME).is_file():
            raise DataError(
                f"{folder}: it is not empty and holds no packed dataset; "
                "give another folder (data.packed=DIR)"
            )
        return True


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` once it is whole, or is removed.

    What lies there by then is replaced if `overwrite`, and it is a dataset; else a `DataError`.
    """
    folder = end_of_links(folder)
    if folder.is_mount():
        raise DataError(
            f"{folder}: a disk is mounted there, which no folder can take the place of; "
            f"give a folder on it, such as data.packed={folder / 'packed'}"
        )
    with workspace(folder) as partial:
        if not overwrite and holds_dataset(folder):
            raise _taken(folder)
        yield partial
        _put_in_place(partial, folder, overwrite=overwrite)


@contextmanager
def workspace(place: Path) -> Iterator[Path]:
    """A folder beside `place` for one run's files, removed in the end; no other run has one."""
    with written(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place) as alone:
        if alone:
            for left in place.parent.glob(f"{glob.escape(_partial(place))}*"):
                shutil.rmtree(left, ignore_errors=True)
        with written(place):
            partial = Path(tempfile.mkdtemp(prefix=_partial(place), dir=place.parent))
        try:
            with written(place):
                partial.chmod(0o755)
                yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def written(place: Path) -> Iterator[None]:
    """A place that cannot be written is a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{place}: cannot be written ({error.strerror or error}); nothing was left there"
        ) from None


def end_of_links(place: Path) -> Path:
    """Where `place` leads to, if it is a symbolic link: what is renamed must lie beside that."""
    end = Path(os.path.realpath(place))
    if end.is_symlink():
        raise DataError(f"{place}: a symbolic link that leads back to itself; mend or remove it")
    return end


def _partial(place: Path) -> str:
    return f".{place.name}.partial-"


@contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """Keep other runs from `place`, or a `DataError`; yields False where there are no locks.

    Without them nothing can be swept, and two runs meet when the second is put in its place. The
    lock is on a file that is open for writing, the only kind that holds across a network.
    """
    file = place.with_name(f".{place.name}.lock")
    with written(place):
        handle = _open_lock(file, place)
    try:
        yield handle is not None
    finally:
        with suppress(OSError):
            file.unlink()
        if handle is not None:
            os.close(handle)


def _open_lock(file: Path, place: Path) -> int | None:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        except FileNotFoundError:
            pass  # whoever had the lock has removed its file meanwhile: once more
        except BlockingIOError:
            os.close(handle)
            raise DataError(
                f"{place}: another run is writing it; wait until that has ended, or give another "
                "place (data.packed=DIR)"
            ) from None
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                return None
            raise
        os.close(handle)


def _put_in_place(partial: Path, folder: Path, *, overwrite: bool) -> None:
    """Make the files durable, then give the folder its name; what it replaces goes last."""
    for file in [*partial.iterdir(), partial]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    old = None
    if overwrite and holds_dataset(folder):
        old = Path(tempfile.mkdtemp(prefix=_partial(folder), dir=folder.parent))
        folder.rename(old)
    try:
        partial.rename(folder)  # which replaces an empty folder and nothing else
    except OSError as error:
        if error.errno in _TAKEN:
            raise _taken(folder) from None
        raise
    if old is not None:
        shutil.rmtree(old)


def _taken(folder: Path) -> DataError:
    return DataError(
        f"{folder}: another run has put something there since this one began, and it was left as "
        "it is; run again, or give another folder (data.packed=DIR)"
    )
