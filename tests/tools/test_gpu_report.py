"""The report of a GPU machine, by parts that do what parts do there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import carry_wheels
import gpu_report
import pytest
from gpu_report import Part

WHERE = {"device": "NVIDIA H100 80GB HBM3", "driver": "580.1"}


def part(name: str, program: str, minutes: float = 1, writes: Path | None = None) -> Part:
    command = (sys.executable, "-c", program)
    return Part(name=name, command=command, minutes=minutes, writes=writes)


def test_what_fails_crashes_or_hangs_is_told_and_the_rest_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mark, file = tmp_path / "mark", tmp_path / "rows.json"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    wanted = [
        part("setup", "import sys; print('no such wheel'); sys.exit(3)"),
        part("crash", "import os; print('before', flush=True); os.abort()"),
        part(
            "hang",
            "import subprocess, sys, time\n"
            f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
            "print('waiting', flush=True)\ntime.sleep(60)",
            minutes=1 / 60,
        ),
        part("fine", f"print('done'); open({str(file)!r}, 'w').write('[1, 2]')", writes=file),
    ]
    assert gpu_report.make_report(wanted, WHERE, tmp_path) == 1
    told = capfd.readouterr().out
    assert "FAILED: setup (exit code 3), crash (signal 6), hang (no end within 0.0166667" in told
    found = json.loads((tmp_path / "nvidia_h100_80gb_hbm3.json").read_text())
    assert found["driver"] == "580.1"
    assert [one["ended"] == "passed" for one in found["parts"].values()] == [*[False] * 3, True]
    assert found["parts"]["setup"]["last_lines"] == ["no such wheel"]
    assert found["parts"]["hang"]["last_lines"] == ["waiting"]
    assert found["parts"]["fine"]["result"] == [1, 2]
    assert sys.executable not in json.dumps(found)
    text = (tmp_path / "nvidia_h100_80gb_hbm3.md").read_text()
    assert "| crash | signal 6 |" in text
    assert "## fine\n\n```\ndone\n```" in text
    time.sleep(3)
    assert not mark.exists(), "what a part that hangs has started must end with it"


@pytest.mark.parametrize(
    ("then", "ended"), [("", "passed"), ("time.sleep(60)", "no end within 0.0666667 min")]
)
def test_what_has_left_the_part_does_not_hold_it_open(then: str, ended: str) -> None:
    program = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'],"
        f" start_new_session=True)\nprint('started', flush=True)\n{then}"
    )
    begun = time.monotonic()
    outcome = gpu_report.run(part("leaves", program, minutes=4 / 60))
    assert time.monotonic() - begun < 15
    assert (outcome.ended, outcome.last_lines) == (ended, ["started"])


def test_parts_that_are_not_asked_for_keep_their_outcome(tmp_path: Path) -> None:
    assert gpu_report.make_report([part("tests", "print(1)")], WHERE, tmp_path) == 0
    assert gpu_report.make_report([part("loss", "1/0")], WHERE, tmp_path) == 1
    assert gpu_report.make_report([part("loss", "print(2)")], WHERE, tmp_path) == 0
    parts = json.loads((tmp_path / "nvidia_h100_80gb_hbm3.json").read_text())["parts"]
    assert {name: found["ended"] for name, found in parts.items()} == {
        "tests": "passed",
        "loss": "passed",
    }


def test_all_parts_are_known_and_run_without_a_network(tmp_path: Path) -> None:
    names = [one.name for one in gpu_report.parts(tmp_path, tmp_path)]
    assert names[:3] == ["packages", "operators", "transformer_engine"]
    assert names[3:] == ["doctor", "tests", "loss", "train_step"]
    assert gpu_report.parts(None, tmp_path)[0].command == ("make", "setup")
    for one in gpu_report.parts(None, tmp_path):
        assert one.command[0] == "make" or (gpu_report.ROOT / one.command[1]).exists()


def run(*words: str, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/gpu_report.py", *words]
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        command, cwd=gpu_report.ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_a_machine_without_a_gpu_is_told_in_one_sentence(tmp_path: Path) -> None:
    done = run(path=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: nvidia-smi names no GPU")
    assert done.stderr.count("\n") == 1


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA Fake, 80 GiB, 1.2'\n")
    fake.chmod(0o755)
    done = run("--parts", "losses", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "--parts losses: expected some of setup, doctor, tests, loss" in done.stderr


# ---- what is carried


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    """Three files in folders of at most 150 kB, the second cut in pieces."""
    made, folder = tmp_path / "made", tmp_path / "carried"
    made.mkdir()
    folder.mkdir()
    for name, size in (("a.whl", 40_000), ("b.whl", 300_000), ("c.tar.gz", 10)):
        (made / name).write_bytes(os.urandom(size))
    files = sorted(made.iterdir())
    sums = carry_wheels.checksums(files)
    groups = carry_wheels.cut(files, folder, 150_000)
    (groups[0] / gpu_report.SUMS).write_text(sums)
    return folder


def test_what_is_cut_is_joined_again(carried: Path, tmp_path: Path) -> None:
    sizes = [sum(f.stat().st_size for f in group.iterdir()) for group in carried.iterdir()]
    assert len(sizes) > 2
    assert max(sizes) <= 150_000
    with gpu_report.carried_files(carried) as files:
        assert [file.name for file in files] == ["a.whl", "b.whl", "c.tar.gz"]
        for file in files:
            assert file.read_bytes() == (tmp_path / "made" / file.name).read_bytes()


@pytest.mark.parametrize("damage", ["lost", "cut", "changed"])
def test_what_did_not_arrive_whole_is_named(carried: Path, damage: str) -> None:
    piece = next(carried.rglob("b.whl.piece001"))
    content = piece.read_bytes()
    piece.write_bytes(content[:-1] if damage == "cut" else b"x" + content[1:])
    if damage == "lost":
        piece.unlink()
    with (
        pytest.raises(SystemExit, match=r"b\.whl in .* is missing, cut short or damaged"),
        gpu_report.carried_files(carried),
    ):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no SHA256SUMS"), gpu_report.carried_files(tmp_path):
        pass


def test_torch_stays_the_machine_s_own() -> None:
    for python, core in (("3.11", "megatron-core==0.16.1"), ("3.13", "megatron-core==0.19.2")):
        wheels, sources = carry_wheels.wanted(python)
        assert not [
            pin for pin in wheels if pin.startswith(("torch==", "nvidia", "triton", "mypy"))
        ]
        assert {core, "pytest-timeout==2.4.0", "einops==0.8.2"} <= set(wheels)
        assert [pin.partition("==")[0] for pin in sources] == ["transformer-engine-torch"]
    with pytest.raises(carry_wheels.CarryError, match=r"--python 3\.10: nothing pins"):
        carry_wheels.wanted("3.10")


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_report.commit() == "unknown"
