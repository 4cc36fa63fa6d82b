"""The report of a GPU machine, by parts that do what parts do there."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import carry_wheels
import gpu_report
import psutil
import pytest
from gpu_report import Part

ROOT = Path(__file__).parents[2]
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


def test_a_report_that_is_ended_ends_what_it_runs(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.append({str(ROOT / 'tools')!r}); import gpu_report\n"
        "sleep = ('sh', '-c', 'echo $$; exec sleep 60')\n"
        "only = gpu_report.Part(name='ops', command=sleep, minutes=5)\n"
        "gpu_report.parts = lambda *_, **__: [only]\n"
        f"sys.argv[1:] = ['--device', 'cpu', '--out', {str(tmp_path)!r}]\n"
        "gpu_report.main()"
    )
    command = [sys.executable, "-u", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as report:
        assert report.stdout is not None
        pid = next(int(line) for line in report.stdout if line.strip().isdigit())
        report.terminate()
        report.wait(20)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


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


def test_all_parts_are_known_and_nothing_is_asked_of_a_network(tmp_path: Path) -> None:
    whole = gpu_report.parts(tmp_path, tmp_path, quick=False)
    names = [one.name for one in whole]
    assert names[:5] == ["kit", "doctor", "engine", "ops", "test_gpu"]
    assert names[5:] == ["head", "loss", "layers", "train", "loss_peers", "step_peers"]
    assert gpu_report.parts(None, tmp_path, quick=False)[0].command == ("make", "setup")
    for one in whole[1:]:
        rooms = ("tests", "tools/", "benchmarks/")
        places = [word for word in one.command if word.startswith(rooms)]
        assert places
        assert all((gpu_report.ROOT / place).exists() for place in places)
        assert one.writes is None or one.command[-1] == str(one.writes)


def test_no_test_of_a_gpu_is_left_out(tmp_path: Path) -> None:
    asked = {word for one in gpu_report.parts(None, tmp_path, quick=True) for word in one.command}
    marked = [file for file in (ROOT / "tests").rglob("*.py") if "pytest.mark.gpu" in marks(file)]
    assert marked
    for file in marked:
        place = file.relative_to(ROOT)
        assert {str(place), str(place.parent)} & asked, f"no part runs {place}"


def marks(file: Path) -> set[str]:
    """The marks that a test file names, in its code alone."""
    tree = ast.parse(file.read_text())
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_a_quick_visit_is_shorter_part_by_part(tmp_path: Path) -> None:
    whole = gpu_report.parts(tmp_path, tmp_path, quick=False)
    quick = gpu_report.parts(tmp_path, tmp_path, quick=True)
    assert [one.name for one in quick] == [one.name for one in whole]
    for ours, theirs in zip(quick[1:], whole[1:], strict=True):
        assert ours.minutes < theirs.minutes
    # What is asked first has had its time before the peers begin.
    first = quick[: [one.name for one in quick].index("loss_peers")]
    assert sum(one.minutes for one in first) < 18
    assert all(one.minutes <= 3 for one in quick)


@pytest.mark.parametrize(("device", "of"), [("cuda", "cuda"), ("cpu", "cpu"), ("emulated", "cpu")])
def test_a_rehearsal_measures_on_the_cpu(tmp_path: Path, device: str, of: str) -> None:
    for one in gpu_report.parts(None, tmp_path, device=device, quick=True):
        if "--device" in one.command:
            assert one.command[one.command.index("--device") + 1] == of


def test_a_rehearsal_with_kernels_of_ours_runs_all_that_a_gpu_does(tmp_path: Path) -> None:
    real, ours = (
        {one.name: one for one in gpu_report.parts(None, tmp_path, device=device, quick=True)}
        for device in ("cuda", "emulated")
    )
    assert list(ours) == ["setup", "emulation", *list(real)[1:]]
    for name, one in ours.items():
        assert name not in real or one.minutes >= real[name].minutes
        if "pytest" in one.command:
            assert {"not slow and not gpu", "te or gpu"} & set(one.command)
        elif {"benchmarks/train_step.py", "benchmarks/converge.py"} & set(one.command):
            assert one.command[1:3] == ("-m", "tests.te")


def test_what_a_part_prints_is_kept_as_it_comes(tmp_path: Path) -> None:
    """So that a visit that is cut short keeps the lines of the part that it was in."""
    log = tmp_path / "log"
    program = (
        "import time; from pathlib import Path; print('first', flush=True)\n"
        f"while 'first' not in Path({str(log)!r}).read_text(): time.sleep(0.01)\n"
        f"print({str(gpu_report.ROOT / 'tools')!r})"
    )
    assert gpu_report.run(part("told", program), log).passed
    assert gpu_report.run(part("next", "print('second')"), log).passed
    told = log.read_text()
    assert told.index("first") < told.index("tools") < told.index("== told: passed")
    assert told.index("== told: passed") < told.index("second")
    assert str(gpu_report.ROOT) not in told


def run(*words: str, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/gpu_report.py", *words]
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        command, cwd=gpu_report.ROOT, env=environment, capture_output=True, text=True, check=False
    )


ISOLATED = ("unshare", "--map-root-user", "--net")


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*ISOLATED, "true"], check=False).returncode != 0,
    reason="no network namespace can be made here",
)
def test_where_there_is_no_network_processes_of_the_machine_meet() -> None:
    program = (
        f"import socket, sys; sys.path.append({str(ROOT / 'tools')!r}); import gpu_report\n"
        "gpu_report.open_loopback()\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname(), timeout=5)\n"
    )
    subprocess.run([*ISOLATED, sys.executable, "-c", program], check=True)


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
    assert "--parts losses: expected some of setup, doctor, engine, ops" in done.stderr


def test_parts_without_an_environment_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "VENV", tmp_path / ".venv")
    monkeypatch.setattr("sys.argv", ["gpu_report", "--device", "cpu", "--parts", "ops"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "--parts ops: there is no .venv; ask for setup too" in capsys.readouterr().err


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
    piece.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
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
    for python, core, engine in (("3.11", "0.16.1", "2.11.0"), ("3.13", "0.19.2", "2.20.2")):
        pins = carry_wheels.pinned(python)
        assert not [name for name in pins if name.startswith(("torch", "nvidia", "triton", "mypy"))]
        assert (pins["megatron-core"], pins["pytest-timeout"]) == (core, "2.4.0")
        for part_of_it in ("", "-cu13", "-torch"):
            assert pins[f"transformer-engine{part_of_it}"] == engine
    with pytest.raises(carry_wheels.CarryError, match=r"Python 3\.10: nothing pins"):
        carry_wheels.pinned("3.10")


def test_what_the_machine_has_is_left_out_where_we_run_with_it(tmp_path: Path) -> None:
    freeze = tmp_path / "freeze"
    freeze.write_text("transformers==4.57.1\nNumPy==2.5.2\nrich # no version\nregex==1\n\n")
    there = carry_wheels.read_freeze(freeze)
    assert there == {"transformers": "4.57.1", "numpy": "2.5.2", "rich": None, "regex": "1"}
    pins = carry_wheels.pinned("3.12")
    assert pins.keys() - carry_wheels.lacking(pins, there, "3.12").keys() == {
        *("numpy", "rich"),
        "regex",  # nobody but the machine's own packages asks for a version
    }
    megatron = {"megatron-core": "0.16.1"}
    assert "megatron-core" in carry_wheels.lacking(pins, megatron, "3.12")
    assert "megatron-core" not in carry_wheels.lacking(pins, megatron, "3.11")


def test_a_library_that_cannot_be_cut_is_named(tmp_path: Path) -> None:
    library = tmp_path / carry_wheels.CORE
    library.write_bytes(b"\x7fELF\x02\x01" + bytes(90))
    with pytest.raises(carry_wheels.CarryError, match=r"to architecture 90: .*--architecture 0"):
        carry_wheels.cut_library(library, 90)


@pytest.mark.parametrize(
    ("environment", "trouble"),
    [
        ("", "does not run"),
        ("exit 1", "has no torch"),
        ('echo \'{"torch": "2.11.0", "cuda": null}\'', "is a CPU build"),
    ],
)
def test_an_environment_without_the_machine_s_torch_is_refused(
    tmp_path: Path, environment: str, trouble: str
) -> None:
    python = tmp_path / "python"
    if environment:
        python.write_text(f"#!/bin/sh\necho 'no torch' >&2\n{environment}\n")
        python.chmod(0o755)
    with pytest.raises(carry_wheels.CarryError, match=f"{trouble}.*torch==VERSION"):
        carry_wheels.ask(python)


def test_the_extension_is_built_with_the_toolkit_that_nvcc_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nvcc on PATH is a script, nothing else finds it."""
    toolkit = tmp_path / "cuda"
    write(toolkit, {"lib64/libcudart.so": ""})
    nvcc = tmp_path / "bin" / "nvcc"
    write(nvcc.parent, {nvcc.name: f"#!/bin/sh\necho '#$ TOP={toolkit}' >&2\n"})
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    found = carry_wheels.building(Path(sys.executable))
    assert found["CUDA_HOME"] == str(toolkit)
    (toolkit / "lib64" / "libcudart.so").unlink()
    with pytest.raises(carry_wheels.CarryError, match=r"has no libcudart\.so"):
        carry_wheels.building(Path(sys.executable))


