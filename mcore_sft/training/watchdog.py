"""A rank that hangs: the stacks of all ranks on disk, and the end of the run.

RUN/hang/BEGINNING/rank_N.txt    what rank N was doing; the first of them makes all write theirs
"""

import faulthandler
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from mcore_sft.model.build import Chunks
from mcore_sft.runtime.mesh import Mesh

HUNG = 124
"""Exit code of a run that hung, as that of timeout(1)."""


class Watchdog:
    """A thread that looks whether this rank still computes micro-batches, or another does not.

    It needs no process group and no rank but its own, since any of them may be what hangs.
    """

    def __init__(self, folder: Path, seconds: float | None, model: Chunks, mesh: Mesh) -> None:
        """`seconds` without a micro-batch are a hang; None is never."""
        self._folder = folder / "hang"
        self._seconds = seconds or math.inf
        self._mesh = mesh
        self._beat = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        for chunk in model:
            chunk.register_forward_hook(self.beat)

    def beat(self, *_: Any) -> None:
        """This rank goes on."""
        self._beat = time.monotonic()

    def __enter__(self) -> Self:
        began = [time.strftime("%Y%m%d-%H%M%S")]
        dist.broadcast_object_list(began, src=0)
        self._folder /= began[0]
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self._seconds / 4)):
            silent = time.monotonic() - self._beat
            first = not any(self._folder.glob("rank_*.txt"))
            if silent > self._seconds or not first:
                self._write_stacks()
                if first or self._mesh.is_main:
                    self._tell(silent)
                os._exit(HUNG)

    def _write_stacks(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{self._mesh.world.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file)

    def _tell(self, silent: float) -> None:
        """Wait for the others' stacks, then say where they lie and whose are missing."""
        size = self._mesh.world.size
        for _ in range(20):
            missing = [r for r in range(size) if not (self._folder / f"rank_{r}.txt").exists()]
            if not missing:
                break
            time.sleep(min(1.0, self._seconds / 8))
        told = f"; of ranks {', '.join(map(str, missing))} there are none" if missing else ""
        print(
            f"error: rank {self._mesh.world.rank} has computed nothing for {silent:.0f} s "
            f"(train.hang_seconds {self._seconds:g}), and the run ends; what each rank was doing "
            f"stands in {self._folder}{told}",
            file=sys.stderr,
            flush=True,
        )
