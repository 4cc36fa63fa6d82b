"""Where prepared data lies: written beside its place by one run at a time, and renamed when whole.

What a run leaves behind that was killed is never taken for data, and the next one takes care of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcore_sft.base import files
from mcore_sft.data import manifest as manifests
from mcore_sft.data.errors import DataError


def holds_dataset(folder: Path) -> bool:
    """Whether a packed dataset lies there; a `DataError` if something else does.

    One that a killed run had set aside for its own is taken back first.
    """
    with written(folder):
        files.recover(folder)
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
    folder = files.end_of_links(folder)
    if folder.is_mount():
        raise DataError(
            f"{folder}: a disk is mounted there, which no folder can take the place of; "
            f"give a folder on it, such as data.packed={folder / 'packed'}"
        )
    with written(folder), files.new_folder(folder, holds_dataset if overwrite else _nothing) as new:
        if not overwrite and holds_dataset(folder):
            raise files.Occupied
        yield new


@contextmanager
def workspace(place: Path) -> Iterator[Path]:
    """A folder beside `place` for one run's files, removed in the end; no other run has one."""
    with written(place), files.workspace(place) as partial:
        yield partial


@contextmanager
def written(place: Path) -> Iterator[None]:
    """A place that cannot be written, or that another run writes, is a `DataError`."""
    try:
        yield
    except files.Locked as held:
        raise DataError(
            f"{place}: another run is writing it{held.by}; wait until that has ended, or give "
            "another place (data.packed=DIR)"
        ) from None
    except files.Occupied:
        raise DataError(
            f"{place}: another run has put something there since this one began, and it was left "
            "as it is; run again, or give another folder (data.packed=DIR)"
        ) from None
    except OSError as error:
        raise DataError(
            f"{place}: cannot be written ({error.strerror or error}); nothing was left there"
        ) from None


def _nothing(_: Path) -> bool:
    return False
