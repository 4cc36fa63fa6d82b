"""Evaluation, nightly and tools: what kills, cuts short, redirects, floods or empties."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grade as grade_tool
import lane
import pytest

from mcore_sft.config import BenchmarkConfig
from mcore_sft.evaluation import answers, benchmarks, comparison, identity, run
from mcore_sft.evaluation.answers import Answer, AnswerFile
from mcore_sft.evaluation.benchmarks import Benchmark
from mcore_sft.evaluation.engines import server_engine
from mcore_sft.evaluation.engines.engine import Request, check_weights, model_shape
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.grading.compare.equivalence import Verdict
from mcore_sft.evaluation.grading.extract.extract import Extraction
from mcore_sft.evaluation.grading.grade import Graded, Grader, Pair
from mcore_sft.evaluation.scores import report
from mcore_sft.evaluation.scores.summary import Verdicts, describe
from nightly import golden, history, night, page
from nightly.run import Night, Run
from nightly.tier import Tier
from tests.evaluation.fake_server import Sent, Server
from tests.evaluation.forks import BOMB, busy_forks, workers
from tests.evaluation.test_run import evaluation
from tests.evaluation.test_server_engine import opened, quick, server
from tests.nightly import sample
from tests.tools.runs import write_run

__all__ = ["quick", "server"]  # fixtures
ROOT = Path(__file__).parents[2]
EQUAL = Pair(gold="2^m+2", prediction="2+2^m")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


# ---- a grading process that ends


@pytest.fixture
def grader() -> Iterator[Grader]:
    with Grader(timeout=60, processes=1) as made:
        made.start()
        yield made


def judged(grader: Grader, pair: Pair) -> tuple[str, str]:
    verdict = dict(grader.judge_all([pair]))[0]
    return verdict.outcome, verdict.rule


@contextmanager
def each_fork_gets(grader: Grader, number: int) -> Iterator[list[int]]:
    """Send the signal to each fork that is busy, once it computes; yields their ids."""
    met: list[int] = []
    over = threading.Event()

    def strike() -> None:
        while not over.wait(0.01):
            for fork in busy_forks(grader):
                if fork not in met:
                    met.append(fork)
                    os.kill(fork, number)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield met
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_12_a_grading_process_killed_from_outside_is_graded_again(
    grader: Grader, number: int
) -> None:
    fork = workers(grader)[0]._fork
    assert fork is not None
    os.kill(fork, number)
    assert judged(grader, EQUAL) == ("equal", "math_verify")
    assert (
        judged(grader, Pair(gold="a-b", prediction="b-a"))[0] == "different"
    )  # no other's verdict


def test_12_the_process_that_forks_may_be_killed_too(grader: Grader) -> None:
    process = workers(grader)[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    assert judged(grader, EQUAL) == ("equal", "math_verify")


def test_12_an_answer_is_not_graded_where_the_second_process_is_killed_too(grader: Grader) -> None:
    with each_fork_gets(grader, signal.SIGKILL) as met:
        assert judged(grader, Pair(gold="5", prediction=BOMB)) == ("not_graded", "killed")
    assert len(met) == 2
    assert judged(grader, EQUAL) == ("equal", "math_verify")


def test_12_an_answer_that_crashes_its_process_stays_unsafe(grader: Grader) -> None:
    with each_fork_gets(grader, signal.SIGSEGV) as met:
        assert judged(grader, Pair(gold="5", prediction=BOMB)) == ("unsafe", "worker_died")
    assert len(met) == 1


def verdict_row(name: str, sample: int, verdict: str, **more: Any) -> dict[str, Any]:
    return {
        "id": name, "sample": sample, "verdict": verdict, "rule": "r", "missing": None,
        "boxes_differ": False, "finish_reason": "stop", "num_tokens": 3, "subject": None,
        "level": None, "disputed": False, "class": None if sample == 0 else 0, **more,
    }  # fmt: skip


def test_12_what_is_not_graded_is_counted_apart_and_never_as_wrong() -> None:
    rows = [
        *(verdict_row("a", n, "equal") for n in (0, 1, 2)),
        *(verdict_row("b", n, "not_graded") for n in (0, 1)),
        verdict_row("b", 2, "equal"),
        verdict_row("c", 0, "equal"),
        verdict_row("c", 1, "equal"),
        verdict_row("c", 2, "different", **{"class": -2}),  # not compared with the first
    ]
    nothing = Benchmark(name="mine", dataset_name="Mine", source="here", problems=())
    told = describe(Verdicts(rows=rows), nothing)
    assert told["not_graded"] == 3
    assert told["verdicts"] == {"equal": 2, "not_graded": 1}
    right = told["score"]["symbolic_correct"]
    assert (right["hits"], right["total"], right["percent"]) == (2, 2, 100)
    for mode in ("majority@2", "pass@2", "pass@1[2]"):
        assert (told["score"][mode]["percent"], told["score"][mode]["total"]) == (100, 1)
    assert "not graded 3 of 9 answers" in report.not_graded_line(3, 9)


def test_12_the_summary_of_regraded_lines_counts_it_apart() -> None:
    outcomes = ("equal", "equal", "different", "not_graded")
    graded = [
        Graded(extraction=Extraction(answer="5"), verdict=Verdict(outcome=one, rule="killed"))
        for one in outcomes
    ]
    told = grade_tool._summary(graded)
    assert "correct 66.67%" in told
    assert "(Wilson, 2 of 3)" in told
    assert "not graded 1 of 4 answers" in told


def test_12_a_comparison_leaves_out_what_is_not_graded(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, [True, True, False]) for name in "ab")
    rows = (b / "verdicts.jsonl").read_text().replace('"equal"', '"not_graded"', 1)
    (b / "verdicts.jsonl").write_text(rows)
    found = comparison.compare(comparison.read(a), comparison.read(b))
    assert (found.paired.both, found.paired.only_a, found.not_graded) == (1, 0, 1)


# ---- the served model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder as far as a server's engine reads it."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shape = {"vocab_size": 301, "max_position_embeddings": 256, "eos_token_id": 7}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


def ask(folder: Path, output: Path, url: str) -> dict[str, Any]:
    settings = {"engine": "server", "server": {"url": url}, "timeout": 60}
    reports: list[dict[str, Any]] = []
    asked = evaluation(folder, output, problems=2, **settings)
    run.evaluate([asked], lambda _, report: reports.append(report))
    return reports[0]


def test_13_another_model_of_a_server_is_asked_anew(
    folder: Path, tmp_path: Path, server: Server
) -> None:
    output = tmp_path / "out"
    server.models = [{"id": "tiny", "root": "/models/a", "created": 1, "permission": [{"id": 1}]}]
    told = ask(folder, output, server.url)
    assert told["engine"]["url"] == server.url
    assert "/models/a" in told["engine"]["served"]
    server.models = [{"id": "tiny", "root": "/models/a", "created": 2, "permission": [{"id": 2}]}]
    ask(folder, output, server.url.replace("127.0.0.1", "localhost"))  # the same at another address
    assert len(server.bodies) == 2
    server.models = [{"id": "tiny", "root": "/models/b", "created": 3}]
    ask(folder, output, server.url)
    assert len(server.bodies) == 4
    assert len({one.configuration for one in answers.read(output / "answers.jsonl")}) == 4


def test_13_a_server_is_no_part_of_the_key_of_other_engines(folder: Path) -> None:
    plain = evaluation(folder, folder, engine="transformers")
    other = evaluation(folder, folder, engine="transformers", server={"url": "http://there"})
    assert plain.configuration == other.configuration
    assert identity.model_files(folder).keys() == {"config.json"}


# ---- durable files


class Disk:
    """What was synced and renamed, by inode, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, int]] = []
        fsync, replace = os.fsync, os.replace

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            self.done.append(("sync", os.fstat(descriptor).st_ino))

        def renamed(source: Any, target: Any) -> None:
            replace(source, target)
            self.done.append(("rename", os.stat(target).st_ino))

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", renamed)

    def holds(self, file: Path, *, renamed: bool = True) -> bool:
        """Whether a power loss now would leave `file` and all of its content."""
        content, name = file.stat().st_ino, file.parent.stat().st_ino
        if not renamed:
            return {("sync", content), ("sync", name)} <= set(self.done)
        at = len(self.done) - self.done[::-1].index(("rename", content)) - 1
        return ("sync", content) in self.done[:at] and ("sync", name) in self.done[at:]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def _answers(folder: Path) -> Path:
    with AnswerFile(folder / "answers.jsonl") as file:
        one = Answer(
            id="a", sample=0, configuration="c", expected_answer="2", response="2",
            finish_reason="stop", tokens=(1,), prompt_length=3,
        )  # fmt: skip
        file.add([one])
    return folder / "answers.jsonl"


