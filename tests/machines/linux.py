"""Namespaces and mounts of Linux, which Python knows from 3.12 on alone."""

import contextlib
import ctypes
import os
import platform
import signal
from collections.abc import Iterator
from pathlib import Path

MOUNTS, HOSTNAME, PROCESSES, NETWORK = 0x20000, 0x4000000, 0x20000000, 0x40000000
SHARED_MEMORY = 0x8000000
_BIND, _REMOUNT, _READ_ONLY, _RECURSIVE, _PRIVATE = 0x1000, 0x20, 0x1, 0x4000, 0x40000
_NAME, _DUMPABLE, _DIES_WITH_PARENT = 15, 4, 1
_libc = ctypes.CDLL(None, use_errno=True)


def unshare(kinds: int) -> None:
    """Enter new namespaces; new processes are those that this one forks."""
    _check(_libc.unshare(kinds))


@contextlib.contextmanager
def own_network_afterwards() -> Iterator[None]:
    """Come back to the network of before."""
    with opened("/proc/self/ns/net") as before:
        try:
            yield
        finally:
            join(before)


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A file descriptor."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def new_network() -> int:
    """An empty network, as an open file."""
    with own_network_afterwards():
        unshare(NETWORK)
        return os.open("/proc/self/ns/net", os.O_RDONLY)


def join(namespace: int) -> None:
    """Stay in a namespace that is open as a file."""
    _check(_libc.setns(namespace, 0))


def keep_mounts() -> None:
    """Let no mount from here on be seen by others."""
    _check(_libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None))


def mount(kind: str, at: str) -> None:
    _check(_libc.mount(kind.encode(), at.encode(), kind.encode(), 0, None))


def bind(what: Path, at: Path) -> None:
    """Let `at` show what lies at `what`."""
    _check(_libc.mount(bytes(what), bytes(at), None, _BIND, None))


def read_only(at: Path) -> None:
    """Let nobody write at `at`, where something is bound."""
    _check(_libc.mount(None, bytes(at), None, _BIND | _REMOUNT | _READ_ONLY, None))


def let_all_reach(*paths: Path) -> None:
    """Let all users reach what they may read, where a folder above it is closed to them.

    Nothing else is to be seen of that folder any more.
    """
    descriptors = [os.open(path, os.O_PATH) for path in paths]
    for path, descriptor in zip(paths, descriptors, strict=True):
        closed = [parent for parent in path.parents if not parent.stat().st_mode & 1]
        if closed:
            mount("tmpfs", str(closed[-1]))
            closed[-1].chmod(0o755)
        if not path.exists():
            path.mkdir(parents=True)
            bind(Path(f"/proc/self/fd/{descriptor}"), path)
        os.close(descriptor)


def name_host(name: str) -> None:
    platform._uname_cache = None  # type: ignore[attr-defined]  # whoever asks first is remembered
    _check(_libc.sethostname(name.encode(), len(name)))


def name_process(name: str) -> None:
    _check(_libc.prctl(_NAME, name.encode(), 0, 0, 0))


def die_with_parent() -> None:
    _check(_libc.prctl(_DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0))


def become(user: int) -> None:
    """Be another user, as if this process had been started so."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    _check(_libc.prctl(_DUMPABLE, 1, 0, 0, 0))


def _check(code: int) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
