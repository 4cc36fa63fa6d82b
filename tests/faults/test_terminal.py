"""Every place that prints text from elsewhere: the terminal obeys nothing of it, rich neither.

Each place is called with a text that would set the title, blink and turn the direction of what
follows, and that ends a rich markup that was never begun.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import doctor
import evaluate
import grade
import inspect_data
import numpy as np
import pytest
import summarize
import to_hf

from mcore_sft import command
from mcore_sft import config as configuration
from mcore_sft.base import progress
from mcore_sft.data.report import report, show
from mcore_sft.data.text import tokenizer
from mcore_sft.data.text.prompt import Example
from mcore_sft.evaluation import benchmarks, run
from mcore_sft.evaluation.engines import vllm_engine
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.plan import memory
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.beside import metrics, watchdog
from nightly import night
from nightly.run import Run
from tests.data.test_preview import shown, write
from tests.nightly import sample
from tests.tools.runs import write_run

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tests" / "fixtures" / "tokenizer"
HOSTILE = "a\x1b]0;HACKED\x07\x1b[5m\x9b5m\u202e[/v2] :smile: [bold]"
OBEYED = ("\x1b]", "\x1b[5m", "\x07", "\x9b", "\u202e")
Patch = pytest.MonkeyPatch


def call(patch: Patch, main: Callable[[], Any], *words: object) -> None:
    patch.setattr(sys, "argv", ["tool.py", *map(str, words)])
    main()


def command_of(failure: Callable[[], Any]) -> None:
    with pytest.raises(SystemExit):
        command.run(failure)


def fail(error: Exception) -> None:
    raise error


def _error(patch: Patch, folder: Path) -> None:
    command_of(lambda: fail(EvaluationError(HOSTILE)))


def _stopped(patch: Patch, folder: Path) -> None:
    command_of(lambda: fail(command.Stopped(HOSTILE)))


def _configuration(patch: Patch, folder: Path) -> None:
    words = [f"name={HOSTILE}", "model.path=m", f"model.{HOSTILE}=1"]
    command_of(lambda: configuration.load("configs/demo.yaml", words))


def _command_line(patch: Patch, folder: Path) -> None:
    needed: dict[Callable[[], Any], tuple[str, ...]] = {
        evaluate.main: ("--model", "m"),
        grade.main: ("--input", "f"),
        night.main: ("--tier", "cpu"),
        doctor.main: (),
        to_hf.main: ("--checkpoint", "c"),
    }
    for main, words in needed.items():
        with pytest.raises(SystemExit):
            call(patch, main, *words, "--" + HOSTILE.replace(" ", ""))


def _answered(patch: Patch, folder: Path) -> None:
    asked: Any = SimpleNamespace(asked=[SimpleNamespace(key=1)])
    file: Any = SimpleNamespace(path=Path(HOSTILE), done={1})
    run._unanswered(asked, file)


def _evaluation_bar(patch: Patch, folder: Path) -> None:
    patch.setenv("FORCE_COLOR", "1")
    with run._progress(HOSTILE, 2) as advance:
        advance(1, 5)


def _data_bar(patch: Patch, folder: Path) -> None:
    patch.setenv("FORCE_COLOR", "1")
    with progress.progress(HOSTILE, total=9, console=progress.Console(stderr=True)) as advance:
        advance(5)


def _data_lines(patch: Patch, folder: Path) -> None:
    patch.setattr(progress, "SECONDS", 0)
    with progress.progress(HOSTILE, total=9, console=progress.Console(stderr=True)) as advance:
        advance(5)


def _scores(patch: Patch, folder: Path) -> None:
    done: Any = SimpleNamespace(output=Path(HOSTILE))
    evaluate._tell(done, {"text": HOSTILE})


def _compared(patch: Patch, folder: Path) -> None:
    one = write_run(folder / HOSTILE / "a", [True, False])
    two = write_run(folder / HOSTILE / "b", [False, False], extracted=HOSTILE)
    call(patch, compare.main, one, two, "--html", folder / HOSTILE / "page.html")


def _summarized(patch: Patch, folder: Path) -> None:
    write_run(folder / HOSTILE / "a", [True])
    (folder / HOSTILE / "b").mkdir()
    (folder / HOSTILE / "b" / "answers.jsonl").touch()
    call(patch, summarize.main, folder)


def _previewed(patch: Patch, folder: Path) -> None:
    (folder / HOSTILE).mkdir(parents=True)
    rows = write(folder / HOSTILE / "a.jsonl", HOSTILE, "\\boxed{1} \\boxed{2}")
    source = {**rows, "path": f"{HOSTILE}/a.jsonl"}
    print("\n".join(shown(folder, 2, train=[source], filters={"drop_multi_boxed": True})))


def _example(patch: Patch, folder: Path) -> None:
    loaded = tokenizer.load_tokenizer(TOKENIZER)
    tokens = np.array(loaded.encode(HOSTILE), dtype=np.int32)
    example = Example(tokens=tokens, spans=np.zeros((0, 2), np.int32))
    for text in (show.coloured(example, loaded), show._by_token(example, loaded, 0)):
        show.Console(width=200).print(text)


def _manifest(patch: Patch, folder: Path) -> None:
    patch.setattr(report, "summary", lambda *_: {HOSTILE: {HOSTILE: (HOSTILE,)}})
    told = {"splits": {HOSTILE: {}}, "sequence_length": 1, "fingerprint": HOSTILE}
    report.show_manifest(told, folder / HOSTILE, console=report.Console(width=200))


def _damage(patch: Patch, folder: Path) -> None:
    patch.setattr(inspect_data, "find_damage", lambda *_, **__: [HOSTILE])
    command_of(lambda: call(patch, inspect_data.main, folder / HOSTILE, "--verify"))


def _planned(patch: Patch, folder: Path) -> None:
    from mcore_sft.base.terminal import Console

    Console().print(memory.table([], HOSTILE))


def _doctor(patch: Patch, folder: Path) -> None:
    found = doctor.Finding(what=HOSTILE, state="WRONG", found=HOSTILE, mend=HOSTILE)
    doctor._print(found)


def _night(patch: Patch, folder: Path) -> None:
    crashed = replace(sample.record(1), outcome="crashed", crash=HOSTILE, findings=())
    patch.setattr(Run, "record", lambda self: crashed)
    (folder / "history.jsonl").write_text(f'{{"tier": 1}}\n"{HOSTILE}"\n')
    (folder / "page.html").mkdir()
    words = ("--tier", "cpu", "--only", "short_dp2", "--output", folder, "--webhook", HOSTILE)
    with pytest.raises(SystemExit):
        call(patch, night.main, *words)


def _vllm(patch: Patch, folder: Path) -> None:
    patch.setattr(vllm_engine, "_Process", lambda *_: SimpleNamespace(log=Path(HOSTILE), room=9))
    engine: Any = object.__new__(vllm_engine.VllmEngine)
    engine._folder, engine._config, engine._longest = folder / HOSTILE, run.EvaluationConfig(), 1
    engine._python, engine._versions, engine._process = Path(), {"vllm": HOSTILE}, None
    engine._stop_ids, engine._log = (), None
    engine._started()


def _slow_tokenizer(patch: Patch, folder: Path) -> None:
    loaded = tokenizer.load_tokenizer(TOKENIZER)
    loaded.path, loaded.gigatoken = folder / HOSTILE, True
    patch.setattr(tokenizer, "_load_gigatoken", lambda codec: fail(tokenizer._Unlike("it")))
    loaded.encode_batch(["a"] * tokenizer.BULK)


def _hub(patch: Patch, folder: Path) -> None:
    import datasets

    patch.setattr(datasets, "load_dataset", lambda *_, **__: fail(ValueError(HOSTILE)))
    command_of(lambda: benchmarks._read_hub(benchmarks.Row(dataset=HOSTILE), HOSTILE))


def _every_rank(patch: Patch, folder: Path) -> None:
    mesh: Any = SimpleNamespace(is_main=True)
    Mesh.say(mesh, HOSTILE)


def _training(patch: Patch, folder: Path) -> None:
    log: Any = SimpleNamespace(console=metrics.Console(stderr=True))
    log.say = lambda text: metrics.Metrics.say(log, text)
    metrics.Metrics.on_save(log, Path(HOSTILE))


def _hang(patch: Patch, folder: Path) -> None:
    peers = SimpleNamespace(name=f"rank 0 ({HOSTILE})", doing="in step 1")
    dog: Any = SimpleNamespace(_peers=peers, _seconds=1.0, _folder=Path(HOSTILE))
    watchdog.Watchdog._tell(dog, 2.0, None, [])


def _exported(patch: Patch, folder: Path) -> None:
    from mcore_sft.checkpoint import export

    patch.setattr(export, "export", lambda *_, **__: None)
    call(patch, to_hf.main, "--checkpoint", folder, "--output", folder / HOSTILE)


PLACES = (
    *(_error, _stopped, _configuration, _command_line, _answered, _evaluation_bar, _data_bar),
    *(_data_lines, _scores, _compared, _summarized, _previewed, _example, _manifest, _damage),
    *(_planned, _doctor, _night, _vllm, _slow_tokenizer, _hub, _every_rank, _training, _hang),
    _exported,
)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_terminal_escape_codes_and_markup_reach_no_terminal(
    tmp_path: Path,
    monkeypatch: Patch,
    capfd: pytest.CaptureFixture[str],
    place: Callable[[Patch, Path], None],
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    place(monkeypatch, tmp_path)
    told = "".join(capfd.readouterr())
    assert [code for code in OBEYED if code in told] == []
    # what is wrapped, or one token a line, is there all the same
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[\s'│]", "", told)
    if place is not _example:
        assert "[/v2]" in plain
        assert ":smile:[bold]" in plain
        assert r"\u202e" in plain


def test_terminal_nothing_prints_in_another_way() -> None:
    """The linter names each bare print, each other console and each parser of rich's markup."""
    rules = ["--select", "T20,TID251", "--output-format", "concise"]
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", *rules, "."]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    configured = (ROOT / "pyproject.toml").read_text()
    for banned in ("rich.console.Console", "rich.text.Text.from_markup", "urllib.request"):
        assert f'"{banned}".msg' in configured


def test_terminal_half_a_surrogate_pair_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    from mcore_sft.base.terminal import printable, say

    assert printable("name\udcff\ud83d") == r"name\udcff\ud83d"
    say("name\udcff")
    assert capsys.readouterr().out == "name\\udcff\n"
