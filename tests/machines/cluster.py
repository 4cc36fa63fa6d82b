"""A cluster on one Linux machine: nodes with networks, mounts, hosts and processes of their own."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil

from mcore_sft.config import RunConfig
from tests.machines.forker import address
from tests.machines.node import ROOT, Node, Place


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run, and the arguments that start it."""

    config: RunConfig
    arguments: tuple[str, ...]

    def node(self, *overrides: str, **surroundings: Any) -> Node:
        """A node that takes part in it."""
        return Node(arguments=(*self.arguments, *overrides), **surroundings)


class Refused(Exception):
    """Nobody may make namespaces here; the message says why."""


class Machines:
    """Asks the forker."""

    def __init__(self) -> None:
        self._end, theirs = Pipe()
        foreign = ("SLURM_", "TORCHELASTIC_")
        own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.machines.forker", str(theirs.fileno())],
                cwd=ROOT,
                env={**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                pass_fds=[theirs.fileno()],
            )
        if refusal := self._end.recv():
            raise Refused(refusal)

    def ask(self, what: str, *arguments: Any) -> Any:
        self._end.send((what, arguments))
        return self._end.recv()

    def close(self) -> None:
        self._end.close()
        self._process.wait()


class Started:
    """A node with what was started on it."""

    def __init__(self, machines: Machines, node: Node, place: Place) -> None:
        self._machines = machines
        self._place = place
        self._ranks = 1 if node.command else node.ranks
        self.began = time.monotonic()
        self.pid: int = machines.ask("fork", node, place)
        self._is_there = True

    @property
    def said(self) -> str:
        log = self._place.log
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error:")]

    @property
    def ended(self) -> dict[int, tuple[int, float]]:
        """Exit code of each rank that has ended, and when it did."""
        codes = self._place.codes
        lines = codes.read_text().splitlines() if codes.exists() else []
        return {int(rank): (int(code), float(at)) for rank, code, at in map(str.split, lines)}

    @property
    def has_ended(self) -> bool:
        if len(self.ended) == self._ranks or not self._is_there:
            return True
        return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE

    def wait_for(self, pattern: str, within: float = 60) -> re.Match[str]:
        """Wait until the node has said it."""
        found = until(lambda: re.search(pattern, self.said) or self.has_ended, within)
        assert isinstance(found, re.Match), f"{pattern} was not said:\n{self.said}"
        return found

    def signal(self, rank: int, number: int) -> None:
        """Send a rank a signal."""
        (found,) = (x for x in psutil.Process(self.pid).children() if x.name() == f"rank{rank}")
        found.send_signal(number)

    def kill(self) -> None:
        """End all its processes at once; its network stays."""
        if self._is_there:
            self._is_there = False
            self._machines.ask("end", self.pid)


class Cluster:
    """Nodes node0, node1, ... of which each start has new ones, with new networks."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        self._machines = machines
        self._folder = folder
        self._starts = 0
        self._nodes: list[Started] = []

    def start(self, *nodes: Node | None, head: str = "node0") -> list[Started]:
        """Start all ranks; a node that is None has one, and never comes."""
        self.end()
        self._machines.ask("connect", len(nodes))
        self._starts += 1
        sizes = [node.ranks if node else 1 for node in nodes]
        for number, node in enumerate(nodes):
            if node is None:
                continue
            first = sum(sizes[:number]) if node.first is None else node.first
            names = self._folder / f"start{self._starts}_node{number}"
            hosts = names.with_suffix(".hosts")
            hosts.write_text(node.hosts or every_host(len(nodes)))
            place = Place(
                number=number,
                first=first,
                world=sum(sizes),
                head=head,
                hosts=hosts,
                log=names.with_suffix(".log"),
                codes=names.with_suffix(".codes"),
            )
            self._nodes.append(Started(self._machines, node, place))
        return self._nodes

    def cut(self, number: int) -> None:
        """Pull the cable of a node."""
        self._machines.ask("cable", number, "down")

    def mend(self, number: int) -> None:
        """Put it back."""
        self._machines.ask("cable", number, "up")

    def end(self) -> None:
        """End all processes."""
        for node in self._nodes:
            node.kill()
        self._nodes = []


def every_host(size: int) -> str:
    """An /etc/hosts that knows all nodes."""
    known = "".join(f"{address(number)} node{number}\n" for number in range(size))
    return f"127.0.0.1 localhost\n{known}"


def codes(nodes: Sequence[Started], within: float, since: float | None = None) -> dict[int, int]:
    """The exit code of every rank, once all have ended, so many seconds after `since`.

    Without it, the seconds count from the last start. Where the machine has other work too, it may
    take as much longer.
    """
    within *= max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    began = max(node.began for node in nodes) if since is None else since
    until(lambda: all(node.has_ended for node in nodes), began + within - time.monotonic() + 1)
    told = logs(nodes)
    assert all(node.has_ended for node in nodes), f"some still run after {within:g} s:\n{told}"
    ended = {rank: found for node in nodes for rank, found in node.ended.items()}
    assert ended, f"no rank ended by itself:\n{told}"
    late = max(at for _, at in ended.values()) - began
    assert late < within, f"the last ended after {late:.1f} s:\n{told}"
    return {rank: code for rank, (code, _) in sorted(ended.items())}


def logs(nodes: Sequence[Started]) -> str:
    """What a test that fails shows."""
    return "\n".join(f"--- {node.ended}:\n{node.said}" for node in nodes)


def until(told: Callable[[], Any], within: float) -> Any:
    """Wait until it is so; returns what was told last."""
    end = time.monotonic() + within
    while not (found := told()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """What happens inside leaves the folders as they are, but for the lock."""
    before = [_content(folder) for folder in folders]
    yield
    assert [_content(folder) for folder in folders] == before


def _content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }
