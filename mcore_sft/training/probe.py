"""Whether all machines see the run's folder: a folder in it that each must find and write to.

rank 0: RUN/.agree-RANDOM/ --its name, by Peers--> each machine: RUN/.agree-RANDOM/RANK --> rank 0

Machines that do not see the same folder would each keep a part of every checkpoint.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mcore_sft.base import files
from mcore_sft.base.errors import UserError
from mcore_sft.runtime.peers import Peers
from mcore_sft.training.alone import unwritable

NAME = ".agree-"
SEEN_SECONDS = 60.0
"""So much later a network file system may show a new folder to other machines."""
LOCAL_SECONDS = 3.0
"""A disk of one machine alone never does."""
_MOUNTS = Path("/proc/self/mountinfo")
_LOCAL = {"btrfs", "ext2", "ext3", "ext4", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


@contextlib.contextmanager
def laid(folder: Path) -> Iterator[str]:
    """Make a folder in the run's folder that every machine must find; its name."""
    place = folder / f"{NAME}{secrets.token_hex(8)}"
    try:
        place.mkdir()
        files.sync(folder)
    except OSError as error:
        raise unwritable(folder, f"{error.strerror}: {place}") from None
    try:
        yield place.name
    finally:
        shutil.rmtree(place, ignore_errors=True)


def check(place: Path, peers: Peers) -> None:
    """Raise `UserError` on every rank unless all machines see `place`; collective."""
    mine = _answer(place, peers) if peers.is_first_here else None
    peers.exchange(mine, lambda answers: _see(place, answers, peers))


def _answer(place: Path, peers: Peers) -> str:
    """Leave a file there, by its name since listings are cached; or say that it is unseen."""
    host = peers.hosts[peers.launch.rank]

    def leave() -> bool:
        try:
            files.write(place / str(peers.launch.rank), host)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unwritable(place.parent, f"{error.strerror}, on {host}") from None
        return True

    return "left" if _until_seen(place.parent, leave) else "unseen"


def _see(place: Path, answers: Sequence[str | None], peers: Peers) -> None:
    for rank, answer in enumerate(answers):
        mine = place / str(rank)
        if answer is not None and (
            answer == "unseen" or not _until_seen(place.parent, mine.is_file)
        ):
            raise UserError(
                f"output {place.parent}: is not the same folder on {peers.hosts[rank]} as on "
                f"{peers.hosts[0]} (what one writes there, the other does not see). Fix: put it "
                "where all machines see it, and name that with output=DIR"
            )
    shutil.rmtree(place, ignore_errors=True)


def _until_seen(folder: Path, look: Callable[[], bool]) -> bool:
    """Whether `look` succeeds, in the time that the file system of `folder` may take."""
    until = time.monotonic() + (LOCAL_SECONDS if _is_local(folder) else SEEN_SECONDS)
    while not look():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _is_local(folder: Path) -> bool:
    """Whether a folder lies on a file system that no other machine shares."""
    place = os.path.realpath(folder)
    found = ("", "")
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text("utf-8", "surrogateescape").splitlines():
            mounted, _, after = line.partition(" - ")
            point = mounted.split()[4].replace("\\040", " ")
            inside = place == point or place.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(found[0]):
                found = (point, after.split()[0])
    return found[1] in _LOCAL
