"""Surveyed sources in, the disk that their preparation needs out, before the work begins.

first block of each large source -> bytes of its file, for each byte of the source -> all
"""

import heapq
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from mcore_sft.data.encode import store
from mcore_sft.data.encode.job import Job
from mcore_sft.data.errors import DataError
from mcore_sft.data.workers import Workers

_SMALL = 16 << 20  # bytes of sources that are not worth a guess
_TRIED = 16  # sources
_CERTAIN = 0.8  # of a guess


def require(
    job: Job,
    place: Path,
    workers: Workers,
    tokens: np.dtype[Any],
    *,
    there: int,
    shards: int | None = None,
) -> None:
    """Say how much disk is needed beside `place`; `DataError` where it cannot be enough.

    there: bytes that are written already; shards: the run makes one of so many. A dataset needs
    twice what is encoded: it lies there by blocks, and in its order.
    """
    encoded = _encoded(job, workers, tokens)
    if not encoded:
        return
    free = shutil.disk_usage(place.parent).free + there
    need = encoded / shards if shards else 2 * encoded
    said = f"{place}: about {decimal(int(need))} of disk are needed"
    if not shards:
        said += f" while it is made, and {decimal(int(encoded))} in the end"
    said += f"; {decimal(free)} are free"
    if _CERTAIN * need > free:
        raise DataError(f"{said}. Fix: make room, or give another place (data.packed=DIR)")
    job.console.print(said + (", which may not do" if need > free else ""), soft_wrap=True)


def require_now(place: Path, need: int) -> None:
    """`DataError` where `need` bytes are not free at `place`, of which nothing is written yet."""
    free = shutil.disk_usage(place).free
    if need > free:
        raise DataError(
            f"{place}: {decimal(need)} of disk are needed to put examples in order, and "
            f"{decimal(free)} are free. Fix: make room"
        )


def _encoded(job: Job, workers: Workers, tokens: np.dtype[Any]) -> float:
    """Bytes of the files of all blocks; 0 where they are few."""
    surveys = [
        (surveyed, source) for some in job.surveys.values() for source, surveyed in enumerate(some)
    ]
    if sum(surveyed.size for surveyed, _ in surveys) < _SMALL:
        return 0
    tried = []
    for surveyed, source in heapq.nlargest(_TRIED, surveys, key=lambda each: each[0].size):
        if (block := next(surveyed.blocks(), None)) is not None and block.size:
            tried.append((surveyed, block, workers.submit(store.size, block, source, tokens)))
    sizes, made = 0.0, 0.0
    for surveyed, block, future in tried:
        limit, size = surveyed.source.limit, float(surveyed.size)
        if limit is not None and block.rows:
            size = min(size, block.size * limit / block.rows)
        sizes += size
        made += size * future.result() / block.size
    known = {id(surveyed) for surveyed, _, _ in tried}
    whole = sizes + sum(surveyed.size for surveyed, _ in surveys if id(surveyed) not in known)
    return made * whole / sizes if sizes else 0