def _verdicts(folder: Path) -> Path:
    folder.mkdir()
    answers.write_lines(folder / "verdicts.jsonl", [{"id": 1}])
    return folder / "verdicts.jsonl"


def _history(folder: Path) -> Path:
    history.append(folder / "history.jsonl", sample.record(1))
    return folder / "history.jsonl"


def _page(folder: Path) -> Path:
    page.write(folder / "none.jsonl", folder / "page.html")
    return folder / "page.html"


def _curve(folder: Path) -> Path:
    folder.mkdir()
    sample.curve(3).write(folder / "curve.json")
    return folder / "curve.json"


def _golden(folder: Path) -> Path:
    golden.keep(folder / "g.json", sample.curve(3), {}, command="nightly", reason="why")
    return folder / "g.json"


def _lane(folder: Path) -> Path:
    stack = {"python": "3.11", "torch": "2", "megatron-core": "0.16", "parts": {}}
    return lane.keep(stack, folder)


@pytest.mark.parametrize(
    "write",
    [_answers, _verdicts, _history, _page, _curve, _golden, _lane],
    ids=lambda x: x.__name__,
)
def test_06_files_that_others_rely_on_outlive_a_power_loss(
    tmp_path: Path, disk: Disk, write: Callable[[Path], Path]
) -> None:
    file = write(tmp_path / "new")
    assert disk.holds(file, renamed=file.name not in ("answers.jsonl", "history.jsonl"))
    assert ("sync", tmp_path.stat().st_ino) in disk.done or write in (_verdicts, _curve)
    assert [one.name for one in file.parent.iterdir()] == [file.name]


