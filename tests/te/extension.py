"""The module `transformer_engine_torch`, which is C++ and CUDA on a GPU.

kernels of this package + what TE's Python asks for -> the module

A name that TE's Python asks for is a kernel, an enum of the members that its files name, or a
refusal that says what is missing here.
"""

import enum
import functools
import re
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import torch

NAME = "transformer_engine_torch"
CALLS: Counter[str] = Counter()
"""How often each kernel was called in this process, and what else tests ask for."""
Function = TypeVar("Function", bound=Callable[..., Any])

# The members whose numbers TE's Python uses as such; all others are numbered as they come.
_NUMBERS = {
    **{"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6},
    **{"kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10},
    **{"GEMM1_INPUT": 0, "GEMM1_WEIGHT": 1, "GEMM1_OUTPUT": 2, "GEMM2_INPUT": 3},
    **{"GEMM2_WEIGHT": 4, "GEMM2_OUTPUT": 5, "GEMM3_INPUT": 6, "GEMM3_WEIGHT": 7},
    **{"GEMM3_OUTPUT": 8, "GRAD_OUTPUT1": 0, "GRAD_INPUT1": 1, "GRAD_OUTPUT2": 2},
    **{"GRAD_INPUT2": 3, "GRAD_OUTPUT3": 4, "GRAD_INPUT3": 5},
    **{"NVTE_No_Backend": -1, "NVTE_F16_max512_seqlen": 0, "NVTE_F16_arbitrary_seqlen": 1},
    **{"NVTE_FP8": 2},
}


class Extension(ModuleType):
    """The module; what it is asked for the first time it makes."""

    __all__: list[str]
    """What `from transformer_engine_torch import *` brings."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in _OF_OTHER_BUILDS:
            raise AttributeError(name)
        made = _enum(name) if name[0].isupper() else _missing(name)
        setattr(self, name, made)
        return made


# What TE asks for by getattr(..., None), and the extension for CUDA does not have.
_OF_OTHER_BUILDS = ("flash_attention", "get_attention_backend")
MODULE = Extension(NAME)


def kernel(function: Function) -> Function:
    """Make `function` a name of the extension whose calls are counted."""

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    setattr(MODULE, function.__name__, counted)
    return function


def _missing(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"tests/te has no kernel {name}")

    return refuse


@functools.cache
def _files() -> str:
    """All of TE's Python for torch."""
    spec = find_spec("transformer_engine")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "pytorch"
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))


class _Numbered(type):
    """A class that nothing here makes one of, or an enum that has another name in the files."""

    def __getattr__(cls, name: str) -> int:
        if not name[0].isupper():
            raise AttributeError(name)
        setattr(cls, name, number := sum(key[0].isupper() for key in vars(cls)))
        return number


def _enum(name: str) -> Any:
    """An enum of the members that the files name."""
    members = list(dict.fromkeys(re.findall(rf"\b{name}\.(k[A-Z]\w\w+|[A-Z]\w+)", _files())))
    if not members:
        return _Numbered(name, (), {"__module__": NAME})
    numbers = {member: _NUMBERS.get(member, place) for place, member in enumerate(members)}
    return enum.IntEnum(name, numbers, module=NAME)


MODULE.__all__ = sorted(set(re.findall(r"\b(?:tex|ext)\.([a-zA-Z]\w+)", _files())))
DType = MODULE.DType
DTYPES: dict[int, torch.dtype] = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}
