"""The line between the ranks: one answer to all, one error for all, and a rank that is lost."""

import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mcore_sft.base.errors import Stopped, UserError
from mcore_sft.runtime import hub
from mcore_sft.runtime.launch import Launch, host
from mcore_sft.runtime.peers import Elsewhere, Peers, Unreached, end_together, interface_of
from tests.distributed import _free_port, run_ranks

HOST = re.escape(host())


def _told(body: Callable[[Peers], Any]) -> tuple[str, str, bool]:
    """What a rank ends with: the type and text of an error, and whether it is to say it."""
    try:
        with Peers(Launch.read(), 10.0) as peers:
            body(peers)
    except Exception as error:
        return type(error).__name__, str(error), not getattr(error, "quiet", False)
    return "", "", False


def _exchanges() -> tuple[Any, Any, tuple[str, ...]]:
    with Peers(Launch.read(), 10.0) as peers:
        rank = peers.launch.rank
        first = peers.exchange(rank, lambda values: {"sum": sum(values)})
        second = peers.exchange([rank], lambda values: values)
        return first, second, peers.hosts


def test_all_ranks_get_what_rank_0_decides_from_the_values_of_all() -> None:
    expected = ({"sum": 3}, [[0], [1], [2]], (host(),) * 3)
    assert run_ranks(3, _exchanges) == [expected] * 3
    assert run_ranks(1, _exchanges) == [({"sum": 0}, [[0]], (host(),))]


def _one_fails(where: int, error: Exception) -> tuple[str, str, bool]:
    def body(peers: Peers) -> None:
        if peers.launch.rank == where:
            raise error
        peers.exchange(1, len)

    return _told(body)


@pytest.mark.parametrize("where", [0, 1])
def test_an_error_of_one_rank_ends_all_and_one_says_it(where: int) -> None:
    told = run_ranks(3, _one_fails, where, UserError("no such file"))
    whose = f"rank {where} ({host()}): " if where else ""  # rank 0 looks at files for all
    assert {text for _, text, _ in told} == {f"{whose}no such file"}
    assert [says for _, _, says in told] == [True, False, False]


def test_a_defect_of_one_rank_keeps_its_traceback_and_ends_the_others() -> None:
    told = run_ranks(2, _one_fails, 1, KeyError("x"))
    assert told[1][0] == "KeyError"
    expected = rf"rank 1 \({HOST}\): ended by KeyError: 'x'; its own log has the traceback"
    assert re.fullmatch(expected, told[0][1])


def test_rank_0_may_refuse_what_it_got() -> None:
    told = run_ranks(2, _told, _refused)
    assert [text for _, text, _ in told] == ["these differ"] * 2


def _refused(peers: Peers) -> None:
    def refuse(values: list[Any]) -> None:
        raise UserError("these differ")

    peers.exchange(1, refuse)


def _all_fail(peers: Peers) -> None:
    raise UserError("every rank has this")


def test_an_error_that_all_ranks_have_is_said_once_as_it_is() -> None:
    began = time.monotonic()
    told = run_ranks(3, _told, _all_fail)
    assert {(kind, text) for kind, text, _ in told} == {("UserError", "every rank has this")}
    assert [says for _, _, says in told] == [True, False, False]
    assert time.monotonic() - began < 5


def _stops(peers: Peers) -> None:
    raise Stopped("all were asked to")


def test_a_run_that_stops_is_no_error() -> None:
    assert run_ranks(2, _told, _stops) == [("Stopped", "all were asked to", True)] * 2


def _early(where: int) -> tuple[str, str, bool]:
    if os.environ["RANK"] != str(where):
        return _told(lambda peers: peers.exchange(1, len))
    try:
        end_together(UserError("a typo"))
    except UserError as error:
        return type(error).__name__, str(error), not error.quiet


@pytest.mark.parametrize("where", [0, 1])
def test_an_error_before_the_first_contact_reaches_all(where: int) -> None:
    told = run_ranks(2, _early, where)
    whose = f"rank {where} ({host()}): " if where else ""
    assert {text for _, text, _ in told} == {f"{whose}a typo"}
    assert sum(says for _, _, says in told) == 1


