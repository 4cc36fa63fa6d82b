"""csrc/ in, mcore_sft/_C.abi3.so out; everything else about the package is in pyproject.toml."""

from pathlib import Path
from shutil import which

from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# The stable ABI of torch 2.11: one build serves every later version of torch and of Python.
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OPTIONS = ["-O3", "-std=c++20", "-fvisibility=hidden", ABI]

root = Path(__file__).parent


def sources(pattern: str) -> list[str]:
    """Files of csrc/, relative to the root as setuptools wants them."""
    return [str(path.relative_to(root)) for path in sorted((root / "csrc").glob(pattern))]


def extension() -> Extension:
    """The CPU operators always; the CUDA ones where there are some and nvcc is at hand."""
    cpp = [*sources("*.cpp"), *sources("cpu/*.cpp")]
    cuda = sources("cuda/*.cu") if CUDA_HOME and which("nvcc", path=f"{CUDA_HOME}/bin") else []
    kind = CUDAExtension if cuda else CppExtension
    flags = {"cxx": OPTIONS, "nvcc": ["-O3", "-std=c++20", ABI]} if cuda else {"cxx": OPTIONS}
    return kind("mcore_sft._C", [*cpp, *cuda], extra_compile_args=flags, py_limited_api=True)


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
