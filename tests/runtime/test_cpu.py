import re
import sys

import torch

import mcore_sft.training.loop  # noqa: F401  (imports all of Megatron-core that a run uses)
from mcore_sft.runtime.cpu import megatron_on_cpu
from mcore_sft.runtime.megatron_core import FOUND

STOOD_IN_FOR = {
    "BFloat16Tensor", "Event", "FloatTensor", "HalfTensor", "Stream", "current_device",
    "current_stream", "default_stream", "empty_cache", "get_rng_state", "manual_seed", "set_device",
    "set_rng_state", "stream", "synchronize",
}  # fmt: skip
"""What of torch.cuda the seam answers for."""

NEVER_REACHED = {
    "CUDAGraph", "MemPool", "OutOfMemoryError", "amp", "clock_rate", "default_generators",
    "device_count", "get_device_capability", "get_device_properties", "graph", "graph_pool_handle",
    "is_available", "memory", "memory_allocated", "memory_reserved", "memory_stats", "nvtx",
    "power_draw", "random", "set_stream", "temperature", "use_mem_pool", "utilization",
}  # fmt: skip
"""What Megatron-core names for CUDA graphs, profiling and mixtures of experts, unused on CPU."""

SINCE = {
    "0.16": set(),
    "0.19": {"_sleep", "device_memory_used", "is_current_stream_capturing", "memory_snapshot"},
}
"""What each release names beyond that, for the same."""


def test_megatron_core_uses_no_more_of_cuda_than_the_seam_knows() -> None:
    used: set[str] = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.startswith("megatron.core") and file:
            with open(file, encoding="utf-8") as source:
                used |= set(re.findall(r"torch\.cuda\.(\w+)", source.read()))
    minor = f"{FOUND.major}.{FOUND.minor}"
    assert used == STOOD_IN_FOR | NEVER_REACHED | SINCE[minor]


def test_cuda_means_cpu_inside_and_only_there() -> None:
    before = torch.cuda.current_device
    with megatron_on_cpu():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.zeros(1).cuda().to("cuda").device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            pass
    assert torch.cuda.current_device is before
    assert torch.zeros(1).type() == "torch.FloatTensor"