def _of_another_world(changes: dict[str, str], seconds: float) -> tuple[str, str, bool]:
    os.environ.update(changes)
    hub.LAST_SECONDS = 0.5
    try:
        with Peers(Launch.read(), seconds):
            raise AssertionError("it has met ranks that are not there")
    except UserError as error:
        return type(error).__name__, str(error), not error.quiet


def test_rank_0_names_the_ranks_that_do_not_come() -> None:
    (told,) = run_ranks(1, _of_another_world, {"WORLD_SIZE": "4"}, 1.0)
    assert "ranks 1 to 3 have not come within 1 s (train.connect_seconds)" in told[1]
    assert f"rank 0 ({host()}) came" in told[1]


def test_a_rank_that_finds_nobody_says_whom_it_asked() -> None:
    changes = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(_free_port())}
    (told,) = run_ranks(1, _of_another_world, changes, 1.0)
    assert told[0] == Unreached.__name__
    assert f"rank 1 ({host()}): 127.0.0.1 port {changes['MASTER_PORT']} does not answer" in told[1]


def _as_rank_1() -> tuple[str, str, bool]:
    hub.LAST_SECONDS = 0.5
    os.environ["RANK"] = "0" if os.environ["LOCAL_RANK"] == "0" else "1"
    return _told(lambda peers: None)


def test_two_processes_with_one_rank_are_refused() -> None:
    told = run_ranks(3, _as_rank_1)
    assert any("two processes have RANK 1" in text for _, text, _ in told)


def _of_size() -> tuple[str, str, bool]:
    os.environ["WORLD_SIZE"] = "3" if os.environ["RANK"] == "1" else "2"
    return _told(lambda peers: None)


def test_ranks_of_two_sizes_are_refused() -> None:
    told = run_ranks(2, _of_size)
    assert all("WORLD_SIZE is 3" in text and "expected 2" in text for _, text, _ in told)


# --- a rank that is lost ---


def _processes(functions: list[Callable[[Peers], None]]) -> list[int | None]:
    """The exit codes of ranks that do this."""
    port = _free_port()
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, len(functions), port, function))
        for rank, function in enumerate(functions)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        rank.kill()
    return [rank.exitcode for rank in ranks]


