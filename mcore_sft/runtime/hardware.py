"""What this device can do, and what is in use of it: peak speed, memory, waiting for its work."""

import contextlib
import os
import resource
from collections.abc import Iterator

import torch

from mcore_sft.config import ConfigError

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
}
"""bf16 matrix products without sparsity, 1e12 operations a second, from NVIDIA's data sheets; the
first that is part of the device's name counts."""


def peak_flops(device: torch.device) -> float | None:
    """Operations a second of bf16 matrix products; None where they are not known, as of a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes that tensors took on a GPU so far, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def finish_work(device: torch.device) -> None:
    """Wait for what this process has given to its device, not for what others still send it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def check_capture(device: torch.device) -> None:
    """Raise `ConfigError` where Nsight Systems has nothing to capture."""
    if device.type != "cuda":
        raise ConfigError(
            "log.profiler: nsys needs an NVIDIA GPU, but this process runs on CPU; use "
            "log.profiler=torch"
        )


@contextlib.contextmanager
def capture_range(device: torch.device) -> Iterator[None]:
    """What is computed inside is what Nsight Systems captures, with a mark for each operator."""
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    try:
        with torch.autograd.profiler.emit_nvtx():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def be_deterministic() -> None:
    """The same bits of the same run on the same machine; an operation that cannot is an error."""
    os.environ.update(
        CUBLAS_WORKSPACE_CONFIG=":4096:8", NVTE_ALLOW_NONDETERMINISTIC_ALGO="0", NCCL_ALGO="Ring"
    )
    torch.use_deterministic_algorithms(True)
