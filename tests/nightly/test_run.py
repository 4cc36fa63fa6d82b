"""A night of tiny runs: what is done, what is not done again, and what a failure says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file, save_file

from mcore_sft.checkpoint.sharded import POINTER
from mcore_sft.config import ConfigError
from nightly import commits, golden, work
from nightly.curve import METRICS, Curve
from nightly.history import Record
from nightly.run import LATEST, Run
from nightly.tier import Tier
from nightly.work import Crash
from tests import runs
from tests.nightly import sample

STEPS = 6


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment file whose dataset is there."""
    tree = {
        "name": "night",
        "model": {"path": str(model), "tokenizer": str(runs.FIXTURES / "tokenizer")},
        "data": {
            "root": str(runs.FIXTURES),
            "packed": str(model / "packed"),
            "train": [{"path": "rows.jsonl"}],
            "sequence_length": 512,
        },
        "train": {"steps": STEPS, "global_batch": 10, "precision": "fp32", "micro_batch": 2},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"every": 2},
        "evaluation": {"benchmarks": [{"name": "math"}, {"name": "math-500"}]},
    }
    file = tmp_path_factory.mktemp("night") / "night.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


class Commands:
    """Stands for the commands: training, the oracle and the rest leave what they would."""

    def __init__(self) -> None:
        self.run: list[str] = []
        self.spoiled: dict[str, int] = {}
        """Part of a training's folder -> the step from which its loss is wrong."""
        self.saves_after = 0
        """A training that is killed has a checkpoint when it is beyond this step."""

    def __call__(self, command: Sequence[str], log: Path, **_: Any) -> None:
        words = dict(word.split("=", 1) for word in command if "=" in word)
        if "mcore_sft/train.py" in command:
            self.train(Path(words["output"]), STEPS)
        elif "tests.oracle" in command:
            self.run.append("oracle")
            last = int(command[command.index("--steps") + 1]) if "--steps" in command else STEPS
            file = Path(command[command.index("--curve") + 1])
            curve(last).write(file)
        else:
            self.run.append(Path(command[1]).stem)
            if "tools/evaluate.py" in command:
                # each of several benchmarks would have a folder of its own
                assert command[command.index("--benchmark") + 1] == "math"
                folder = Path(command[command.index("--output") + 1])
                folder.mkdir()
                score = {"score": {"symbolic_correct": {"hits": 9, "total": 10}}}
                (folder / "report.json").write_text(json.dumps(score))

    def kill(self, command: Sequence[str], log: Path, when: Any, **_: Any) -> None:
        """A training that is killed as soon as it may be."""
        folder = next(Path(word.split("=", 1)[1]) for word in command if "output=" in word)
        for step in range(1, STEPS + 1):
            self.train(folder, step, told=False)
            if step > self.saves_after:
                (folder / LATEST).touch()
            if when():
                self.run.append(f"killed at {step}")
                return
        raise Crash("ended by itself, exit code 0")

    def train(self, folder: Path, steps: int, told: bool = True) -> None:
        """Metrics of a run, wrong where it is spoiled."""
        wrong = next((at for part, at in self.spoiled.items() if part in folder.name), STEPS + 1)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {
                "step": step,
                "loss": loss * (1.5 if step >= wrong else 1),
                "grad_norm": 1.0,
                "tokens_per_second": 200.0,
                "peak_memory_bytes": 2**30,
                "step_seconds": 0.5,
            }
            for step, loss in zip(range(1, steps + 1), curve(steps).loss, strict=True)
        ]
        (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if told:
            self.run.append(f"training {folder.name}")


def curve(steps: int) -> Curve:
    """What the oracle measures here."""
    return Curve(
        steps=tuple(range(1, steps + 1)),
        loss=tuple(4.0 / step for step in range(1, steps + 1)),
        grad_norm=(1.0,) * steps,
        tokens_per_second=(100.0,) * steps,
        validation={},
        peak_memory=2**30,
    )


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Nothing is really run."""
    fake = Commands()
    monkeypatch.setattr(work, "run", fake)
    monkeypatch.setattr(work, "run_and_kill", fake.kill)
    return fake


def night(tmp_path: Path, config: Path, earlier: Sequence[Record] = (), **changes: Any) -> Run:
    """A benchmark `short` of a tier of its own."""
    gates = {"loss": {STEPS: 1e-3}}
    told = {"name": "short", "config": str(config), "against": "plain", "gates": gates}
    told |= changes
    made = Tier.model_validate({"name": "tiny", "minutes": 5, "benchmarks": [told]})
    return Run(sample.night(made, tmp_path, 300, earlier), made.benchmarks[0])


def test_all_stages_run_once(tmp_path: Path, config: Path, commands: Commands) -> None:
    gates = {"loss": {STEPS: 1e-3}, "speed": 1.5, "resume": True, "accuracy": 0.8}
    run = night(tmp_path, config, evaluate=True, gates=gates)
    record = run.record()
    assert record.outcome == "passed", record
    killed = next(text for text in commands.run if "killed" in text)
    assert commands.run == [
        *("training run", "oracle", killed, "training resumed", "to_hf", "evaluate")
    ]
    assert 2 <= int(killed.split()[-1]) < STEPS
    assert record.figures["speed_ratio"] == 2.0
    assert record.figures["accuracy"] == 90.0
    assert record.commits is None
    assert (tmp_path / str(record.curve)).exists()
    assert (tmp_path / str(record.reference)).exists()
    assert night(tmp_path, config, evaluate=True, gates=gates).record() == record
    assert len(commands.run) == 6


def test_a_night_that_was_stopped_goes_on(
    tmp_path: Path, config: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "reference", stopped)
        with pytest.raises(KeyboardInterrupt):
            night(tmp_path, config).record()
    assert commands.run == ["training run"]
    spent = tmp_path / "tiny" / "abc" / "short" / "seconds.json"
    spent.write_text(json.dumps({"training": json.loads(spent.read_text())["training"] + 1000}))
    record = night(tmp_path, config).record()
    assert record.outcome == "passed"
    assert 1000 < record.figures["seconds"] < 1010
    assert commands.run == ["training run", "oracle"]


def test_what_crashes_is_recorded_and_tried_again(
    tmp_path: Path, config: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashed(*_: Any, **__: Any) -> None:
        raise Crash("torchrun, training.log:\nout of memory\nexit code 1")

    with monkeypatch.context() as patch:
        patch.setattr(work, "run", crashed)
        record = night(tmp_path, config).record()
    assert record.outcome == "crashed"
    assert "out of memory" in str(record.crash)
    assert record.curve is None
    assert night(tmp_path, config).record().outcome == "passed"


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyError("\udc80")])
def test_whatever_goes_wrong_is_recorded_with_where(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def crashed(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(work, "run", crashed)
    record = night(tmp_path, config).record()
    assert record.outcome == "crashed"
    assert "in crashed" in str(record.crash)
    assert str(record.crash).splitlines()[-1].startswith(type(error).__name__)
    assert str(record.crash).encode()


def test_what_is_half_written_is_not_taken_for_done(
    tmp_path: Path, config: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    run = night(tmp_path, config)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)  # between the last byte and the name
        with pytest.raises(KeyboardInterrupt):
            run.record()
    assert night(tmp_path, config).record().outcome == "passed"
    assert not list(run.folder.glob(".*"))


def test_a_departure_is_narrowed_to_the_layout(
    tmp_path: Path, config: Path, commands: Commands
) -> None:
    commands.spoiled = {"run": 3}
    changes = {"processes": 4, "overrides": ["parallel.pipeline=2", "train.precision=bf16"]}
    commands.spoiled |= {"narrowed_in_fp32": 3, "narrowed_without_data": 3}
    record = night(tmp_path, config, **changes).record()
    assert record.outcome == "failed"
    assert [finding.step for finding in record.findings if not finding.passed] == [3]
    assert record.narrowed == (
        "goes away in one process, without pipeline parallelism; stays in fp32, without data "
        "parallelism"
    )
    assert "killed at 5" in commands.run


def test_what_cannot_be_narrowed_says_so(tmp_path: Path, config: Path, commands: Commands) -> None:
    commands.spoiled = {"run": 1}
    record = night(tmp_path, config).record()
    assert record.narrowed == "it runs in one process and in fp32 already"


@pytest.mark.parametrize("outcome", ["failed", "crashed"])
def test_what_did_not_pass_says_since_which_commits(
    tmp_path: Path,
    config: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    outcome: str,
) -> None:
    asked = []
    monkeypatch.setattr(commits, "suspects", lambda *given: asked.append(given) or "these")
    commands.spoiled = {"run": 1} if outcome == "failed" else {}
    earlier = [sample.record(1, "short"), sample.record(2, "other")]
    changes = {} if outcome == "failed" else {"overrides": ["data.root={data}"]}
    record = night(tmp_path, config, earlier, **changes).record()
    assert (record.outcome, record.commits) == (outcome, "these")
    assert asked == [(earlier[:1], "abc", outcome)]


@pytest.mark.parametrize("first", range(1, STEPS + 1))
def test_a_departure_at_any_step_is_seen_when_it_is_narrowed(
    tmp_path: Path, config: Path, commands: Commands, first: int
) -> None:
    commands.spoiled = {"run": first, "narrowed": first}
    record = night(tmp_path, config, processes=2).record()
    assert str(record.narrowed) == "stays without data parallelism"


def test_what_failed_is_told_where_narrowing_crashes(
    tmp_path: Path, config: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashed(*_: Any, **__: Any) -> None:
        raise Crash("torchrun, training.log:\nexit code 1")

    commands.spoiled = {"run": 2}
    monkeypatch.setattr(work, "run_and_kill", crashed)
    record = night(tmp_path, config, processes=2).record()
    assert (record.outcome, record.findings[0].step) == ("failed", 2)
    assert str(record.narrowed) == "crashes without data parallelism (exit code 1)"


def test_narrowing_that_was_stopped_is_not_judged_by_its_half(
    tmp_path: Path, config: Path, commands: Commands
) -> None:
    commands.spoiled = {"run": 2}
    run = night(tmp_path, config, processes=2)
    commands.train(run.folder / "narrowed_without_data_parallelism", 1, told=False)
    assert run.record().narrowed == "goes away without data parallelism"


# ---- killed and started again


def test_the_name_of_the_newest_checkpoint_is_the_trainers() -> None:
    assert LATEST == POINTER


def test_a_run_is_killed_when_it_has_a_checkpoint(
    tmp_path: Path, config: Path, commands: Commands
) -> None:
    commands.saves_after = STEPS - 1
    run = night(tmp_path, config, against=None, gates={"resume": True})
    assert run.record().outcome == "passed"
    assert commands.run == ["training run", f"killed at {STEPS}", "training resumed"]


def test_a_run_that_was_stopped_before_it_was_killed_begins_anew(
    tmp_path: Path, config: Path, commands: Commands
) -> None:
    run = night(tmp_path, config, against=None, gates={"resume": True})
    commands.train(run.folder / "resumed", 1, told=False)
    run.record()
    assert "killed" in commands.run[1]


def test_a_run_that_saves_only_in_the_end_cannot_be_killed(
    tmp_path: Path, config: Path, commands: Commands
) -> None:
    changes = {"overrides": [f"checkpoint.every={STEPS}"], "gates": {"resume": True}}
    with pytest.raises(ConfigError, match=r"checkpoint\.every 6 of 6 steps; expected 1 to 5"):
        night(tmp_path, config, against=None, **changes).check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"overrides": ["train.step=5"]}, "unknown key train.step"),
        ({"processes": 3, "overrides": ["parallel.tensor=2"]}, "3 processes of benchmark short"),
        ({"evaluate": True, "overrides": ["evaluation.benchmarks=[]"]}, "evaluate needs"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(
    tmp_path: Path, config: Path, commands: Commands, changes: dict[str, Any], said: str
) -> None:
    run = night(tmp_path, config, **changes)
    with pytest.raises(ConfigError, match=said):
        run.check()
    assert run.record().outcome == "crashed"
    assert not commands.run


def test_a_benchmark_by_itself_runs_what_it_is_held_against(
    tmp_path: Path, config: Path, commands: Commands
) -> None:
    run = night(tmp_path, config, against=None, gates={})
    told = run.benchmark.model_dump() | {
        "name": "other",
        "against": "short",
        "gates": {"loss": {STEPS: 1e-3}},
    }
    tree = run.night.tier.model_dump() | {"benchmarks": [run.benchmark.model_dump(), told]}
    tier = Tier.model_validate(tree)
    here = replace(run.night, tier=tier)
    assert Run(here, tier.benchmark("other")).record().outcome == "passed"
    assert commands.run == ["training run", "training run"]
    assert Run(here, tier.benchmark("short")).record().outcome == "passed"
    assert len(commands.run) == 2


def test_inputs_that_are_half_made_are_made_anew(tmp_path: Path, config: Path) -> None:
    run = night(tmp_path, config)
    tier = run.night.tier.model_validate(
        {
            "name": "tiny",
            "minutes": 5,
            "inputs": {"rows": {"commands": ["mkdir {work}/text", "cp -r {data} {work}/text"]}},
            "benchmarks": [run.benchmark.model_dump() | {"inputs": "rows"}],
        }
    )
    data = tmp_path / "the data"
    data.mkdir()
    run = Run(replace(run.night, tier=tier, data=data), tier.benchmarks[0])
    (run.work / "text").mkdir(parents=True)
    run.inputs()
    assert (run.work / "made").exists()
    assert (run.work / "text" / "the data").exists()


def test_data_that_is_not_given_is_a_sentence(
    tmp_path: Path, config: Path, commands: Commands
) -> None:
    record = night(tmp_path, config, overrides=["data.root={data}"]).record()
    assert record.outcome == "crashed"
    assert "needs --data" in str(record.crash)


# ---- golden curves


def test_a_golden_is_kept_with_what_made_it(
    tmp_path: Path, config: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "FOLDER", tmp_path / "golden")
    assert misfit(night(tmp_path / "0", config, against="golden")).endswith(
        "short.json is not there; python tools/nightly.py --tier tiny --golden short --reason TEXT "
        "makes it"
    )
    file = night(tmp_path / "1", config, against="golden").keep_golden("the first")
    assert json.loads(file.read_text())["reason"] == "the first"
    assert night(tmp_path / "2", config, against="golden").record().outcome == "passed"
    other = night(tmp_path / "3", config, against="golden", overrides=["optimizer.lr=1e-3"])
    assert "another optimizer.lr (0.0001) than this run has (0.001)" in misfit(other)
    more = night(tmp_path / "4", config, against="golden", overrides=["train.global_batch=20"])
    assert "another packs of a step" in misfit(more)


def misfit(run: Run) -> str:
    """What a run that failed says of its golden curve."""
    record = run.record()
    assert record.outcome == "failed"
    assert record.figures["final_loss"] > 0
    first, *others = record.findings
    assert [first.gate, *(x.gate for x in others)] == ["golden", "loss"]
    assert not any(x.passed for x in record.findings)
    return first.sentence


@pytest.mark.parametrize("part", ["weights", "norm"])
def test_a_golden_knows_every_weight_and_the_models_configuration(
    tmp_path: Path, model: Path, config: Path, part: str
) -> None:
    other = tmp_path / "model"
    shutil.copytree(model, other)
    if part == "norm":
        said = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(said | {"rms_norm_eps": 1e-3}))
    else:
        file = other / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1e-3  # not of its first row
        save_file(weights, file, {"format": "pt"})
    before, after = (
        night(tmp_path, config, overrides=[f"model.path={folder}"]).made_from()
        for folder in (model, other)
    )
    changed = {"weights": "base weights", "norm": "model.norm_eps"}[part]
    assert [name for name in before if before[name] != after[name]] == [changed]


# ---- commands


def test_a_command_that_fails_says_its_last_lines(tmp_path: Path) -> None:
    program = "print('first'); raise SystemExit('no room')"
    with pytest.raises(Crash, match=r"no room\nexit code 1"):
        work.run(["python", "-c", program], tmp_path / "log", threads=1, until=1e18)


def test_of_a_command_that_says_much_the_end_is_told(tmp_path: Path) -> None:
    program = "for i in range(5000): print(i, 'x' * 1000)\nraise SystemExit('no room')"
    with pytest.raises(Crash) as caught:
        work.run(["python", "-c", program], tmp_path / "log", threads=1, until=1e18)
    told = str(caught.value).splitlines()
    assert told[1].startswith("4981 xxx")
    assert told[-2:] == ["no room", "exit code 1"]
    assert len(told) == 22
    assert len(str(caught.value)) < 12_000


@pytest.mark.parametrize("how", ["late", "killed"])
def test_a_command_ends_with_all_that_it_has_started(tmp_path: Path, how: str) -> None:
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "time.sleep(60)"
    )
    command = ["python", "-c", program]
    if how == "killed":
        there = lambda: mark.exists() and mark.read_text() != ""  # noqa: E731
        work.run_and_kill(command, tmp_path / "log", there, threads=1, until=1e18)
    else:
        with pytest.raises(Crash, match="no end within the time of the tier"):
            work.run(command, tmp_path / "log", threads=1, until=time.monotonic() + 3)
    assert not psutil.pid_exists(int(mark.read_text()))


@pytest.mark.parametrize("session", [False, True], ids=["its group", "another"])
def test_a_command_that_is_killed_leaves_nothing(tmp_path: Path, session: bool) -> None:
    mark = tmp_path / "pid"
    program = (
        "import os, signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
        f"start_new_session={session})\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with pytest.raises(Crash, match="exit code -9"):
        work.run(["python", "-c", program], tmp_path / "log", threads=1, until=1e18)
    assert ended(int(mark.read_text()))


def test_a_command_ends_when_the_night_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    program = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    night = (
        "from pathlib import Path\nfrom nightly import work\n"
        f"work.run(['python', '-c', {program!r}], Path({str(tmp_path / 'log')!r}), threads=1, "
        "until=1e18)"
    )
    with subprocess.Popen([sys.executable, "-c", night]) as process:
        while not (mark.exists() and mark.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert ended(int(mark.read_text()))


def test_what_a_killed_night_has_left_is_ended(tmp_path: Path) -> None:
    beside = Path(f"{tmp_path}_beside")
    programs = [
        subprocess.Popen(["sleep", "60"], env=os.environ | {work.MARK: str(folder)})
        for folder in (tmp_path / "short", beside)
    ]
    try:
        work.end_all_of(tmp_path)
        assert [psutil.pid_exists(program.pid) for program in programs] == [False, True]
    finally:
        for program in programs:
            program.kill()
            program.wait()


def ended(pid: int) -> bool:
    """Whether it ends within some seconds; one that nobody has waited for has ended."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.slow
def test_a_real_night(tmp_path: Path, config: Path) -> None:
    gates = {"loss": {1: 1e-6, STEPS: 1e-4}, "grad_norm": {STEPS: 1e-3}, "resume": True}
    changes = {"processes": 2, "overrides": ["parallel.pipeline=2"], "gates": gates}
    record = night(tmp_path, config, **changes).record()
    assert record.outcome == "passed", record
