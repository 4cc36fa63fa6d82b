"""The command of the nightly benchmarks: what it says, keeps, sends and returns."""

import fcntl
import json
import socket
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.base.errors import UserError
from nightly import history, night
from nightly.run import Run
from tests.nightly import sample


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Benchmark -> how it ends; nothing is run."""
    ends: dict[str, str] = {}
    late = replace(sample.DEPARTS, gate="area", step=None, sentence="area")
    details: dict[str, dict[str, Any]] = {
        "passed": {},
        "failed": {
            "outcome": "failed",
            "findings": (sample.PASSED, late, sample.DEPARTS),
            "narrowed": "goes away in fp32",
            "commits": "one of 3 commits",
        },
        "crashed": {
            "outcome": "crashed",
            "findings": (),
            "crash": "torchrun, log:\nexit code 1",
            "commits": "one of 2 commits",
        },
    }

    def record(self: Run) -> Any:
        return sample.record(
            1,
            tier=self.night.tier.name,
            benchmark=self.benchmark.name,
            commit=self.night.commit,
            **details[ends.get(self.benchmark.name, "passed")],
        )

    monkeypatch.setattr(Run, "record", record)
    return ends


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *words: str) -> int:
    command = ["nightly.py", "--tier", "cpu", "--data", ".", "--output", str(output), *words]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        night.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ({}, 0),
        ({"short_dp2": "failed"}, 1),
        ({"short_dp2": "failed", "short_bf16": "crashed"}, 3),
    ],
)
def test_the_exit_code_tells(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    ends: dict[str, str],
    code: int,
) -> None:
    outcomes |= ends
    assert run(monkeypatch, tmp_path, "--only", "short_dp2", "short_bf16") == code
    told = capsys.readouterr().out
    assert f"{2 - len(ends)} of 2 passed" in told
    for name, outcome in ends.items():
        assert f"{name} {outcome}" in told
    records, torn = history.read(tmp_path / "history.jsonl")
    assert [record.benchmark for record in records] == ["short_dp2", "short_bf16"]
    assert torn is None
    assert "<html" in (tmp_path / "page.html").read_text()


def test_what_is_in_the_history_is_not_added_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, str]
) -> None:
    for _ in range(2):
        run(monkeypatch, tmp_path, "--only", "short_dp2")
    assert len(history.read(tmp_path / "history.jsonl")[0]) == 1


def test_a_history_that_cannot_be_written_ends_no_night(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "page.html").mkdir()
    assert run(monkeypatch, tmp_path, "--only", "short_dp2", "short_bf16") == 3
    told = capsys.readouterr()
    assert "2 of 2 passed" in told.out
    assert "short_bf16 is not in the history or the page: [Errno 21]" in told.err
    assert len(history.read(tmp_path / "history.jsonl")[0]) == 2


def test_two_nights_of_a_tier_do_not_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, str]
) -> None:
    (tmp_path / "cpu").mkdir()
    words = ["nightly.py", "--tier", "cpu", "--only", "short_dp2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with (tmp_path / "cpu" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on node1\n")
        lock.flush()
        with pytest.raises(UserError, match=r"night is running there \(process 7 on node1\); wait"):
            night.main()
    assert run(monkeypatch, tmp_path, "--only", "short_dp2") == 0


class Hook(BaseHTTPRequestHandler):
    """Takes what is posted."""

    taken: list[Any]

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.taken.append(json.loads(self.rfile.read(length)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_the_summary_is_sent(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes |= {"short_dp2": "failed", "short_bf16": "crashed"}
    Hook.taken = []
    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        words = ("--only", "short_dp2", "short_bf16", "demo_tp2", "--webhook", url)
        assert run(monkeypatch, tmp_path, *words) == 3
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    (sent,) = Hook.taken
    head, *lines = sent["text"].splitlines()
    assert head.endswith("1 of 3 passed; short_dp2 failed; short_bf16 crashed")
    assert lines == [
        "short_dp2: loss departs at step 13: 1.70512, reference 1.7, 0.003 apart, at most 0.0001; "
        "goes away in fp32; one of 3 commits",
        "short_bf16: exit code 1; one of 2 commits",
    ]
    assert [x["benchmark"] for x in sent["records"]] == ["short_dp2", "short_bf16", "demo_tp2"]
    assert "\n".join(lines) in capsys.readouterr().out


def test_a_webhook_that_is_not_there_changes_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--only", "short_dp2", "--webhook", "http://127.0.0.1:9")
    assert run(monkeypatch, tmp_path, *words) == 0
    assert "the webhook did not take the summary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"no http\r\n\r\n", "illegal status line"),
        (b"HTTP/1.1 500 Sorry\r\nContent-Length: 0\r\n\r\n", "HTTP 500"),
        (b"", "timed out"),
    ],
    ids=["no http", "500", "silence"],
)
def test_a_webhook_that_does_not_take_it_changes_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: bytes, said: str
) -> None:
    monkeypatch.setattr(night, "HOOK_SECONDS", 0.5)
    told = threading.Event()

    def take() -> None:
        taken, _ = server.accept()
        with taken:
            taken.recv(2**16)
            taken.sendall(answer)
            told.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=take)
        thread.start()
        night.send(f"http://127.0.0.1:{server.getsockname()[1]}", "all passed", [])
        told.set()
        thread.join()
    assert f"the webhook did not take the summary: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tier", "gpu9"], "no tier gpu9"),
        (["--tier", "cpu", "--only", "nine"], "tier cpu has no benchmark nine"),
        (["--tier", "cpu", "--only", "math_dp2"], "needs --data"),
        (["--tier", "cpu", "--golden", "demo_tp2"], "--golden needs --reason"),
    ],
)
def test_what_cannot_begin_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["nightly.py", "--output", str(tmp_path), *words])
    with pytest.raises(UserError, match=said):
        night.main()
