"""make's set-up, with Pythons that install nothing, and what setup.py builds."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution

ROOT = Path(__file__).parents[1]
PYTHONS = ("python3", "python3.13", "python3.12", "python3.11")
# One that is asked by make answers as another version, and as lying where it was called; pip notes
# what it was asked for, and from where the package was installed.
STAND_IN = """#!/bin/bash
place=$(cd "$(dirname "$0")/.." && pwd -P)
case "$*" in
-V) echo Python VERSION.0;;
"-m venv"*)
    mkdir -p "${@: -1}" && cd "${@: -1}" && mkdir -p bin && cp "$0" bin/python && touch bin/pip;;
*"-m ensurepip"*) touch "$place/bin/pip";;
*"-m pip --version") test -e "$place/bin/pip";;
*"-m pip"*)
    echo "${*: -2}" >>LOG
    [ "${@: -1}" != . ] || pwd >"$place/package";;
*)
    while [ "$1" != -c ]; do shift; done
    exec REAL -I -c "import sys
sys.version_info = (*map(int, 'VERSION'.split('.')), 0, 'final', 0)
sys.prefix = '$place'
sys.path.append('$(cat "$place/package" 2>/dev/null)' or '/none')
$2";;
esac
"""


class Clone:
    """A folder with this project's Makefile, and the Pythons that it finds there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "clone"
        self.programs = folder / "bin"
        self.log = folder / "log"
        self.programs.mkdir()
        for name in ("Makefile", "pyproject.toml", "setup.py", "requirements"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (self.folder).mkdir(exist_ok=True)
            copy(ROOT / name, self.folder / name)
        for name in ("csrc/a.cpp", "mcore_sft/__init__.py", "mcore_sft/_C.abi3.so"):
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).touch()
        self.have()

    def have(self, **versions: str) -> None:
        """The Pythons on PATH, such as `python3_12="3.12"`; the others are there and do not run."""
        for name in PYTHONS:
            version = versions.get(name.replace(".", "_"))
            text = "#!/bin/sh\nexit 127\n"
            if version:
                text = STAND_IN.replace("VERSION", version).replace("REAL", sys.executable)
            file = self.programs / name
            file.write_text(text.replace("LOG", str(self.log)))
            file.chmod(0o755)

    def make(self, *words: str, fails: bool = False, **variables: str) -> str:
        """What `make setup` says."""
        path = f"{self.programs}:{os.environ['PATH']}"
        # What a make that runs the tests says to those that it calls is not for these.
        own = ("PYTHON", "VENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
        kept = {k: v for k, v in os.environ.items() if k not in own}
        ran = subprocess.run(
            ["make", *(words or ("setup",))],
            cwd=self.folder,
            env=kept | {"PATH": path, "CXX": "true", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert bool(ran.returncode) == fails, ran.stdout
        return ran.stdout

    def installed(self) -> list[str]:
        """What pip was asked to install since this was asked last."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


ALL = ["-r requirements/torch.txt", "-r requirements/python3.12.txt", "-e ."]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    made = Clone(tmp_path)
    made.have(python3="3.12", python3_11="3.11")
    return made


def test_what_was_installed_is_not_installed_again(clone: Clone) -> None:
    assert "making .venv with python3\n" in clone.make()
    assert clone.installed() == ALL
    assert clone.make() == ""
    os.utime(clone.folder / "csrc" / "a.cpp", (2**32, 2**32))
    assert "building csrc" in clone.make()
    assert clone.installed() == ["-e ."]


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"python3": "3.13", "python3_12": "3.12"}, "python3"),
        ({"python3": "3.14", "python3_12": "3.12", "python3_11": "3.11"}, "python3.12"),
        ({"python3": "3.9", "python3_11": "3.11"}, "python3.11"),
        ({"python3_13": "3.13", "python3_12": "3.12"}, "python3.13"),
    ],
)
def test_the_newest_python_that_runs_is_taken(
    clone: Clone, there: dict[str, str], taken: str
) -> None:
    clone.have(**there)
    assert f"making .venv with {taken}\n" in clone.make()
    assert f"-r requirements/python{there[taken.replace('.', '_')]}.txt" in clone.installed()


def test_no_python_that_is_supported_is_told_with_what_was_found(clone: Clone) -> None:
    clone.have(python3="3.14")
    told = clone.make(fails=True)
    assert "python3: Python 3.14.0, python3.13: does not run, python3.12: does not run" in told
    assert "expected 3.11 to 3.13" in told
    assert "found python3.14: does not run" in clone.make("PYTHON=python3.14", "setup", fails=True)
    assert not (clone.folder / ".venv").exists()


def test_a_python_that_is_named_is_taken_and_one_that_is_not_named_stays(clone: Clone) -> None:
    clone.make()
    clone.installed()
    told = clone.make("PYTHON=python3.11", "setup")
    assert "remaking .venv: it has Python 3.12 and python3.11 is 3.11" in told
    assert "-r requirements/python3.11.txt" in clone.installed()
    assert clone.make() == ""
    assert clone.make("setup", PYTHON="python3.11") == ""
    # One that cannot be had costs nothing that is there.
    assert "error" in clone.make("PYTHON=python3.13", "setup", fails=True)
    assert clone.make() == ""
    # Another folder is another environment.
    assert "making .venv-3.12 with" in clone.make("VENV=.venv-3.12", "PYTHON=python3", "setup")
    assert clone.make() == ""


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_a_clone_that_was_copied_or_moved_gets_its_own(clone: Clone, how) -> None:
    clone.make()
    clone.installed()
    first = clone.folder
    clone.folder = how(first, first.with_name("other"))
    clone.folder = first.with_name("other")
    told = clone.make()
    assert f"remaking .venv: it was made as {first}/.venv 3.12 and is now {clone.folder}" in told
    assert clone.installed() == ALL
    assert clone.make() == ""


def test_a_python_that_is_gone_or_another_by_now(clone: Clone) -> None:
    clone.make()
    python = clone.folder / ".venv" / "bin" / "python"
    python.write_text(python.read_text().replace("3.12", "3.13"))
    assert f"3.12 and is now {clone.folder}/.venv 3.13" in clone.make()
    python.unlink()
    assert "and is now a Python that does not run" in clone.make()
    assert clone.make() == ""


@pytest.mark.parametrize("how", ["uninstalled", "of another folder", "without operators"])
def test_a_package_that_is_not_this_folder_s_is_installed_again(clone: Clone, how: str) -> None:
    clone.make()
    clone.installed()
    package = clone.folder / ".venv" / "package"
    if how == "uninstalled":
        package.unlink()
    elif how == "of another folder":
        other = shutil.copytree(clone.folder / "mcore_sft", clone.folder / "other" / "mcore_sft")
        package.write_text(str(other.parent))
    else:
        (clone.folder / "mcore_sft" / "_C.abi3.so").unlink()
    assert clone.make().startswith(
        "setup: reinstalling the package: .venv does not hold that of this"
    )
    assert clone.installed() == ["-e ."]
    (clone.folder / "mcore_sft" / "_C.abi3.so").touch()
    assert clone.make() == ""


def test_an_environment_of_another_tool_is_taken(clone: Clone) -> None:
    """uv's has no pip."""
    stand_in = clone.folder / ".venv" / "bin" / "python"
    stand_in.parent.mkdir(parents=True)
    shutil.copy(clone.programs / "python3.11", stand_in)
    assert "taking .venv as it is, with Python 3.11" in clone.make()
    assert (stand_in.parent / "pip").exists()
    assert clone.installed()[1] == "-r requirements/python3.11.txt"
    shutil.rmtree(clone.folder / ".venv" / ".stamps")
    assert "making .venv with python3\n" in clone.make("PYTHON=python3", "setup")


def test_the_compiler_is_looked_for_before_anything_is_installed(clone: Clone) -> None:
    told = clone.make("setup", CXX="no-such-compiler", fails=True)
    assert "error: no C++ compiler (looked for no-such-compiler)" in told
    assert clone.installed() == []


def test_a_program_that_fails_says_why_itself(clone: Clone) -> None:
    (clone.folder / ".venv").touch()  # such as a folder that cannot be made
    told = clone.make(fails=True)
    assert "mkdir: cannot create" in told
    assert "error: 'python3 -m venv --clear .venv' failed, and says why above" in told
    assert "python3-venv" not in told


def test_missing_cuda_operators_are_one_line(clone: Clone) -> None:
    (clone.folder / "mcore_sft" / "_C_cuda.reason").write_text("nvcc is of CUDA 12\n")
    assert clone.make().endswith("setup: the CUDA operators were not built: nvcc is of CUDA 12\n")


# More numbers for each of 2048 threads than a multiprocessor has registers.
SPILL = """
__global__ void __launch_bounds__(1024, 2) spill(float* x) {
  float kept[64], total = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) total += kept[i] = x[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = kept[i] * total;
}
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not there")
def test_registers_that_spill_fail_the_check(clone: Clone) -> None:
    clone.have(python3="{}.{}".format(*sys.version_info))  # it imports torch
    clone.make()
    source = clone.folder / "csrc" / "cuda" / "spill.cu"
    source.parent.mkdir()
    source.write_text(SPILL)
    assert "Registers are spilled" in clone.make("check-cuda", fails=True)


# ---- setup.py


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler(toolkit: Path, release: str, script: Path) -> str:
    """An nvcc of `toolkit`, and the script that starts it; the script."""
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\ncase "$1" in --version) echo "tools, release {release}, V1";; '
        f'*) echo "#$ TOP={nvcc.parent}/.." >&2;; esac\n'
    )
    script.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    for file in (nvcc, script):
        file.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("where", ["lib64", "targets/sbsa-linux/lib"])
def test_nvcc_is_asked_for_its_toolkit(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build.cpp_extension, "CUDA_HOME", None)
    toolkit = tmp_path / "cuda"
    script = compiler(toolkit, "13.2", tmp_path / "nvcc")
    with pytest.raises(build.NoCudaError, match=r"cuda has no libcudart\.so"):
        build.cuda_extension(script)
    libraries = toolkit.joinpath(where)
    libraries.mkdir(parents=True)
    (libraries / "libcudart.so").touch()
    extension = build.cuda_extension(script)
    assert str(toolkit) == build.cpp_extension.CUDA_HOME
    assert str(libraries) in extension.library_dirs
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(build.NoCudaError, match=r"is release 13\.2, torch is built for CUDA 12\.8"):
        build.cuda_extension(script)


def test_a_cuda_build_that_fails_costs_nothing_else_and_is_remembered(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    broken = True

    def compile_all(command: object) -> None:
        for one in command.extensions:
            if broken and one.name == build.CUDA:
                raise RuntimeError("Error compiling\nobjects")
            built.append(one.name)

    monkeypatch.setattr(build.cpp_extension.BuildExtension, "build_extensions", compile_all)

    def run() -> list[str]:
        names = ("mcore_sft._C", build.CUDA)
        extensions = [build.cpp_extension.CppExtension(name, []) for name in names]
        command = build.BuildOperators(Distribution({"ext_modules": extensions}))
        command.build_lib = str(tmp_path)
        command.ensure_finalized()
        command.run()
        return [one.name for one in command.extensions]

    (tmp_path / "mcore_sft").mkdir()
    old, reason = tmp_path / "mcore_sft" / "_C_cuda.abi3.so", tmp_path / "mcore_sft" / build.REASON
    old.touch()
    assert run() == built == ["mcore_sft._C"]
    assert reason.read_text().startswith("RuntimeError: Error compiling objects; `python setup.py")
    assert reason.read_text().count("\n") == 1
    assert not old.exists(), "it is of other sources"
    broken = False
    assert run() == ["mcore_sft._C", build.CUDA]
    assert not reason.exists()


def test_deleted_modules_do_not_get_into_a_wheel(build: ModuleType, tmp_path: Path) -> None:
    deleted = tmp_path / "lib" / "mcore_sft" / "deleted.py"
    deleted.parent.mkdir(parents=True)
    deleted.touch()
    command = build.BuildModules(Distribution({"py_modules": []}))
    command.build_lib = str(tmp_path / "lib")
    command.ensure_finalized()
    command.run()
    assert not deleted.exists()


def test_the_source_archive_has_all_that_building_and_testing_need(tmp_path: Path) -> None:
    command = ["setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
    ran = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=False)
    assert ran.returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    needed = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    needed += [*(ROOT / "requirements").iterdir(), *(ROOT / "tests" / "fixtures").rglob("*.json")]
    needed += [ROOT / "LICENSE", ROOT / "Makefile", ROOT / "tools" / "doctor.py"]
    assert {str(path.relative_to(ROOT)) for path in needed} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
