"""Where a folder of prepared data lies: written beside its place, and renamed when it is whole.

What a run leaves behind that was killed is never taken for data, and swept by the next one.
"""

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


def holds_dataset(folder: Path) -> bool:
    """Whether a packed dataset lies there; a `DataError` if something else does."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / manifests.NAME).is_file():
        raise DataError(
            f"{folder}: it is not empty and holds no packed dataset; "
            "give another folder (data.packed=DIR)"
        )
    return True


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` once it is whole, or is removed."""
    with written(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        lock = _lock(partial)
    try:
        with written(folder):
            partial.chmod(0o755)
            yield partial
            _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


@contextmanager
def written(place: Path) -> Iterator[None]:
    """A place that cannot be written is a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{place}: cannot be written ({error.strerror or error}); nothing was left there"
        ) from None


def _sweep(folder: Path) -> None:
    """Remove what runs have left that were killed: folders that no process holds a lock on."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        with suppress(OSError):
            lock = _lock(left)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int:
    """A lock on `folder`, held until it is closed; `OSError` if another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _put_in_place(partial: Path, folder: Path) -> None:
    """Make the files durable, then give the folder its name; what it replaces goes last."""
    for file in [*partial.iterdir(), partial]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if not folder.exists():
        partial.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old)
