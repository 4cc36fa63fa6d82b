"""Encoded rows in, where each stands in its file out, for reports: some bytes a block.

position of a row among all that were read -> FILE:NUMBER
"""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def place(where: str, root: Path) -> str:
    """FILE:NUMBER without the folders of this machine: from `root`, or in the file's own folder."""
    path = Path(where)
    if path.is_relative_to(root):
        path = path.relative_to(root)
    elif path.is_absolute():
        path = Path(*path.parts[-2:])
    return str(path) if where else ""


@dataclass(frozen=True, eq=False)
class _Run:
    """Rows of one file from positions `starts`, whose numbers are `shifts` more."""

    name: str
    starts: Ids
    shifts: Ids


class Places:
    """Lines and rows are numbered in step with positions but for blank lines and bad rows."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._runs: list[_Run] = []

    def add(self, name: str, positions: Ids, numbers: Ids) -> None:
        """The rows of a block: `positions` [M], ascending and behind all before, and `numbers`."""
        if not len(positions):
            return
        shifts = numbers - positions
        at = np.flatnonzero(np.append(True, shifts[1:] != shifts[:-1]))
        self._firsts.append(int(positions[0]))
        self._runs.append(_Run(name, positions[at], shifts[at]))

    def where(self, position: int) -> str:
        """FILE:NUMBER of a row that was added."""
        run = self._runs[bisect_right(self._firsts, position) - 1]
        at = int(np.searchsorted(run.starts, position, side="right")) - 1
        return f"{run.name}:{position + run.shifts[at]}"
