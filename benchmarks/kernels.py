"""A call in, what the device was busy with during it out: its kernels, the longest first."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

MOST = 30


def kernels(call: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """Name, number of calls and milliseconds of each kernel; on the CPU of each operator."""
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        call()
        if cuda:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    rows = [
        {
            "kernel": event.key,
            "calls": event.count,
            "ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3,
        }
        for event in seen.key_averages()
        if event.device_type == kind
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:MOST]


def lines(rows: list[dict[str, Any]], width: int = 110) -> list[str]:
    """A line for each kernel, the ends of whose name tell it from others."""
    shown = []
    for row in rows:
        name = row["kernel"]
        if len(name) > width:
            name = f"{name[: width // 2 - 2]} .. {name[-width // 2 + 2 :]}"
        shown.append(f"{row['ms']:9.3f} ms {row['calls']:6d} x  {name}")
    return shown
