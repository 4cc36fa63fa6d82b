"""One machine of a cluster: its own processes, mounts, name and network, and the ranks on it.

Init, process 1 of the machine, writes into NODE.codes how each rank ended: `rank code time`.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from mcore_sft import command, train
from tests.machines import linux

PORT = 29500
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Node:
    """What differs between machines, and what is started there."""

    arguments: tuple[str, ...] = ()
    """Of mcore_sft/train.py, in each rank."""
    ranks: int = 1
    first: int | None = None
    """Its first rank; without it, the ranks of the nodes before come first."""
    environment: Mapping[str, str] = field(default_factory=dict)
    local: Mapping[Path, Path] = field(default_factory=dict)
    """What lies at a path on this machine alone."""
    read_only: tuple[Path, ...] = ()
    """Which of these nobody can write."""
    hosts: str | None = None
    """Its /etc/hosts; without it, every node stands there."""
    folder: Path = Path("/")
    """Where it is started."""
    user: int | None = None
    patch: Callable[[], None] | None = None
    """Called in each rank before anything else."""
    command: tuple[str, ...] = ()
    """Started instead of ranks."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a node stands in its cluster."""

    number: int
    first: int
    world: int
    head: str
    hosts: Path
    log: Path
    codes: Path


def begin(node: Node, place: Place, network: int) -> Callable[[], None]:
    """Make this process the init of a node; returns what is to be done next, in init and ranks."""
    linux.die_with_parent()
    _speak_into(place.log)
    codes = place.codes.open("w", buffering=1)
    _enter(node, place, network)
    ranks = {}
    for local in range(1 if node.command else node.ranks):
        pid = os.fork()
        if not pid:
            return partial(_rank, node, place, local)
        ranks[pid] = place.first + local
    return partial(_await, ranks, codes)


def _speak_into(log: Path) -> None:
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _enter(node: Node, place: Place, network: int) -> None:
    linux.join(network)
    linux.unshare(linux.MOUNTS | linux.HOSTNAME | linux.SHARED_MEMORY)
    linux.keep_mounts()
    linux.mount("proc", "/proc")
    linux.mount("tmpfs", "/dev/shm")
    linux.name_host(f"node{place.number}")
    if node.user is not None:
        linux.let_all_reach(Path(sys.base_prefix), Path(sys.prefix), ROOT)
    for at, what in {Path("/etc/hosts"): place.hosts, **node.local}.items():
        linux.bind(what, at)
    for at in node.read_only:
        linux.read_only(at)


def _await(ranks: dict[int, int], codes: TextIO) -> None:
    while ranks:
        pid, status = os.wait()
        if pid in ranks:
            code = os.waitstatus_to_exitcode(status)
            print(ranks.pop(pid), code, time.monotonic(), file=codes)


def _rank(node: Node, place: Place, local: int) -> None:
    os.environ.update(_environment(node, place, local))
    os.chdir(node.folder)
    if node.user is not None:
        linux.become(node.user)
    if node.command:
        os.execvp(node.command[0], node.command)
    linux.name_process(f"rank{place.first + local}")
    if node.patch:
        node.patch()
    sys.argv = [str(train.__file__), *node.arguments]
    command.run(train.main)


def _environment(node: Node, place: Place, local: int) -> dict[str, str]:
    """As an srun script sets it; torchrun sets its own."""
    ranks = {
        "RANK": place.first + local,
        "WORLD_SIZE": place.world,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": node.ranks,
        "MASTER_ADDR": place.head,
        "MASTER_PORT": PORT,
    }
    own = {} if node.command else {name: str(value) for name, value in ranks.items()}
    return {"OMP_NUM_THREADS": "1", **own, **node.environment}
