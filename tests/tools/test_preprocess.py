import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import preprocess
import psutil
import pytest

from mcore_sft import command
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.staging import workspace

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def experiment(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"name: fixture\noutput: {tmp_path / 'run'}\n"
        f"model: {{path: {FIXTURES / 'tokenizer'}}}\n"
        f"data: {{root: {FIXTURES}, train: [{{path: rows.jsonl}}], workers: 1}}\n",
        encoding="utf-8",
    )
    return file


def preprocess_with(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command.run(preprocess.main)
    return stopped.value.code


def test_writes_the_dataset_beside_the_run_and_prints_its_table(experiment, monkeypatch, capsys):
    overrides = ["data.sequence_length=256", "prompt.template=chat"]
    assert preprocess_with(monkeypatch, "--config", experiment, *overrides) == 0
    folder = experiment.parent / "run" / "data"
    dataset = PackedDataset(folder)
    shown = capsys.readouterr().out
    assert "packing efficiency" in shown
    assert "dropped: longer than the sequence" in shown
    assert str(folder) in shown
    assert dataset.manifest["inputs"]["prompt"]["template"] == "chat"


def test_show_writes_nothing(experiment, monkeypatch, capsys):
    assert preprocess_with(monkeypatch, "--config", experiment, "--show", 2) == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl:2" in shown
    assert "<|begin_of_text|>" in shown
    assert not (experiment.parent / "run").exists()


def test_tokenizer_too_large_for_the_model_stops_before_anything_is_written(
    experiment, monkeypatch, capsys
):
    model = experiment.parent / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 640}', encoding="utf-8")
    overrides = [f"model.path={model}", f"model.tokenizer={FIXTURES / 'tokenizer'}"]
    assert preprocess_with(monkeypatch, "--config", experiment, *overrides) == 2
    assert "701 tokens" in capsys.readouterr().err
    assert not (experiment.parent / "run").exists()


# --- runs that do not come to their end ---

TOOL = Path(preprocess.__file__)
FILES, ROWS = 12, 5000
MANY = FILES * ROWS


@pytest.fixture
def many(tmp_path):
    """An experiment of enough rows to be caught at work, a block in each of its files."""
    for number in range(FILES):
        numbers = range(number * ROWS, (number + 1) * ROWS)
        rows = ({"problem": f"What is {i} + 1?", "generated_solution": f"{i + 1}"} for i in numbers)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"rows-{number:02}.jsonl").write_text(text, encoding="utf-8")
    file = tmp_path / "experiment.yaml"
    source = "{path: rows-*.jsonl, problem: problem, solution: generated_solution}"
    file.write_text(
        f"name: many\noutput: {tmp_path / 'run'}\n"
        f"model: {{path: {FIXTURES / 'tokenizer'}}}\n"
        f"data: {{root: {tmp_path}, train: [{source}], workers: 2}}\n",
        encoding="utf-8",
    )
    return file


def start(experiment, *overrides, **options) -> subprocess.Popen:
    command_line = [sys.executable, str(TOOL), "--config", str(experiment), *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command_line, start_new_session=True, **pipes, **options)


def wait_for_tokens(experiment) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any((experiment.parent / "run").glob("data.unfinished/*.block")):
            return
        time.sleep(0.005)
    raise AssertionError("nothing was written in a minute")


def left_in(experiment) -> list[str]:
    return sorted(file.name for file in (experiment.parent / "run").iterdir())


def processes_of(running: subprocess.Popen, *, at_least: int) -> list[psutil.Process]:
    """What it has started: first a process of multiprocessing's own, then those that tokenize."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if len(started := psutil.Process(running.pid).children(recursive=True)) >= at_least:
            return started
        time.sleep(0.005)
    raise AssertionError("no process was started in a minute")


INTERRUPTED, TERMINATED = (130, "interrupted\n"), (143, "terminated\n")
KEPT = "run/data.unfinished: holds what was encoded; the same command goes on from there"


@pytest.mark.parametrize(
    ("send", "signals", "end"),
    [
        (os.killpg, [signal.SIGINT], INTERRUPTED),  # Ctrl-C
        (os.kill, [signal.SIGTERM], TERMINATED),
        (os.killpg, [signal.SIGTERM, signal.SIGTERM], TERMINATED),  # timeout(1), schedulers
    ],
)
def test_ended_run_leaves_what_it_encoded_and_says_so(many, send, signals, end):
    running = start(many)
    wait_for_tokens(many)
    started = processes_of(running, at_least=3)
    for number in signals:
        send(running.pid, number)
        time.sleep(0.02)
    _, said = running.communicate(timeout=60)
    kept, said = said.splitlines(keepends=True)
    assert KEPT in kept
    assert (running.returncode, said) == end
    assert left_in(many) == ["data.unfinished"]
    assert psutil.wait_procs(started, timeout=10)[1] == []


def test_interrupted_while_processes_start(many):
    running = start(many)
    processes_of(running, at_least=2)
    time.sleep(0.3)  # the second, the foreman of those that tokenize, is at its imports
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == INTERRUPTED
    assert left_in(many) == []


def test_second_run_into_the_same_folder_is_told(experiment, monkeypatch, capsys):
    with workspace(experiment.parent / "run" / "data"):
        for arguments in ((), ("--overwrite",)):
            assert preprocess_with(monkeypatch, "--config", experiment, *arguments) == 2
            assert "run/data: another run is writing it" in capsys.readouterr().err
    assert preprocess_with(monkeypatch, "--config", experiment) == 0


def test_killed_run_leaves_no_dataset_nor_processes_and_the_next_one_is_whole(many):
    running = start(many)
    wait_for_tokens(many)
    started = processes_of(running, at_least=3)
    os.kill(running.pid, signal.SIGKILL)
    assert psutil.wait_procs(started, timeout=10)[1] == []
    running.communicate(timeout=60)
    left = [name.rpartition("-")[0] or name for name in left_in(many)]
    assert left == [".data.lock", ".data.partial", "data.unfinished"]
    again = start(many)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert left_in(many) == ["data"]
    assert PackedDataset(many.parent / "run" / "data").num_examples == MANY


def test_full_disk_is_one_sentence_and_leaves_nothing(many):
    def limit() -> None:  # files of at most 100 kB: writing more fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    running = start(many, preexec_fn=limit)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 2, said
    assert f"cannot be written ({os.strerror(errno.EFBIG)})" in said.replace("\n", " ")
    assert "Traceback" not in said
    assert left_in(many) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_small_disk(many, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk]).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        running = start(many, f"data.packed={disk / 'packed'}")
        _, said = running.communicate(timeout=60)
        assert running.returncode == 2, said
        assert f"cannot be written ({os.strerror(errno.ENOSPC)})" in said.replace("\n", " ")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
