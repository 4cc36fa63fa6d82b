"""Rank 0's end of the lines to all ranks: it hears what goes wrong first, and tells all of it.

    rank --hello, value, error, bye--> Hub --all, values, answer, failure, bye--> every rank

A message is a line of JSON. The first error, or the first rank that is lost, ends the run: what
else comes within a second is part of it, and one rank of each machine is asked to say it. A rank is
lost when its connection closes without a farewell, which a process that ends cannot prevent, or
when its machine has not acknowledged anything for a minute. It is the kernel that asks and
acknowledges, so a rank that is busy, stopped or suspended is not lost.
"""

import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mcore_sft.runtime.launch import machine

LOST_SECONDS = 60
"""A machine is lost that acknowledges nothing for so long."""
LAST_SECONDS = 10.0
"""So long a failure waits for those that have not heard of it."""
TOGETHER_SECONDS = 1.0
"""What goes wrong so soon after the first is part of it."""
_SEND_SECONDS = 5.0
_LINE_BYTES = 64 * 2**20
_HELLO_BYTES = 4096

Message = dict[str, Any]


@dataclass(eq=False)
class _Line:
    """The connection to one rank."""

    socket: socket.socket
    address: str
    here: str
    """This machine's address, as the rank reached it."""
    reader: "Lines"
    rank: int = -1
    """-1 until it has said hello."""
    host: str = ""
    machine: str = ""


@dataclass
class Lines:
    """Messages out of the bytes of a connection."""

    rest: bytearray = field(default_factory=bytearray)
    most_bytes: int = _LINE_BYTES

    def feed(self, more: bytes) -> Iterator[Message]:
        """The messages that are whole now; ValueError for what is none."""
        self.rest += more
        while True:
            end = self.rest.find(b"\n")
            if (len(self.rest) if end < 0 else end) > self.most_bytes:
                raise ValueError("a message is too long")
            if end < 0:
                return
            message = json.loads(self.rest[:end])
            del self.rest[: end + 1]
            if not isinstance(message, dict):
                raise ValueError("a message is an object")
            yield message


def encode(message: Message) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode() + b"\n"


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel notice within `LOST_SECONDS` that the other machine does not answer."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    pause = max(1, LOST_SECONDS // 12)
    for option, value in (
        ("TCP_KEEPIDLE", 3 * pause),
        ("TCP_KEEPINTVL", pause),
        ("TCP_KEEPCNT", 9),
        ("TCP_USER_TIMEOUT", 1000 * LOST_SECONDS),
    ):
        if hasattr(socket, option):  # macOS has other names
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def address_of(name: Any) -> str:
    """The IP address in a socket's name, without IPv6's scope and its form of IPv4."""
    return str(name[0]).partition("%")[0].removeprefix("::ffff:")