MAY_WRITE = {
    "carry_wheels.py": 4,  # its checksums, and what it carries
    "demo_data.py": 1,  # made again at each demo
    "gpu_report.py": 2,  # into an environment that it makes
    "mutants.py": 2,  # into a copy of the tree
}


def test_06_no_whole_file_is_written_in_another_way() -> None:
    found: dict[str, int] = {}
    for folder in ("mcore_sft/base", "mcore_sft/evaluation", "nightly", "tools"):
        for file in (ROOT / folder).glob("*.py"):
            ways = re.findall(r"\.(?:write_text|write_bytes|flock|lockf)\(", file.read_text())
            if ways and file.name != "files.py":
                found[file.name] = len(ways)
    assert found == MAY_WRITE


def test_06_a_second_run_is_refused_and_a_lock_of_a_killed_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    (tmp_path / ".answers.jsonl.lock").touch()
    holder = rf"writing here \(process {os.getpid()} on {re.escape(socket.gethostname())}\); wait"
    with AnswerFile(path), pytest.raises(EvaluationError, match=holder):
        AnswerFile(path)
    with AnswerFile(path) as file:
        assert file.done == set()
    assert [one.name for one in tmp_path.iterdir()] == ["answers.jsonl"]


def test_06_an_output_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match=r"cannot be written \(Not a directory\)"):
        AnswerFile(tmp_path / "file" / "out" / "answers.jsonl")