# ---- what is made of it there


@dataclass(frozen=True)
class Visit:
    """A clone on a machine whose Python has a torch of its own, and a kit that was carried."""

    clone: Path
    kit: Path
    machine: Path

    def install(self) -> subprocess.CompletedProcess[str]:
        """As the first part of the report does, by this Python."""
        program = f"""
import sys
import sysconfig
from pathlib import Path
sys.path = [place for place in sys.path if "site-packages" not in place]
sys.path += [{str(self.machine)!r}, {str(ROOT / "tools")!r}, {str(ROOT)!r}]
import gpu_report
# Debian's Python has a scheme of its own, whose folders are not those of an environment.
sysconfig.get_path.__defaults__ = ("posix_home", None, True)
gpu_report.ROOT = Path({str(self.clone)!r})
gpu_report.VENV = gpu_report.ROOT / ".venv"
gpu_report.PYTHON = str(gpu_report.VENV / "bin" / "python")
gpu_report.install(Path({str(self.kit)!r}))
"""
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=False
        )

    def python(self, program: str) -> str:
        """What a program prints in the environment that was made."""
        command = [self.clone / ".venv" / "bin" / "python", "-P", "-c", program]
        ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        return ran.stdout.strip()


def environment() -> dict[str, str]:
    """Ours, from which no package comes."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def write(folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


LOADER = "from pathlib import Path\n" + "".join(
    f"def {name}(): assert Path(__file__).parents[1].joinpath('{file}').exists(), '{file}'\n"
    for name, file in (("load", "_C.abi3.so"), ("load_cuda", "_C_cuda.abi3.so"))
)
SETUP = (
    "from pathlib import Path\n"
    "for name in ('_C', '_C_cuda'): Path('mcore_sft', name + '.abi3.so').write_text('built')\n"
)


@pytest.fixture
def visit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Visit:
    clone, machine = tmp_path / "clone", tmp_path / "machine" / "site-packages"
    write(clone, {"setup.py": SETUP, "csrc/cuda/kernel.cu": "of this commit"})
    write(clone / "mcore_sft", {"__init__.py": "", "ops/__init__.py": "", "ops/library.py": LOADER})
    write(
        machine,
        {
            "torch.py": "class version: cuda = '13.0'\n__version__ = '2.11.0+cu130'",
            "both.py": "of = 'machine'",
            "nvidia/cudnn/lib/libcudnn.so.9": "",
        },
    )
    monkeypatch.setattr(gpu_report, "ROOT", clone)
    made, kit = tmp_path / "made", tmp_path / "kit"
    kit.mkdir()
    about = {
        "python": "{}.{}".format(*sys.version_info[:2]),
        **{"torch": "2.11.0", "cuda": "13.0", "architectures": [90], "commit": "abc"},
        "sources": gpu_report.sources(),
    }
    write(made / "site", {"both.py": "of = 'kit'", "a-1.dist-info/METADATA": "Name: a\nVersion: 1"})
    write(made, {"kit.json": json.dumps(about)})
    write(made / "operators", {"_C.abi3.so": "carried", "_C_cuda.abi3.so": "carried"})
    whole = carry_wheels.pack(made)
    (kit / gpu_report.SUMS).write_text(carry_wheels.checksums([whole]))
    carry_wheels.cut([whole], kit, None)
    return Visit(clone, kit, machine)


def test_a_kit_becomes_the_environment_that_make_takes(visit: Visit) -> None:
    done = visit.install()
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded\n")
    told = visit.python(
        "import both, torch, mcore_sft, sysconfig; from importlib.metadata import version\n"
        "print(both.of, torch.__version__, version('a'), mcore_sft.__file__)"
    )
    file = visit.clone / "mcore_sft" / "__init__.py"
    assert told == f"kit 2.11.0+cu130 1 {file}"
    assert (visit.clone / "mcore_sft" / "_C_cuda.abi3.so").read_text() == "carried"
    stamps = visit.clone / ".venv" / ".stamps"
    assert {stamp.name for stamp in stamps.iterdir()} == {"venv", "torch", "pins", "package"}


def test_the_libraries_of_torch_lie_where_transformer_engine_looks(visit: Visit) -> None:
    assert visit.install().returncode == 0
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    beside = Path(visit.python(program), "nvidia", "cudnn", "lib", "libcudnn.so.9")
    assert beside.exists()


def test_operators_of_other_sources_are_built_there(visit: Visit) -> None:
    (visit.clone / "csrc" / "cuda" / "kernel.cu").write_text("of a later commit")
    done = visit.install()
    assert done.returncode == 0, done.stderr
    assert "building the operators here" in done.stdout
    assert (visit.clone / "mcore_sft" / "_C_cuda.abi3.so").read_text() == "built"


def test_a_kit_for_another_torch_is_refused(visit: Visit) -> None:
    (visit.machine / "torch.py").write_text(
        "class version: cuda = '13.0'\n__version__ = '2.14.1+cu130'"
    )
    done = visit.install()
    assert done.returncode == 1
    assert "'torch': '2.11.0'" in done.stderr
    assert "this machine has" in done.stderr
    assert "'torch': '2.14.1'" in done.stderr


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_report.commit() == "unknown"
