"""Some steps of a run under torch's profiler, or marked for Nsight Systems."""

import contextlib
from pathlib import Path
from typing import Any, Self

import torch

from mcore_sft.config import LogConfig
from mcore_sft.runtime.hardware import capture_range, check_capture
from mcore_sft.runtime.mesh import Mesh
from mcore_sft.training.beside.callback import Callback, Step


class Profile(Callback):
    """Profiles the steps that `log.profile` names, on every rank.

    torch writes RUN/profile/rank_N.json (chrome://tracing, ui.perfetto.dev). For nsys the range is
    the one of `nsys profile --capture-range=cudaProfilerApi`, with NVTX marks of the operators.
    """

    def __init__(self, settings: LogConfig, folder: Path, mesh: Mesh) -> None:
        self._first, self._last = settings.profile or (0, 0)
        self._tool = settings.profiler
        if settings.profile and self._tool == "nsys":
            check_capture(mesh.device)
        self._file = folder / "profile" / f"rank_{mesh.world.rank}.json"
        self._device = mesh.device
        self._begun = False
        self._open = contextlib.ExitStack()

    def before_step(self, step: int) -> None:
        """The step numbered `step` (from 1) begins."""
        if self._begun or not self._first <= step <= self._last:
            return
        self._begun = True
        if self._tool == "nsys":
            self._open.enter_context(capture_range(self._device))
            return
        self._open.enter_context(torch.profiler.profile(on_trace_ready=self._export))

    def after_step(self, taken: Step) -> None:
        """The last of these steps is over."""
        if taken.progress.step == self._last:
            self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _export(self, profiler: Any) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._file))
