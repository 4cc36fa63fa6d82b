"""csrc/cuda compiled for the CPU, as operators of `torch.ops.mcore_sft_emulated` on CPU tensors.

cuda_on_cpu/ has what a GPU has: emulation.h says how. planted.cpp has kernels with defects.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCES = Path(__file__).parent / "cuda_on_cpu"
ROOT = Path(__file__).parents[2]
OPTIONS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden"]
OPTIONS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
OPTIONS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
ADDRESSES = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
BUILT = "MCORE_SFT_EMULATION"
"""Names a folder in which all is built already."""


def build(folder: Path, *, sanitized: bool = False) -> Path:
    """kernels.so and planted.so: their addresses are checked where `sanitized`, else the order of
    their loads and stores.
    """
    compiler = os.environ.get("CXX", "g++")
    headers = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    options = [*OPTIONS, f"-I{SOURCES}", f"-I{ROOT}", *headers]
    compiling = []
    for name in ("emulation", "planted", "kernels"):
        checks = ADDRESSES if sanitized else ["-fsanitize=thread"] * (name != "emulation")
        files = ["-c", str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{name}.o")]
        compiling.append(subprocess.Popen([compiler, *options, *checks, *files]))
    assert [one.wait() for one in compiling] == [0, 0, 0]
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    torch_libraries += ["-ltorch", "-ltorch_cpu", "-lc10"]
    for name, libraries in (("planted", []), ("kernels", torch_libraries)):
        objects = [str(folder / f"{part}.o") for part in ("emulation", name)]
        checks = ADDRESSES if sanitized else []
        link = [compiler, "-shared", *checks, *objects, "-o", str(folder / f"{name}.so")]
        subprocess.run([*link, *libraries], check=True)
    return folder


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """One of both libraries; the operators with "kernels"."""
    path = _folder() / f"{name}.so"
    if name == "kernels":
        torch.ops.load_library(path)
    loaded = ctypes.CDLL(str(path))
    loaded.set_machine.argtypes = [ctypes.c_int, ctypes.c_bool, ctypes.c_char]
    return loaded


@functools.cache
def _folder() -> Path:
    if BUILT in os.environ:
        return Path(os.environ[BUILT])
    _folder.until_the_end = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]
    return build(Path(_folder.until_the_end.name))  # type: ignore[attr-defined]


def set_machine(
    name: str = "kernels", *, capability: int = 9, backwards: bool = False, forgotten: str = ""
) -> None:
    """What a library's kernels run on from now: its compute capability, the order of its threads,
    and whose barriers ("blocks" or "clusters") put nothing in order.
    """
    load(name).set_machine(capability, backwards, forgotten[:1].encode() or b"\0")
