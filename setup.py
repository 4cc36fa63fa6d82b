"""csrc/ in, mcore_sft/_C*.abi3.so out; everything else about the package is in pyproject.toml."""

from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# The stable ABI of torch 2.11: one build serves every later version of torch and of Python.
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OPTIONS = ["-O3", "-std=c++20", "-fvisibility=hidden", ABI]
# Machine code for A100 and H100, and for later GPUs PTX. `make check-cuda` compiles with the same.
CUDA_OPTIONS = [
    *("-O3", "-std=c++20", "-DUSE_CUDA", ABI, "--threads=2"),
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]

root = Path(__file__).parent


def sources(pattern: str) -> list[str]:
    """Files of csrc/, relative to the root as setuptools wants them."""
    return [str(path.relative_to(root)) for path in sorted((root / "csrc").glob(pattern))]


def extensions() -> list[Extension]:
    """The CPU operators always; the CUDA ones where torch is a CUDA build and nvcc is there."""
    cpu = CppExtension(
        "mcore_sft._C",
        [*sources("*.cpp"), *sources("cpu/*.cpp")],
        extra_compile_args={"cxx": OPTIONS},
        py_limited_api=True,
    )
    cuda_sources = sources("cuda/*.cu")
    nvcc = CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc").exists()
    if not (torch.version.cuda and nvcc and cuda_sources):
        return [cpu]
    cuda = CUDAExtension(
        "mcore_sft._C_cuda",
        cuda_sources,
        extra_compile_args={"cxx": OPTIONS, "nvcc": CUDA_OPTIONS},
        py_limited_api=True,
    )
    return [cpu, cuda]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
