"""What this process computes on and in. Free of Megatron, so that evaluation may use it."""

import os

import torch

from mcore_sft.base.dtypes import BY_TORCH, DTYPES


def device() -> torch.device:
    """This process's GPU (by LOCAL_RANK) where CUDA is there, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def torch_dtype(name: str) -> torch.dtype:
    """The format that a configuration calls `name`, such as bf16."""
    dtype = getattr(torch, DTYPES[name].torch)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """What a configuration calls `dtype`."""
    return BY_TORCH[str(dtype).removeprefix("torch.")]
