import errno
import fcntl
import multiprocessing
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_sft.base.errors import UserError
from mcore_sft.data.errors import DataError
from mcore_sft.data.staging import workroom, workspace


def make(
    folder: Path,
    content: str,
    *,
    overwrite: bool = False,
    meanwhile: Callable[[Path], object] = lambda partial: None,
) -> None:
    with workroom(folder, overwrite=overwrite) as room:
        (room.result / "manifest.json").write_text(content, encoding="utf-8")
        meanwhile(room.result)


def found(folder: Path) -> str:
    return (folder / "manifest.json").read_text(encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_when_it_is_whole_or_not_at_all(tmp_path):
    make(tmp_path / "deep" / "packed", "one")
    assert found(tmp_path / "deep" / "packed") == "one"
    with pytest.raises(DataError, match=r"broken: cannot be written \(No such file"):
        make(tmp_path / "broken", "two", meanwhile=lambda partial: (partial / "no").rmdir())
    assert names(tmp_path) == ["deep"]
    assert names(tmp_path / "deep") == ["packed"]


def test_second_run_is_told_of_the_first(tmp_path):
    holder = f"process {os.getpid()} on {re.escape(socket.gethostname())}"
    with workspace(tmp_path / "packed"):
        for overwrite in (False, True):
            with pytest.raises(DataError, match=rf"another run is writing it \({holder}\); wait"):
                make(tmp_path / "packed", "two", overwrite=overwrite)
        make(tmp_path / "other", "of another name")
    assert names(tmp_path) == ["other"]
    make(tmp_path / "packed", "two")


def test_lock_of_a_run_that_ends_just_then_is_no_lock(tmp_path, monkeypatch):
    lock = fcntl.flock
    ended = iter([tmp_path / ".packed.lock"])

    def lock_late(*arguments):
        for file in ended:
            file.unlink()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    refused = pytest.raises(DataError, match=r"packed: another run is writing it")
    with workspace(tmp_path / "packed"), refused:
        make(tmp_path / "packed", "two")
    assert names(tmp_path) == []


def test_what_appeared_meanwhile_is_left_as_it_is(tmp_path):
    folder, theirs = tmp_path / "packed", tmp_path / "theirs"
    make(theirs, "theirs")
    with pytest.raises(DataError, match=r"another run has put something there"):
        make(folder, "mine", meanwhile=lambda _: theirs.rename(folder))
    assert found(folder) == "theirs"
    assert names(tmp_path) == ["packed"]
    with pytest.raises(DataError, match=r"another run has put something there"):
        make(folder, "mine", meanwhile=lambda _: pytest.fail("it was begun"))
    make(folder, "mine", overwrite=True)
    assert found(folder) == "mine"


def test_overwrite_replaces_no_more_than_a_dataset(tmp_path):
    folder = tmp_path / "packed"
    with pytest.raises(DataError, match=r"not empty and holds no packed dataset"):
        make(
            folder,
            "mine",
            overwrite=True,
            meanwhile=lambda _: (folder / "thesis").mkdir(parents=True),
        )
    assert names(folder) == ["thesis"]
    assert names(tmp_path) == ["packed"]


def test_what_killed_runs_left_is_swept(tmp_path):
    for left in (".packed.partial-dead", ".other.partial-dead"):
        (tmp_path / left).mkdir()
    (tmp_path / ".packed.lock").touch()
    make(tmp_path / "packed", "one")
    assert names(tmp_path) == [".other.partial-dead", "packed"]


def test_without_locks_the_first_to_be_whole_stays(tmp_path, monkeypatch):
    def unlocked(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unlocked)
    (tmp_path / ".packed.partial-alive").mkdir()
    folder = tmp_path / "packed"
    with pytest.raises(DataError, match=r"another run has put something there"):
        make(folder, "second", meanwhile=lambda _: make(folder, "first"))
    assert found(folder) == "first"
    assert names(tmp_path) == [".packed.partial-alive", "packed"]


def _take_turns(place: Path, told) -> None:
    """Tell how often this process was alone in its workspace, or refused; nothing else may be."""
    alone = refused = 0
    for _ in range(300):
        try:
            with workspace(place):
                alone += len(list(place.parent.glob(".packed.partial-*"))) == 1
        except DataError as error:
            refused += "another run is writing it" in str(error)
    told.put(alone + refused)


def test_runs_at_the_same_moment_never_share_nor_sweep_a_folder(tmp_path):
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    runs = [fork.Process(target=_take_turns, args=(tmp_path / "packed", told)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [told.get() for _ in runs] == [300] * 4
    assert names(tmp_path) == []


@pytest.mark.parametrize("exists", [True, False])
def test_link_stays_and_what_it_points_at_is_written(exists, tmp_path):
    target, link = tmp_path / "disk" / "target", tmp_path / "packed"
    if exists:
        target.mkdir(parents=True)
    link.symlink_to(target)
    make(link, "one")
    make(link, "two", overwrite=True)
    assert link.is_symlink()
    assert found(target) == "two"
    assert names(tmp_path) == ["disk", "packed"]
    assert names(tmp_path / "disk") == ["target"]


def test_link_to_itself_is_refused_at_once(tmp_path):
    link = tmp_path / "packed"
    link.symlink_to(link)
    with pytest.raises(UserError, match=r"packed: a symbolic link that leads back to itself"):
        make(link, "one", meanwhile=lambda _: pytest.fail("it was begun"))
    assert names(tmp_path) == ["packed"]


def test_disk_that_is_mounted_there_is_refused_at_once():
    with pytest.raises(DataError, match=r"/proc: a disk is mounted there.*data\.packed=/proc/"):
        make(Path("/proc"), "one", meanwhile=lambda _: pytest.fail("it was begun"))
