"""SHA-256 of the files of weights that a run grows from, computed beside its first steps.

files --each rank a part of them, in a thread--> SHA-256 by name, when it is asked for

What a user's runs have computed is kept in ~/.cache/mcore_sft/sha256.json, by the path of a file,
its size and the time of its last change. Without that file, all is computed again.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from mcore_sft.base import files
from mcore_sft.runtime.mesh import Mesh

Sum = tuple[int, int, str]
"""Size, time of the last change (ns) and SHA-256 of a file."""

_REMEMBERED = 1000
"""Files of which the cache keeps the sums."""


class Sums:
    """SHA-256 of the files `paths`, by name; collective."""

    def __init__(self, paths: Mapping[str, Path], mesh: Mesh) -> None:
        self._paths, self._mesh = paths, mesh
        names = sorted(paths)[mesh.world.rank :: mesh.world.size]
        self._own: dict[str, Sum | None] = dict.fromkeys(names)
        self._all: dict[str, str] | None = None
        known = mesh.from_main(_remembered)
        self._thread = threading.Thread(target=self._hash, args=(known,), daemon=True)
        self._thread.start()

    def _hash(self, known: Mapping[str, Sum]) -> None:
        for name in self._own:
            self._own[name] = _sum(self._paths[name], known)

    def wait(self, beat: Callable[[], None] = lambda: None) -> dict[str, str]:
        """All sums, once every rank has its part, but for files that cannot be read: that is said.

        Collective. `beat` is called while a rank is at its part.
        """
        if self._all is None:
            while any(self._mesh.largest(int(self._thread.is_alive()))):
                beat()
                self._thread.join(0.2)
            shares = self._mesh.from_all(self._own)
            found = {name: one for share in shares for name, one in share.items()}
            for name in sorted(name for name, one in found.items() if one is None):
                self._mesh.say(
                    f"warning: {self._paths[name]} could not be read as a whole, or was changed "
                    "meanwhile: checkpoints will not record its SHA-256"
                )
            told = {name: one for name, one in sorted(found.items()) if one}
            if self._mesh.is_main:
                _remember({_key(self._paths[name]): one for name, one in told.items()})
            self._all = {name: sha256 for name, (_, _, sha256) in told.items()}
        return self._all


def _sum(path: Path, known: Mapping[str, Sum]) -> Sum | None:
    """The sum of a file, which `known` may have; None if it cannot be read, or is changed."""
    try:
        size, changed = _state(path)
        found = known.get(_key(path))
        if found and found[:2] == (size, changed):
            return found
        made = (size, changed, files.sha256_of(path))
        return made if _state(path) == (size, changed) else None
    except OSError:
        return None


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _key(path: Path) -> str:
    return os.path.realpath(path)


def _cache() -> Path:
    """Raises RuntimeError where the user has no home folder."""
    named = os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "mcore_sft" / "sha256.json"


def _remembered() -> dict[str, Sum]:
    """What the cache holds; nothing where it cannot be read."""
    try:
        read = json.loads(_cache().read_text(encoding="utf-8"))
        return {path: (int(a), int(b), str(c)) for path, (a, b, c) in read.items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
        return {}


def _remember(sums: Mapping[str, Sum]) -> None:
    """Add `sums` to the cache, if it can be written."""
    before = _remembered()
    if before.items() >= sums.items():
        return
    kept = [*((path, one) for path, one in before.items() if path not in sums), *sums.items()]
    try:
        files.make_folder(_cache().parent)
        files.replace(_cache(), json.dumps(dict(kept[-_REMEMBERED:]), indent=1) + "\n")
    except (OSError, RuntimeError):
        return
