import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_sft import command

WAITS = """
import time
from mcore_sft import command
def main():
    try:
        print("waits", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
command.run(main)
"""


@pytest.mark.parametrize(
    ("number", "rank", "ends"),
    [
        (signal.SIGINT, None, (130, "cleaned up\n", "interrupted\n")),
        (signal.SIGTERM, None, (143, "cleaned up\n", "terminated\n")),
        (signal.SIGTERM, "1", (-signal.SIGTERM, "", "")),  # torchrun ends what hangs
    ],
)
def test_signals_are_one_sentence(number, rank, ends):
    environment = {**os.environ, **({"RANK": rank} if rank else {})}
    running = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "waits\n"
    running.send_signal(number)
    said, error = running.communicate(timeout=60)
    assert (running.returncode, said, error) == ends


WARNS = """
import logging
from mcore_sft import command
def main():
    for name in ("megatron.core.models.gpt.gpt_model", "torch.utils.cpp_extension", "anything"):
        logging.getLogger(name).warning(f"of {name}")
command.run(main)
"""


def test_what_libraries_tell_their_developers_is_not_told():
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "of anything\n")


def test_handlers_are_as_they_were(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: None)
    assert ended.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("script", ["tools/plan.py", "mcore_sft/train.py"])
def test_a_script_of_another_clone_is_refused(tmp_path, script):
    file = tmp_path / "clone" / script
    for name in ("mcore_sft", "tools"):
        (tmp_path / "clone" / name).mkdir(parents=True)
    file.write_text("from mcore_sft import command\ncommand.run(lambda: print('ran'))\n")
    ours = os.environ | {"PYTHONPATH": str(Path(command.__file__).parents[1])}
    run = [sys.executable, str(file)]
    ran = subprocess.run(run, capture_output=True, text=True, check=False, env=ours)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"(expected {tmp_path}/clone/mcore_sft, beside {file})" in ran.stderr
    assert f"`make setup` in {tmp_path}/clone," in ran.stderr
    # A script of somebody's own is free.
    shutil.move(file, tmp_path / "script.py")
    run[1] = str(tmp_path / "script.py")
    ran = subprocess.run(run, capture_output=True, text=True, check=False, env=ours)
    assert (ran.returncode, ran.stdout) == (0, "ran\n")


@pytest.mark.parametrize(("rank", "said"), [("0", "stopped: SIGTERM came\n"), ("1", "")])
def test_a_run_that_was_asked_to_stop_has_an_exit_code_of_its_own(monkeypatch, capsys, rank, said):
    def stops():
        raise command.Stopped("SIGTERM came")

    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        command.run(stops)
    assert ended.value.code == command.STOPPED == 75
    assert capsys.readouterr().err == said
