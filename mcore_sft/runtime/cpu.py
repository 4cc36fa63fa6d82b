"""The seam that lets Megatron-core run on CPU: while it is open, "cuda" means the CPU.

Megatron-core writes `device="cuda"` or `torch.cuda.current_device()` in its schedules, gradient
buffers, optimizers and checkpoint code, and no option turns that off. Where Transformer Engine or
Apex is installed, it takes their CUDA kernels for norms and copies, on the CPU too. Everything it
needs in their place is here; on a machine with CUDA this module is never used. A new release may
use more of CUDA: `check_version` refuses to run any but those that `tests/runtime/test_cpu.py` has
read.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mcore_sft.runtime.megatron_core import check_version
from mcore_sft.runtime.patches import replaced

CPU = torch.device("cpu")


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Run what is inside with Megatron-core believing that the CPU is its GPU."""
    check_version()
    with contextlib.ExitStack() as stack:
        for module, name, stand_in in (*_cuda_stand_ins(), *_megatron_stand_ins()):
            stack.enter_context(replaced(module, name, stand_in))
        stack.enter_context(_CudaMeansCpu())
        yield


class _Inert:
    """Stands for a CUDA stream or event: every call does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


class _CudaMeansCpu(TorchFunctionMode):
    """Answers `device="cuda"`, `.cuda()`, `.to("cuda")` and `.type()` as if this were a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(a) if isinstance(a, str | torch.device) else a for a in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron-core compares the names of types: "torch.cuda.FloatTensor".
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    if isinstance(device, int):
        return CPU
    if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
        return CPU
    return device


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _cuda_stand_ins() -> list[tuple[ModuleType, str, Any]]:
    cuda = torch.cuda
    names: dict[str, Any] = {
        "current_device": lambda: CPU,
        "Stream": _Inert,
        "Event": _Inert,
        "current_stream": lambda *args: _Inert(),
        "default_stream": lambda *args: _Inert(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        # One object a name: torch.compile refuses two torch names that are the same function.
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda *args, **kwargs: None,
        "set_device": lambda *args, **kwargs: None,
    }
    return [(cuda, name, stand_in) for name, stand_in in names.items()]


def _megatron_stand_ins() -> list[tuple[ModuleType, str, Any]]:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.tensor_parallel import random

    apply, scale = utils.local_multi_tensor_applier, utils.local_multi_tensor_scale
    return [
        (random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
        (clip_grads, "multi_tensor_applier", apply),
        (clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm),
        (clip_grads, "multi_tensor_scale_impl", scale),
        (optimizer, "multi_tensor_applier", apply),
        (optimizer, "multi_tensor_scale_impl", scale),
    ]
