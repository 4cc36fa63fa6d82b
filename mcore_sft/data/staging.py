"""Where prepared data lies: written beside its place by one run at a time, and renamed when whole.

What a run leaves behind that was killed is never taken for data, and the next one takes care of it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mcore_sft.base import files
from mcore_sft.data import manifest as manifests
from mcore_sft.data.errors import DataError, WorkerEnded


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


@dataclass(frozen=True)
class Room:
    """Where a run works.

    result: a folder that is to take the dataset's name; scratch: one that is removed in any case;
    blocks: a folder for what is encoded, which outlives a run that is killed, if that was `alone`.
    """

    result: Path
    blocks: Path
    scratch: Path
    alone: bool

    @property
    def is_kept(self) -> bool:
        """Whether there is something that outlives this run."""
        return self.alone and any(self.blocks.glob("*.block"))


@contextmanager
def workroom(folder: Path, *, overwrite: bool = False) -> Iterator[Room]:
    """A room for the run that makes `folder`: its result takes that place once it is whole.

    What lies there by then is replaced if `overwrite`, and it is a dataset; else a `DataError`. The
    blocks are removed then, and where anything fails but that somebody ended the run.
    """
    folder = files.end_of_links(folder)
    if folder.is_mount():
        raise DataError(
            f"{folder}: a disk is mounted there, which no folder can take the place of; "
            f"give a folder on it, such as data.packed={folder / 'packed'}"
        )
    with written(folder), files.workspace(folder) as work:
        if not overwrite and holds_dataset(folder):
            raise files.Occupied
        room = Room(
            result=work.folder / "result",
            blocks=unfinished(folder) if work.alone else work.folder / "blocks",
            scratch=work.folder / "scratch",
            alone=work.alone,
        )
        room.result.mkdir()
        room.scratch.mkdir()
        try:
            yield room
            shutil.rmtree(room.scratch)
            files.put(room.result, folder, holds_dataset if overwrite else _nothing)
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt | WorkerEnded) or not room.is_kept:
                shutil.rmtree(room.blocks, ignore_errors=True)
            raise
        shutil.rmtree(room.blocks, ignore_errors=True)


def unfinished(folder: Path) -> Path:
    """Where the blocks lie of a run that was ended before `folder` was whole."""
    return folder.with_name(f"{folder.name}.unfinished")


def clear(folder: Path) -> None:
    """Remove what a run left that was killed when `folder` was whole, unless another one works."""
    left = unfinished(files.end_of_links(folder))
    if left.exists():
        with suppress(files.Locked, OSError), files.workspace(folder):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def workspace(place: Path) -> Iterator[Path]:
    """A folder beside `place` for one run's files, removed in the end; no other run has one."""
    with written(place), files.workspace(place) as work:
        yield work.folder


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
