"""One run at a time in a folder: two would sweep away what the other is writing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mcore_sft.base import files
from mcore_sft.base.errors import UserError
from mcore_sft.runtime.mesh import Mesh


@contextlib.contextmanager
def alone(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Keep other runs from `folder`, where its file system has locks; `UserError` if one is there.

    The main process holds the lock alone: what it has forked does not, and may outlive it.
    """
    if not mesh.is_main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with files.lock(folder / ".lock", by="lockf"):
            yield
    except files.Locked:
        raise UserError(
            f"{folder}: another run is training there; wait until it has ended, or name another "
            "output"
        ) from None