# ---- an empty record of a night


def a_run(folder: Path) -> Run:
    told = {"name": "short", "config": str(folder / "none.yaml"), "gates": {}}
    tier = Tier.model_validate({"name": "tiny", "minutes": 5, "benchmarks": [told]})
    night = Night(
        tier=tier, commit="abc", commit_time="2026-01-01T00:00:00+00:00", machine={},
        output=folder, data=None, until=time.monotonic() + 60, earlier=(),
    )  # fmt: skip
    return Run(night, tier.benchmarks[0])


@pytest.mark.parametrize("content", ["", '{"tier": "ti', "[]\n"])
def test_14_an_empty_record_of_a_night_is_skipped_with_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    one = a_run(tmp_path)
    one.folder.mkdir(parents=True)
    file = one.folder / "record.json"
    file.write_text(content)
    monkeypatch.setattr(Run, "check", lambda self: None)
    monkeypatch.setattr(Run, "_judged", lambda self: sample.record(1))
    assert one.record() == sample.record(1)
    assert f"{file} is skipped" in capsys.readouterr().err
    assert one.record() == sample.record(1)
    assert capsys.readouterr().err == ""


def test_14_an_empty_curve_or_table_of_seconds_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = a_run(tmp_path)
    one.folder.mkdir(parents=True)
    (one.folder / "curve.json").touch()
    (one.folder / "seconds.json").touch()

    def train(self: Run, *_: Any) -> None:
        (self.folder / "run").mkdir()
        entry = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "tokens_per_second": 5.0}
        metrics = entry | {"peak_memory_bytes": 1, "step_seconds": 0.1}
        (self.folder / "run" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")

    monkeypatch.setattr(Run, "_run", train)
    monkeypatch.setattr(Run, "_training", lambda *_: [])
    assert one.trained().loss == (2.0,)
    assert one._stages() == {}


# ---- leaks


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server whose every answer is `answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


SECRET = "sk-0123456789abcdef"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\u2019", "\x1b", " "])
def test_leaks_an_api_key_that_no_header_can_hold_is_never_printed(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET + end)
    with pytest.raises(EvaluationError, match="MY_KEY, whose value holds") as said:
        opened(folder, server.url, api_key_variable="MY_KEY")
    assert SECRET not in str(said.value)


def test_leaks_a_server_that_repeats_the_key_has_it_taken_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeat(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(401)
        handler.end_headers()
        handler.wfile.write(f"wrong key {handler.headers['Authorization']}".encode())

    monkeypatch.setenv("MY_KEY", SECRET)
    with serving(repeat) as url, pytest.raises(EvaluationError, match="HTTP 401") as said:
        opened(folder, url, api_key_variable="MY_KEY")
    assert SECRET not in str(said.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_leaks_authorization_never_travels_along_a_redirect(
    folder: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    got: list[str | None] = []

    def take(handler: BaseHTTPRequestHandler) -> None:
        got.append(handler.headers["Authorization"])
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b'{"data": [{"id": "tiny"}]}')

    monkeypatch.setenv("MY_KEY", SECRET)
    with serving(take) as elsewhere:

        def send_on(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Location", f"{elsewhere}/v1/models")
            handler.end_headers()

        with serving(send_on) as url:
            with pytest.raises(
                EvaluationError, match=f"HTTP {status}, it sends the client to http"
            ):
                opened(folder, url, api_key_variable="MY_KEY")
            night.send(url, "all passed", [])
    assert got == []


def test_leaks_a_reply_has_a_limit_of_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flood(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b'{"data": [{"id": "tiny", "about": "' + b"x" * 100_000 + b'"}]}')

    monkeypatch.setattr(server_engine, "_REPLY_BYTES", 1000, raising=False)
    with serving(flood) as url, pytest.raises(EvaluationError, match="longer than 1,000 bytes"):
        opened(folder, url)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte every twentieth of a second, headers included: none of the waits is long."""
    whole = b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"id": "tiny"}]}'
    for byte in whole[:40]:
        try:
            handler.wfile.write(bytes([byte]))
        except OSError:
            return
        time.sleep(0.05)
    handler.wfile.write(whole[40:])


def test_leaks_a_reply_has_a_limit_of_time_in_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server_engine, "_GREETING_SECONDS", 0.3)
    monkeypatch.setattr(night, "HOOK_SECONDS", 0.3)
    with serving(drip) as url:
        begun = time.monotonic()
        with pytest.raises(EvaluationError, match=r"no answer \(timed out"):
            opened(folder, url)
        night.send(url, "all passed", [])
        assert time.monotonic() - begun < 3  # without limits 4 s
    assert "did not take the summary: timed out" in capsys.readouterr().err


def test_leaks_the_tries_of_an_answer_have_a_limit_of_time_together(
    server: Server, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(server_engine, "_DELAYS", (0.2,) * 50)
    monkeypatch.setattr(server_engine, "_ANSWER_SECONDS", 1.5)
    server.answer = lambda body: Sent(503, "busy")
    begun = time.monotonic()
    with pytest.raises(EvaluationError, match=r"tries failed \(HTTP 503"):
        list(opened(folder, server.url).generate(_requests()))
    assert time.monotonic() - begun < 5  # 50 tries would take 10 s


def _requests() -> list[Any]:
    return [Request(index=0, prompt_ids=(1, 2))]


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": []},
        {"choices": 5},
        {"choices": ["text"]},
        {"choices": [{"finish_reason": "stop"}]},
        {"choices": [{"finish_reason": "stop", "text": 5}]},
        {"choices": [{"finish_reason": "stop", "token_ids": ["5"]}]},
        {"choices": [{"finish_reason": "stop", "token_ids": [10**30]}]},
        {"choices": [{"finish_reason": ["stop"], "text": "5"}]},
        {"choices": [{"finish_reason": "stop", "text": "5", "prompt_token_ids": 5}]},
    ],
    ids=json.dumps,
)
def test_leaks_any_reply_is_an_answer_or_a_sentence(
    folder: Path, server: Server, reply: dict[str, Any]
) -> None:
    server.answer = lambda body: Sent(200, reply)
    with pytest.raises(EvaluationError, match=re.escape(server.url)):
        list(opened(folder, server.url).generate(_requests()))


def test_leaks_an_address_with_a_password_is_refused_without_it(folder: Path) -> None:
    with pytest.raises(EvaluationError, match="user or a password") as said:
        opened(folder, f"http://me:{SECRET}@127.0.0.1:9")
    assert SECRET not in str(said.value)


@pytest.mark.parametrize("end", ["\n", " ", "\u2019"])
def test_leaks_the_address_of_a_webhook_is_never_printed(
    capsys: pytest.CaptureFixture[str], end: str
) -> None:
    night.send(f"http://127.0.0.1:9/services/{SECRET}{end}", "all passed", [])
    said = capsys.readouterr().err
    assert "did not take the summary" in said
    assert SECRET not in said


# ---- what a download left in place of a file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "a Git LFS pointer (fetch the file: git lfs pull)"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in", "an HTML page (download the file itself)"),
    ],
    ids=["pointer", "page"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "rows"])
def test_foreign_a_pointer_or_a_page_in_place_of_a_file_is_one_sentence(
    folder: Path, name: str, content: bytes, said: str
) -> None:
    reads: dict[str, Callable[[Path], object]] = {
        "rows": lambda root: benchmarks.load(BenchmarkConfig(name="mine", path="rows"), root),
        "config.json": model_shape,
    }
    (folder / name).write_bytes(content)
    with pytest.raises(EvaluationError) as error:
        reads.get(name, check_weights)(folder)
    assert f"{folder / name}: it is {said}" in str(error.value)


def test_foreign_a_port_that_nobody_listens_on_is_told(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(EvaluationError, match=r"no answer \(.*refused"):
        opened(folder, f"http://127.0.0.1:{port}")