class Hub:
    """Answers the ranks until all have said bye, or a failure has reached them."""

    def __init__(
        self, size: int, seconds: float, lost: Callable[[Sequence[int], str], str]
    ) -> None:
        """All must come within `seconds`; `lost(ranks, where)` is the sentence of a loss."""
        self._thread = threading.Thread(target=self._serve, name="hub", daemon=True)
        self._size = size
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._lost_sentence = lost
        self._machine = machine()
        both = socket.has_dualstack_ipv6()
        self._server = socket.create_server(
            ("", 0),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=4096,
        )
        self._server.settimeout(0)
        self.port = int(self._server.getsockname()[1])
        self.token = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._lines: list[_Line] = []
        self._known: dict[int, _Line] = {}
        self._values: dict[int, Any] = {}
        self._errors: dict[int, str] = {}
        self._lost: list[int] = []
        self._ended: set[int] = set()
        self._are_all_here = False
        self._since: float | None = None
        """When the first thing went wrong."""
        self._failure: str | None = None
        self._told: set[int] = set()
        self._speaks: set[str] = set()
        """The machines of which a rank was asked to say the failure."""

    def close_in_child(self) -> None:
        """Let go of the connections in a forked process, which would hold them open."""
        for line in self._lines:
            line.socket.close()
        self._server.close()

    def start(self) -> None:
        """Begin to serve, in a thread of its own."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until no rank needs it any more."""
        self._thread.join(seconds)

    def _serve(self) -> None:
        try:
            while not self._is_over():
                for key, _ in self._selector.select(0.1):
                    if key.data is None:
                        self._accept()
                    else:
                        self._read(key.data)
                self._look()
        finally:  # a defect here must not leave ranks that wait
            for line in list(self._lines):
                self._drop(line)
            self._server.close()
            self._selector.close()

    def _is_over(self) -> bool:
        if self._failure is not None:
            remote = any(not self._is_here(line) for line in self._lines)
            everybody = len(self._told) == self._size and not remote
            return everybody or time.monotonic() > self._until
        return len(self._ended) == self._size

    def _look(self) -> None:
        """Whether something went wrong a while ago, or the time for the first contact is over."""
        now = time.monotonic()
        if self._failure is not None:
            return
        if self._since is None:
            if len(self._known) < self._size and now > self._until:
                self._fail(self._absent())
                self._until = now + TOGETHER_SECONDS  # who has not come will not hear of it either
            return
        quiet = self._size - len(self._ended) - len(self._lost)
        if len(self._errors) >= quiet or now > self._since + TOGETHER_SECONDS:
            self._fail(self._sentence())

    def _accept(self) -> None:
        try:
            connection, name = self._server.accept()
        except OSError:
            return
        keep_alive(connection)
        connection.settimeout(_SEND_SECONDS)
        line = _Line(
            socket=connection,
            address=address_of(name),
            here=address_of(connection.getsockname()),
            reader=Lines(most_bytes=_HELLO_BYTES),
        )
        self._lines.append(line)
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _read(self, line: _Line) -> None:
        try:
            more = line.socket.recv(2**16)
            for message in line.reader.feed(more):
                self._hear(line, message)
        except TimeoutError:
            return
        except Exception:  # whatever it is, it is no message of a rank
            more = b""
        if not more and line in self._lines:
            self._drop(line)
            if line.rank >= 0 and line.rank not in self._ended | self._told:
                self._lost.append(line.rank)
                self._wrong()

    def _drop(self, line: _Line) -> None:
        self._lines.remove(line)
        self._selector.unregister(line.socket)
        line.socket.close()

    def _wrong(self) -> None:
        self._since = self._since or time.monotonic()

    def _hear(self, line: _Line, message: Message) -> None:
        if line.rank < 0:
            self._greet(line, message)
        else:
            hear = {
                "value": self._gather,
                "answer": self._pass_on,
                "error": self._note,
                "bye": self._let_go,
            }
            hear[message["is"]](line, message)

    def _gather(self, line: _Line, message: Message) -> None:
        """Give rank 0 the values, once they are there."""
        self._values[line.rank] = message["value"]
        if len(self._values) == self._size:
            values = [self._values[rank] for rank in range(self._size)]
            self._values = {}
            self._send(self._known[0], {"is": "values", "value": values})

    def _pass_on(self, line: _Line, message: Message) -> None:
        for other in list(self._known.values()):
            self._send(other, message)

    def _note(self, line: _Line, message: Message) -> None:
        """Keep an error, or end all ranks with it if it is a `common` one."""
        self._errors.setdefault(line.rank, str(message["text"]))
        self._wrong()
        if message["common"] and self._failure is None:
            self._fail(str(message["text"]))

    def _let_go(self, line: _Line, message: Message) -> None:
        """A rank has said bye."""
        if not self._are_all_here:  # the others wait for it
            self._lost.append(line.rank)
            self._wrong()
        self._ended.add(line.rank)
        if len(self._ended) == self._size:
            self._pass_on(line, {"is": "bye"})

    def _greet(self, line: _Line, message: Message) -> None:
        if not secrets.compare_digest(str(message["token"]), self.token):
            self._drop(line)
            return
        rank, size = int(message["rank"]), int(message["size"])
        if self._are_all_here:
            text = (
                f"rank {rank} ({message['host']}): all ranks of that run have come already. Fix: "
                "end it, or start this one with another --master-port"
            )
            self._send(line, {"is": "failure", "text": text, "say": True, "here": False})
            self._drop(line)
            return
        line.rank, line.host, line.machine = rank, str(message["host"]), str(message["machine"])
        if rank in self._known:
            self._errors[rank] = (
                f"two processes have RANK {rank}, on {self._known[rank].host} and on {line.host}. "
                "Fix: give each machine its own --node-rank"
            )
            self._wrong()
        elif size != self._size:
            self._errors[rank] = (
                f"WORLD_SIZE is {size} on {line.host}, expected {self._size} as on "
                f"{self._known[0].host if 0 in self._known else 'rank 0'}. Fix: start all machines "
                "with the same --nnodes and --nproc-per-node"
            )
            self._wrong()
        line.reader.most_bytes = _LINE_BYTES
        self._known.setdefault(rank, line)
        if self._failure is not None:
            self._tell(line)
        elif len(self._known) == self._size and self._since is None:
            self._welcome()

    def _welcome(self) -> None:
        """Tell all that all have come, and by which address others reach this machine."""
        self._are_all_here = True
        lines = [self._known[rank] for rank in range(self._size)]
        remote = [line.here for line in lines if line.machine != lines[0].machine]
        message = {
            "is": "all",
            "hosts": [line.host for line in lines],
            "machines": [line.machine for line in lines],
            "here": (remote or [lines[0].here])[0],
        }
        for line in lines:
            self._send(line, message)

    def _send(self, line: _Line, message: Message) -> None:
        try:
            line.socket.sendall(encode(message))
        except OSError:
            return  # the next read tells of it

    def _absent(self) -> str:
        came = ", ".join(in_words(ranks) + f" ({host})" for host, ranks in self._by_host().items())
        missing = [rank for rank in range(self._size) if rank not in self._known]
        has = "has" if len(missing) == 1 else "have"
        return (
            f"{in_words(missing)} {has} not come within {self._seconds:.0f} s "
            f"(train.connect_seconds); {came} came. Fix: look at what the machine with "
            f"{in_words(missing)} says, and whether it reaches this one; start all anew"
        )

    def _by_host(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for rank in sorted(self._known):
            found.setdefault(self._known[rank].host, []).append(rank)
        return found

    def _sentence(self) -> str:
        """What ends the run: an error that a rank had, or which ranks are lost."""
        if not self._errors:
            ranks = sorted(self._lost)
            lines = [self._known[rank] for rank in ranks]
            places = dict.fromkeys(f"{line.host} ({line.address})" for line in lines)
            return self._name(0) + ": " + self._lost_sentence(ranks, ", ".join(places))
        error = next(iter(self._errors.values()))
        same = [rank for rank, text in self._errors.items() if text == error]
        machines = {line.machine for line in self._known.values()}
        if len(machines) == 1 and min(same) == 0:  # which looks at files for all
            return error
        return f"{self._name(min(same))}: {error}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._known[rank].host})" if rank in self._known else f"rank {rank}"

    def _fail(self, sentence: str) -> None:
        self._failure = sentence
        self._until = time.monotonic() + LAST_SECONDS
        self._told.update(self._known)
        for line in sorted(self._lines, key=lambda line: line.rank):
            if line.rank >= 0:
                self._tell(line)

    def _tell(self, line: _Line) -> None:
        """Tell a rank of the failure; the first of each machine is asked to say it."""
        say = line.machine not in self._speaks
        self._speaks.add(line.machine)
        self._told.add(line.rank)
        here = self._is_here(line)
        self._send(line, {"is": "failure", "text": self._failure, "say": say, "here": here})

    def _is_here(self, line: _Line) -> bool:
        """Whether a rank shares this machine."""
        return line.machine == self._machine


def in_words(ranks: Sequence[int]) -> str:
    """Ranks in words: `rank 1`, `ranks 8 to 15`, `ranks 1, 3`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) == ranks[-1] - ranks[0] + 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