def _rank(rank: int, size: int, port: int, function: Callable[[Peers], None]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with Peers(Launch.read(), 10.0) as peers:
        peers.patience = 0.2
        peers.doing, peers.resumes = "in step 31", "step_30"
        peers.exchange(None, len)
        function(peers)


def _is_busy(peers: Peers) -> None:
    time.sleep(4)


def _dies(peers: Peers) -> None:
    time.sleep(0.3)  # until all have the answer
    os._exit(9)


def _dies_and_leaves_a_child(peers: Peers) -> None:
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    os._exit(9)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_rank_that_dies_ends_all_others_within_seconds(
    lost: int, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    codes = _processes([_dies if rank == lost else _is_busy for rank in range(3)])
    assert codes == [9 if rank == lost else 2 for rank in range(3)]
    assert time.monotonic() - began < 8
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert re.fullmatch(
        rf"error: rank [012] \({HOST}\): lost rank {lost} on .*127\.0\.0\.1.* in step 31; its own "
        r"log says why\. Start again to continue from step_30\.",
        said,
    )


def test_a_process_that_a_lost_rank_has_forked_does_not_hold_its_line() -> None:
    assert _processes([_is_busy, _dies_and_leaves_a_child]) == [2, 9]


def _leaves(peers: Peers) -> None:
    peers.leave()
    os._exit(7)


def test_a_rank_that_has_said_farewell_is_not_lost() -> None:
    assert _processes([lambda peers: time.sleep(1.5), _leaves]) == [0, 7]


# --- strangers ---


def _with_strangers(peers: Peers) -> None:
    if peers.launch.rank == 0:
        assert peers._hub is not None
        hello = {"is": "hello", "rank": 1, "size": 2, "host": "x", "machine": "x", "token": "0"}
        odd = (b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[]\n", b"{}\n", b"[" * 4000 + b"\n")
        for bytes_ in (*odd, b"x" * 5000, hub.encode(hello)):
            with socket.create_connection(("127.0.0.1", peers._hub.port)) as stranger:
                stranger.sendall(bytes_)
                stranger.settimeout(5)
                assert stranger.recv(1) == b""
    assert peers.exchange(1, len) == 2


def test_a_stranger_at_the_port_is_turned_away_and_changes_nothing() -> None:
    assert run_ranks(2, _told, _with_strangers) == [("", "", False)] * 2


def _with_a_latecomer(peers: Peers) -> None:
    """A rank of another run that asks the same store finds a run that is complete."""
    if peers.launch.rank == 1:
        late = Peers(peers.launch, 5.0)
        late.meet()
        told = late._await_failure(5.0)
        assert told is not None
        assert "all ranks of that run have come already" in str(told)
        late.close()
    assert peers.exchange(1, len) == 2


def test_a_latecomer_is_refused_and_the_run_goes_on() -> None:
    assert run_ranks(2, _told, _with_a_latecomer) == [("", "", False)] * 2


def _interrupted() -> tuple[str, str, bool]:
    if os.environ["RANK"] == "1":
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    if os.environ["RANK"] == "2":
        time.sleep(2.0)
    try:
        return _told(lambda peers: peers.exchange(1, len))
    except KeyboardInterrupt:
        return "KeyboardInterrupt", "", False


def test_an_interruption_of_the_first_contact_ends_all() -> None:
    told = run_ranks(3, _interrupted)
    assert told[1][0] == "KeyboardInterrupt"
    assert told[0][1] == told[2][1] == f"rank 1 ({host()}): was interrupted"


def test_a_port_that_a_stranger_holds_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = str(stranger.getsockname()[1])
        changes = {"WORLD_SIZE": "2", "MASTER_PORT": port}
        (told,) = run_ranks(1, _of_another_world, {**changes, "RANK": "1"}, 1.0)
        assert "what listens there is no rendezvous" in told[1]
        (told,) = run_ranks(1, _of_another_world, changes, 1.0)
        assert f"port {port} is in use on {host()}" in told[1]


# --- the environment ---


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and MASTER_ADDR is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK is 2, expected less than"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    ],
)
def test_a_launch_that_is_said_in_part_is_refused(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], expected: str
) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        Launch.read()


@pytest.mark.parametrize(
    ("said", "nodes", "expected"),
    [
        ({"GROUP_WORLD_SIZE": "1", "SLURM_NNODES": "2"}, None, r"1 machine.*2 \(SLURM_NNODES\)"),
        ({"GROUP_WORLD_SIZE": "1"}, 2, r"1 machine\(s\) started, expected 2 \(train\.nodes\)"),
        ({"GROUP_WORLD_SIZE": "3"}, 2, "3 machine.*expected 2"),
        ({}, 2, r"1 machine\(s\) started, expected 2"),
        ({"GROUP_WORLD_SIZE": "2", "SLURM_NNODES": "9"}, 2, ""),
        ({"GROUP_WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_NNODES": "9"}, None, ""),
        ({}, None, ""),
    ],
)
def test_fewer_machines_than_expected_are_refused(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], nodes: int | None, expected: str
) -> None:
    for name in ("GROUP_WORLD_SIZE", "SLURM_NNODES", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    launch = Launch(rank=0, size=2, address="127.0.0.1", port=1)
    if not expected:
        launch.check(nodes, 1)
        return
    with pytest.raises(UserError, match=expected):
        launch.check(nodes, 1)


def test_restarts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Launch().check_restarts()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match="--max-restarts 3"):
        Launch().check_restarts()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--nnodes 1", ""),
        ("--nnodes=1", ""),
        ("--nproc-per-node 2", ""),
        ("--nnodes 2", "expected 2 .torchrun --nnodes"),
        ("--nnodes=1:2", "expected 1:2 .torchrun --nnodes"),
    ],
)
def test_what_torchrun_was_asked_for_is_known(
    monkeypatch: pytest.MonkeyPatch, words: str, expected: str
) -> None:
    started = ["python", "-m", "torch.distributed.run", *words.split(), "train.py"]
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(cmdline=lambda: started))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    launch = Launch(size=2, address="127.0.0.1", port=1)
    if not expected:
        launch.check(None, 1)
        return
    with pytest.raises(UserError, match=expected):
        launch.check(None, 1)


def test_the_interface_of_an_address_is_known() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


def test_an_error_of_another_rank_is_said_by_whom_it_is_asked() -> None:
    assert Elsewhere("lost", say=False).quiet
    assert not Elsewhere("lost", say=True).quiet
