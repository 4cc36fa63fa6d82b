"""csrc/ in, mcore_sft/_C*.abi3.so out; everything else about the package is in pyproject.toml."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from torch.utils import cpp_extension

# The stable ABI of torch 2.11: one build serves every later version of torch and of Python.
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OPTIONS = ["-O3", "-std=c++20", "-fvisibility=hidden", ABI]
# Machine code for A100 and H100, and for later GPUs PTX. `make check-cuda` compiles with the same.
CUDA_OPTIONS = [
    *("-O3", "-std=c++20", "-DUSE_CUDA", ABI, "--threads=2"),
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]
CUDA = "mcore_sft._C_cuda"
# Beside the operators: why those for CUDA are not built, where that is no matter of course.
REASON = "_C_cuda.reason"

root = Path(__file__).parent


class NoCudaError(Exception):
    """The CUDA operators cannot be built; the message says why, in one line."""


class BuildOperators(cpp_extension.BuildExtension):
    """Builds the CPU operators, then those for CUDA, which may fail and cost nothing else."""

    reason = ""

    def run(self) -> None:
        super().run()
        folder = Path(self.get_ext_fullpath(CUDA)).parent
        (folder / REASON).unlink(missing_ok=True)
        if self.reason:
            print(f"the CUDA operators are not built: {self.reason}")
            (folder / REASON).write_text(f"{self.reason}\n", encoding="utf-8")
            for old in folder.glob("_C_cuda.*so"):
                old.unlink()

    def build_extensions(self) -> None:
        everything = self.extensions
        cuda = [one for one in everything if one.name == CUDA]
        self.extensions = [one for one in everything if one.name != CUDA]
        super().build_extensions()
        if not cuda:
            return
        try:
            others, self.extensions = self.extensions, cuda
            super().build_extensions()
            self.extensions = everything
        except Exception as error:
            self.extensions = others
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self.reason = f"{said}; `python setup.py build_ext --inplace` shows the rest"


class BuildModules(build_py):
    """Copies the modules into an empty folder: else a wheel gets those of earlier commits too."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME where that is set, else the one on PATH, else the usual one."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def ask(*command: str) -> str:
    """What a program prints."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines() or [str(error)]
        raise NoCudaError(f"{command[0]} fails: {said[-1]}") from None
    except OSError as error:
        raise NoCudaError(f"{command[0]} does not run: {error}") from None
    return ran.stdout + ran.stderr


def find_toolkit(nvcc: str) -> tuple[Path, Path]:
    """The folder of nvcc's toolkit, and that of libcudart in it.

    nvcc itself knows them: the one on PATH may be a script that starts another.
    """
    top = re.search(r"^#\$ TOP=(.*)$", ask(nvcc, "--dryrun", "none.cu"), re.MULTILINE)
    if top is None:
        raise NoCudaError(f"`{nvcc} --dryrun` names no toolkit (expected a line with TOP=)")
    toolkit = Path(top[1].strip()).resolve()
    places = [toolkit / "lib64", *sorted(toolkit.glob("targets/*/lib")), toolkit / "lib"]
    for place in places:
        if (place / "libcudart.so").exists():
            return toolkit, place
    raise NoCudaError(
        f"{toolkit} has no libcudart.so (looked in lib64, targets/*/lib and lib); install the "
        "CUDA runtime's development files there, or name another toolkit by CUDA_HOME"
    )


def cuda_extension(nvcc: str) -> Extension:
    """What computes the operators on CUDA tensors, for `nvcc`'s toolkit."""
    wanted = str(torch.version.cuda)
    release = re.search(r"release (\d+)\.\d+", ask(nvcc, "--version"))
    if release is None or release[1] != wanted.partition(".")[0]:
        found = release[0] if release else "of unknown release"
        raise NoCudaError(
            f"{nvcc} is {found}, torch is built for CUDA {wanted}; put an nvcc of the same CUDA on "
            "PATH, or name its toolkit by CUDA_HOME"
        )
    toolkit, libraries = find_toolkit(nvcc)
    cpp_extension.CUDA_HOME = str(toolkit)
    return cpp_extension.CUDAExtension(
        CUDA,
        sources("cuda/*.cu"),
        library_dirs=[str(libraries)],
        extra_compile_args={"cxx": OPTIONS, "nvcc": CUDA_OPTIONS},
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    """The CPU operators always; the CUDA ones where torch is a CUDA build and nvcc is there."""
    found = [
        cpp_extension.CppExtension(
            "mcore_sft._C",
            [*sources("*.cpp"), *sources("cpu/*.cpp")],
            extra_compile_args={"cxx": OPTIONS},
            py_limited_api=True,
        )
    ]
    try:
        if torch.version.cuda and sources("cuda/*.cu") and (nvcc := find_nvcc()):
            found.append(cuda_extension(nvcc))
    except NoCudaError as error:
        BuildOperators.reason = str(error)
    return found


def sources(pattern: str) -> list[str]:
    """Files of csrc/, relative to the root as setuptools wants them."""
    return [str(path.relative_to(root)) for path in sorted((root / "csrc").glob(pattern))]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildOperators, "build_py": BuildModules},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
