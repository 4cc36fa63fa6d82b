"""The line of this process to all ranks, from the first contact to the end; no process group.

    Launch --TCP store: the hub's port--> Peers <--hub.py--> every rank

Before a process group is made, the ranks exchange what they were started with. From then on it
brings what ends a run: the first error that any rank had, and which ranks are lost.
"""

import contextlib
import encodings.idna  # noqa: F401 (for host names; a rank's user may not read Python's library)
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import psutil
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from mcore_sft.base.errors import Stopped, UserError
from mcore_sft.base.terminal import say_at_once
from mcore_sft.runtime import hub
from mcore_sft.runtime.launch import Launch, host, machine

Found = TypeVar("Found")

CONNECT_SECONDS = 120.0
FAILED = 2
"""Exit code of a rank that ends with the others."""
_KEY = "mcore_sft hub"
_UNWIND_SECONDS = 5.0
_EARLY_SECONDS = 10.0


class Elsewhere(UserError):
    """Another rank had an error, or is lost; `quiet` unless this rank was asked to say it."""

    def __init__(self, sentence: str, *, say: bool) -> None:
        super().__init__(sentence)
        self.quiet = not say


class Unreached(UserError):
    """Rank 0 does not answer."""


class Peers:
    """All ranks of the run, this one included.

    Inside, an error of any rank ends every rank: the main thread where it waits here, and the
    process with exit code 2 where it does not come back.
    """

    def __init__(self, launch: Launch, seconds: float) -> None:
        """The first contact takes `seconds` at most."""
        self.launch = launch
        self.hosts: tuple[str, ...] = (launch.address or host(),)
        """Host name of each rank."""
        self.store: Store = HashStore()
        """The rendezvous's store, for the process group."""
        self.address = ""
        """By which the other machines reach this one."""
        self.doing = "before the first step"
        """What this rank does, for sentences."""
        self.resumes = ""
        """What a new start continues from, for sentences."""
        self.patience = 2.0
        """Seconds that the main thread has to come back and clean up after a failure."""
        self._seconds = seconds
        self._hub: hub.Hub | None = None
        self._socket: socket.socket | None = None
        self._inbox: queue.SimpleQueue[hub.Message] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._failure: Elsewhere | None = None
        self._machines: list[str] = []
        self._reached_by = ""
        self._main_address = ""
        self._reported: BaseException | None = None
        self._taken = threading.Event()
        self._hub_closed = threading.Event()
        self._is_awaited = False
        """Whether rank 0, on the same machine, has to end before this rank."""
        self._left = False

    @property
    def name(self) -> str:
        """This rank in a sentence: `rank 1 (node1)`."""
        return f"rank {self.launch.rank} ({host()})"

    @property
    def machines(self) -> int:
        """How many machines the ranks run on."""
        return len(set(self._machines))

    @property
    def is_first_here(self) -> bool:
        """Whether this rank is the first of its machine."""
        return self._machines.index(self._machines[self.launch.rank]) == self.launch.rank

    def __enter__(self) -> Self:
        if self.launch.size == 1:
            self._machines = [machine()]
            return self
        try:
            self.meet()
            everybody = self._receive("all")
        except BaseException as error:
            self.report(error)
            self.close()
            raise
        self.hosts = tuple(everybody["hosts"])
        self._machines = everybody["machines"]
        beside_main = self._machines[self.launch.rank] == self._machines[0]
        self.address = everybody["here"] if beside_main else self._reached_by
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self.report(error)
        finally:
            self.close()

    def exchange(self, value: Any, decide: Callable[[list[Any]], Found]) -> Found:
        """What rank 0 decides from the value of each rank, on every rank; collective.

        Values and what is decided are JSON. Raises the `UserError` that any rank has, on all.
        """
        if self.launch.size == 1:
            return decide([value])
        self._send({"is": "value", "value": value})
        if self.launch.rank == 0:
            values = self._receive("values")["value"]
            try:
                decided = decide(values)
            except UserError as error:
                self.report(error, common=True)
                raise
            self._send({"is": "answer", "value": decided})
        found: Found = self._receive("answer")["value"]
        return found

    def report(self, error: BaseException, *, common: bool = False) -> None:
        """Let all ranks end with the `error` of this one, or the `common` one of all.

        Raises what all ranks end with, if it is another error. Which rank of a machine says it, is
        told by `UserError.quiet`.
        """
        is_told = error is self._reported or isinstance(error, Elsewhere | Stopped)
        if self._socket is None or self._left or is_told:
            return
        self._reported = error
        if isinstance(error, UserError):
            text = str(error)
        elif isinstance(error, Exception):
            # What a backend says of a rank that is gone is no cause.
            if failure := self._await_failure(hub.TOGETHER_SECONDS + 2):
                raise failure from None
            text = f"ended by {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            text += "; its own log has the traceback"
        else:
            text = "was interrupted"
        self._send({"is": "error", "text": text, "common": common})
        failure = self._await_failure(hub.TOGETHER_SECONDS + 2)
        if failure is None or not isinstance(error, UserError):
            return
        if str(failure) != text:
            raise failure from None
        error.quiet = failure.quiet

    def leave(self) -> None:
        """Say farewell: what becomes of this rank from here on ends no other."""
        if self._socket is not None and not self._left and self._failure is None:
            self._left = True
            self._send({"is": "bye"})

    def close(self) -> None:
        """End the line, once rank 0 is no longer needed here."""
        self.leave()
        self._linger()
        if self._socket:
            self._left = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None

    def _linger(self) -> None:
        """Let the others hear of a failure, or end, before this rank does.

        torchrun ends all ranks of a machine with the first of them, and rank 0 tells all others.
        """
        if self._hub:
            self._hub.join(hub.LAST_SECONDS + 1)
        elif self._is_awaited:
            self._hub_closed.wait(hub.LAST_SECONDS + 1)

    # --- the first contact ---

    def meet(self) -> None:
        """Reach rank 0's hub by the port that the rendezvous's store tells; `Unreached`."""
        launch, until = self.launch, time.monotonic() + self._seconds
        hosts_store = launch.rank == 0 and not launch.has_agent
        if not hosts_store:
            self._await_port(until)
        try:
            port, token = _in_time(lambda: self._ask_store(hosts_store, until), until)
        except (RuntimeError, TimeoutError) as error:  # torch's errors of stores and networks
            reason = " ".join(str(error).split())[:300]
            if hosts_store and "EADDRINUSE" in reason:
                raise Unreached(
                    f"port {launch.port} is in use on {host()}. Fix: give another --master-port, "
                    "or end what holds it"
                ) from None
            raise Unreached(self._unreached(reason)) from None
        self._join(int(port), token, until)

    def _ask_store(self, hosts_store: bool, until: float) -> tuple[str, str]:
        """The hub's port and token."""
        store = TCPStore(
            self.launch.address,
            self.launch.port,
            is_master=hosts_store,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(1.0, until - time.monotonic())),
        )
        self.store = PrefixStore(f"mcore_sft {self.launch.attempt}", store)
        if self.launch.rank == 0:
            self._hub = hub.Hub(self.launch.size, until - time.monotonic(), self._lost)
            self._hub.start()
            os.register_at_fork(after_in_child=self._hub.close_in_child)
            self.store.set(_KEY, f"{self._hub.port} {self._hub.token}")
        port, token = self.store.get(_KEY).decode().split()
        return port, token

    def _await_port(self, until: float) -> None:
        """Wait until the store's port answers; torch itself would fill the log meanwhile."""
        reason = ""
        while True:
            try:
                with socket.create_connection((self.launch.address, self.launch.port), timeout=5):
                    return
            except (OSError, UnicodeError) as error:  # the latter of a name that cannot be
                reason = str(getattr(error, "strerror", None) or error)
            if time.monotonic() > until:
                raise Unreached(self._unreached(reason))
            time.sleep(0.1)

    def _unreached(self, reason: str) -> str:
        launch = self.launch
        return (
            f"{self.name}: {launch.address} port {launch.port} does not answer "
            f"within {self._seconds:.0f} s ({reason}; train.connect_seconds). Fix: give the name "
            "or address of the first machine, as all machines know it (--master-addr, or "
            "--rdzv-endpoint), see what that machine says, and start all anew"
        )

    def _join(self, port: int, token: str, until: float) -> None:
        # The store may outlive the hub of a rank 0 that has ended.
        until = min(until, time.monotonic() + hub.LAST_SECONDS)
        while True:
            try:
                self._socket = socket.create_connection((self.launch.address, port), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise Unreached(
                        f"{self.name}: rank 0 on {self.launch.address} has "
                        f"ended, or its port {port} does not answer ({error.strerror or error}). "
                        "Fix: see what it says, open the ports between the machines, and start "
                        "all anew"
                    ) from None
                time.sleep(0.1)
        self._socket.settimeout(None)
        hub.keep_alive(self._socket)
        self._reached_by = hub.address_of(self._socket.getsockname())
        self._main_address = hub.address_of(self._socket.getpeername())
        os.register_at_fork(after_in_child=self._socket.close)
        self._send(
            {
                "is": "hello",
                "token": token,
                "rank": self.launch.rank,
                "size": self.launch.size,
                "host": host(),
                "machine": machine(),
            }
        )
        threading.Thread(target=self._listen, args=(self._socket,), daemon=True).start()

    # --- messages ---

    def _send(self, message: hub.Message) -> None:
        assert self._socket is not None
        with self._sending, contextlib.suppress(OSError):  # `_listen` tells of it
            self._socket.sendall(hub.encode(message))

    def _receive(self, kind: str) -> hub.Message:
        """The next message, which is of this kind; raises the failure that came instead."""
        message = self._inbox.get()
        if message["is"] == "failure":
            raise self._take()
        assert message["is"] == kind, message
        return message

    def _await_failure(self, seconds: float) -> Elsewhere | None:
        with contextlib.suppress(queue.Empty):
            until = time.monotonic() + seconds
            while self._inbox.get(timeout=max(0.0, until - time.monotonic()))["is"] != "failure":
                pass
            return self._take()
        return None

    def _take(self) -> Elsewhere:
        assert self._failure is not None
        self._taken.set()
        return self._failure

    def _listen(self, connection: socket.socket) -> None:
        """What the thread does that hears the hub."""
        lines = hub.Lines()
        with contextlib.suppress(OSError, ValueError):
            while more := connection.recv(2**16):
                for message in lines.feed(more):
                    if message["is"] == "failure":
                        self._is_awaited = message["here"] and self._hub is None
                        self._end(Elsewhere(message["text"], say=message["say"]))
                    elif message["is"] == "bye":
                        self._left = True
                    else:
                        self._inbox.put(message)
        self._hub_closed.set()
        if not self._left and self._failure is None:
            self._end(self._without_main())

    def _without_main(self) -> Elsewhere:
        """Rank 0 is gone, and with it whoever tells which rank of this machine is to say it."""
        first = 1 if self._machines and self._machines[0] == machine() else 0
        sentence = f"{self.name}: {self._lost([0], f'{self.hosts[0]} ({self._main_address})')}"
        return Elsewhere(sentence, say=self.launch.local_rank == first)

    def _lost(self, ranks: Sequence[int], where: str) -> str:
        ranks_lost = hub.in_words(ranks)
        again = f" to continue from {self.resumes}" if self.resumes else ""
        return (
            f"lost {ranks_lost} on {where} {self.doing}; its own log says why. Start again{again}."
        )

    def _end(self, failure: Elsewhere) -> None:
        """End this rank: by its main thread if that comes back, else here."""
        self._failure = failure
        self._inbox.put({"is": "failure"})
        threading.Thread(target=self._see_the_end, args=(failure,), daemon=True).start()

    def _see_the_end(self, failure: Elsewhere) -> None:
        if self._taken.wait(self.patience):
            time.sleep(_UNWIND_SECONDS)
            self._linger()
            time.sleep(_UNWIND_SECONDS)
        if not failure.quiet:  # else the main thread would have said it, and ended the process
            say_at_once(f"error: {failure}")
        self._linger()
        os._exit(FAILED)


def _in_time(find: Callable[[], Found], until: float) -> Found:
    """What is found in another thread by then; TimeoutError if that waits for a stranger."""
    found: queue.SimpleQueue[Found | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            found.put(find())
        except Exception as error:  # whatever it is, the caller raises it
            found.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        answer = found.get(timeout=max(1.0, until - time.monotonic()) + 1)
    except queue.Empty:
        raise TimeoutError("what listens there is no rendezvous") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def end_together(error: UserError) -> NoReturn:
    """Raise the `error` of this rank, which ends all ranks, before it has met any."""
    launch = Launch.read()
    if launch.size > 1:
        try:
            _tell(launch, error, _EARLY_SECONDS)
        except Unreached:
            # Nobody waits yet: others may be slow to start.
            if launch.local_rank == 0:
                say_at_once(f"error: {error}")
            with contextlib.suppress(UserError):
                _tell(launch, error, CONNECT_SECONDS)
            error.quiet = True
    raise error


def _tell(launch: Launch, error: UserError, seconds: float) -> None:
    peers = Peers(launch, seconds)
    try:
        peers.meet()
        peers.report(error)
    finally:
        peers.close()


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has `address`; None if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None
