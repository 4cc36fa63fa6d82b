"""Which device this process computes on. Free of Megatron, so that evaluation may use it."""

import os

import torch


def device() -> torch.device:
    """This process's GPU (by LOCAL_RANK) where CUDA is there, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
