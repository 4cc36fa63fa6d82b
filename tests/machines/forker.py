"""The process that a cluster's nodes are forked from: `python -m tests.machines.forker FD`.

It has imported everything, so that a rank starts at once, and has no threads, which a fork would
lose. It is the cluster's switch too: its network holds the other end of every node's cable. All
that it began ends with it.
"""

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.machines import linux


class Forker:
    """What a cluster asks for, by name."""

    def __init__(self) -> None:
        self._networks: list[int] = []
        linux.unshare(linux.NETWORK)
        own = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._switch = f"/proc/{os.getpid()}/fd/{own}"
        _ip("link add switch type bridge", "link set switch up")

    def connect(self, size: int) -> None:
        """Nodes 10.77.0.1, 10.77.0.2, ... on one switch; those of before are forgotten."""
        _ip(*[f"link del cable{number}" for number in range(len(self._networks))])
        for network in self._networks:
            os.close(network)
        self._networks = [linux.new_network() for _ in range(size)]
        for number, network in enumerate(self._networks):
            with linux.own_network_afterwards():
                linux.join(network)
                _ip(
                    "link set lo up",
                    f"link add eth0 type veth peer name cable{number} netns {self._switch}",
                    f"addr add {address(number)}/24 dev eth0",
                    "link set eth0 up",
                )
            _ip(f"link set cable{number} master switch up")

    def cable(self, number: int, state: str) -> None:
        """Cut the cable of a node ("down"), or mend it ("up")."""
        _ip(f"link set cable{number} {state}")

    def end(self, pid: int) -> None:
        """End all processes of a node at once; its network stays, as if the machine lived."""
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def fork(self, node: Any, place: Any) -> int | Callable[[], None]:
        """The init of a new node by its number; in init and its ranks, what they do next."""
        from tests.machines.node import begin

        with linux.opened("/proc/self/ns/pid") as before:
            linux.unshare(linux.PROCESSES)
            pid = os.fork()
            if not pid:
                return begin(node, place, self._networks[place.number])
            linux.join(before)
        return pid


def address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def serve(end: Connection, forker: Forker) -> Callable[[], None]:
    """Do what is asked until nobody asks any more; returns what is left to be done."""
    while True:
        try:
            name, arguments = end.recv()
        except EOFError:
            return lambda: None
        answer = getattr(forker, name)(*arguments)
        if callable(answer):  # this is a process that was forked
            end.close()
            return answer  # type: ignore[no-any-return]
        end.send(answer)


def _ip(*commands: str) -> None:
    said = subprocess.run(
        ["ip", "-batch", "-"], input="\n".join(commands), text=True, capture_output=True
    )
    if said.returncode:
        raise OSError(said.stderr)


def main() -> None:
    end = Connection(int(sys.argv[1]))
    try:
        forker = Forker()
        forker.connect(1)
    except OSError as error:
        end.send(str(error))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.machines import node, patches  # noqa: F401

    assert threading.active_count() == 1, "threads do not survive a fork"
    end.send("")
    serve(end, forker)()


if __name__ == "__main__":
    main()
