"""`torch.cuda` as Transformer Engine's Python sees it: a Hopper GPU whose work is done at once."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

VERSION = "13.0"
CAPABILITY = (9, 0)
DEVICE = torch.device("cpu")


class Stream:
    """Also an event: every call does nothing, and it can be entered."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


Event = CUDAGraph = Stream
_ONLY = Stream()
nvtx = SimpleNamespace(range=contextlib.nullcontext)


class _Generators:
    """The one of the CPU for each device."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator


default_generators = _Generators()


def is_available() -> bool:
    return True


def is_bf16_supported(*_: Any) -> bool:
    return True


def is_current_stream_capturing() -> bool:
    return False


def current_device() -> torch.device:
    return DEVICE


def get_device_capability(*_: Any) -> tuple[int, int]:
    return CAPABILITY


def get_device_properties(*_: Any) -> SimpleNamespace:
    """Those of an H100."""
    major, minor = CAPABILITY
    return SimpleNamespace(name="emulated", major=major, minor=minor, multi_processor_count=132)


def current_stream(*_: Any) -> Stream:
    return _ONLY


def stream(of: Any) -> Stream:
    return _ONLY


def device(of: Any) -> Stream:
    return _ONLY


def synchronize(*_: Any) -> None:
    pass


def _lazy_init() -> None:
    pass


def _lazy_call(function: Callable[[], None]) -> None:
    function()


@contextlib.contextmanager
def coalescing(**_: Any) -> Iterator[Stream]:
    """NCCL would send what is gathered inside at once; gloo sends one after the other."""
    yield _ONLY
