import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest

from mcore_sft.base import files


def recorded(monkeypatch) -> list[str]:
    """What is made durable and renamed from now on, in order."""
    done: list[str] = []
    sync, replace, rename = files.sync, Path.replace, Path.rename

    def name(path) -> str:
        return Path(path).name.replace(str(os.getpid()), "PID")

    monkeypatch.setattr(files, "sync", lambda path: (sync(path), done.append(f"sync {name(path)}")))
    monkeypatch.setattr(
        os, "fsync", lambda fd: done.append(f"fsync {name(os.readlink(f'/proc/self/fd/{fd}'))}")
    )
    for word, function in (("replace", replace), ("rename", rename)):
        monkeypatch.setattr(
            Path,
            word,
            lambda one, other, word=word, function=function: (
                done.append(f"{word} {name(one)} {name(other)}"),
                function(one, other),
            ),
        )
    return done


def test_file_is_durable_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    done = recorded(monkeypatch)
    files.replace(tmp_path / "latest", "step_2\n")
    kept = [line for line in done if not line.startswith("fsync " + tmp_path.name)]
    assert kept == [
        "fsync .latest.PID.tmp",
        f"sync {tmp_path.name}",
        "replace .latest.PID.tmp latest",
        f"sync {tmp_path.name}",
    ]
    assert (tmp_path / "latest").read_text() == "step_2\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "latest"]


def test_file_that_cannot_be_written_holds_what_it_held(tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("before")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        files.replace(tmp_path / "kept", "after")
    assert (tmp_path / "kept").read_text() == "before"
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_folder_and_all_in_it_are_durable_before_it_has_its_name(tmp_path, monkeypatch):
    done = recorded(monkeypatch)
    with files.new_folder(tmp_path / "made") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "one").write_text("1")
    named = next(at for at, line in enumerate(done) if line.startswith("rename"))
    assert {"sync one", "sync deep"} <= set(done[:named])
    assert done[named - 1].startswith("sync .made.partial-")
    assert f"sync {tmp_path.name}" in done[named:]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("empty", [False, True], ids=["absent", "empty"])
def test_folder_set_aside_by_a_killed_process_is_taken_back_or_removed(tmp_path, finished, empty):
    old = tmp_path / ".data.replaced"
    old.mkdir()
    (old / "who").write_text("old")
    if finished or empty:
        (tmp_path / "data").mkdir()
    if finished:
        (tmp_path / "data" / "who").write_text("new")
    files.recover(tmp_path / "data")
    assert (tmp_path / "data" / "who").read_text() == ("new" if finished else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def _replace_and_die(place: Path, renames: int) -> None:
    """Replace a folder, and end without a word after so many renames."""
    left, rename = [renames], files.rename

    def counted(one: Path, other: Path) -> None:
        rename(one, other)
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    files.rename = counted
    with files.new_folder(place, lambda _: True) as folder:
        (folder / "who").write_text("new")


@pytest.mark.parametrize(("renames", "stays"), [(1, "old"), (2, "new")])
def test_process_killed_after_either_rename_loses_neither_folder(tmp_path, renames, stays):
    place = tmp_path / "data"
    place.mkdir()
    (place / "who").write_text("old")
    dying = multiprocessing.get_context("fork").Process(
        target=_replace_and_die, args=(place, renames)
    )
    dying.start()
    dying.join()
    assert dying.exitcode == 9
    files.recover(place)
    assert (place / "who").read_text() == stays
    with files.new_folder(place, lambda _: True) as folder:
        (folder / "who").write_text("newer")
    assert (place / "who").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def _is_locked(file: Path, by: str, told) -> None:
    try:
        with files.lock(file, by=by):
            told.put(None)
    except files.Locked as held:
        told.put(held.by)


@pytest.mark.parametrize("by", ["flock", "lockf"])
def test_lock_is_held_against_other_processes_and_its_file_goes(tmp_path, by):
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    with files.lock(tmp_path / "lock", by=by) as alone:
        assert alone
        other = fork.Process(target=_is_locked, args=(tmp_path / "lock", by, told))
        other.start()
        assert told.get() == f" (process {os.getpid()} on {socket.gethostname()})"
        other.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["", "process 1", "process 1 on node1\nmore", "\0" * 600])
def test_lock_that_does_not_say_who_holds_it_names_nobody(tmp_path, left):
    with files.lock(tmp_path / "lock"):
        (tmp_path / "lock").write_text(left)
        with pytest.raises(files.Locked) as refused, files.lock(tmp_path / "lock"):
            pass
    assert refused.value.by == ""


def test_lock_of_a_killed_process_names_the_next_that_holds_it(tmp_path):
    (tmp_path / "lock").write_text("process 123456789 on a-host-with-a-much-longer-name\n")
    with files.lock(tmp_path / "lock"):
        said = (tmp_path / "lock").read_text()
    assert said == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_lock_is_held_on_a_full_disk_too(tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(full))
    with files.lock(tmp_path / "lock") as alone:
        assert alone
        with pytest.raises(files.Locked) as refused, files.lock(tmp_path / "lock"):
            pass
    assert refused.value.by == ""


def test_sync_tree_passes_links_by(tmp_path):
    (tmp_path / "to").symlink_to(tmp_path / "nowhere")
    files.sync_tree(tmp_path)
    shutil.rmtree(tmp_path)
