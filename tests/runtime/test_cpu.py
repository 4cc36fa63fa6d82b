import re
import sys

import pytest
import torch

import mcore_sft.training.loop  # noqa: F401  (imports all of Megatron-core that a run uses)
from mcore_sft.runtime.cpu import megatron_on_cpu
from mcore_sft.runtime.megatron_core import FOUND

from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.utils import local_multi_tensor_l2_norm

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


def test_norms_and_copies_of_gradients_take_no_kernel_of_another_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Megatron-core takes Transformer Engine's or Apex's wherever one can be imported."""

    def kernel(*_: object) -> None:
        raise AssertionError("a CUDA kernel was called on the CPU")

    for name in ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_impl"):
        monkeypatch.setattr(clip_grads, name, kernel)
    for name in ("multi_tensor_applier", "multi_tensor_scale_impl"):
        monkeypatch.setattr(optimizer, name, kernel)
    there, here = torch.tensor([3.0, 4.0]), torch.zeros(2)
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([6.0, 8.0])
    with megatron_on_cpu():
        optimizer._multi_tensor_copy_this_to_that([there], [here], torch.zeros(1, dtype=torch.int))
        clip_grads.clip_grad_by_total_norm_fp32([weight], 5.0, 10.0)
        assert clip_grads.l2_norm_impl is local_multi_tensor_l2_norm
    assert torch.equal(here, there)
    assert torch.allclose(weight.grad, there, rtol=1e-5)
