"""What a checkpoint consists of, and whether it still does.

step_N/manifest.json   progress, size and SHA-256 of every file, and a digest of itself

Four things can be wrong, and only the first is damage: a file is not as it was written, the disk
cannot be read, the folder has gone, a newer version wrote it.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from mcore_sft.base import files
from mcore_sft.checkpoint.errors import CheckpointError, Damaged, Gone, Misnamed
from mcore_sft.data.manifest import digest_of
from mcore_sft.runtime.mesh import Mesh

FORMAT = 3
MANIFEST = "manifest.json"
File = dict[str, Any]
"""Size and SHA-256."""

SECONDS_TO_APPEAR = 60.0
"""What a network file system may take to show a machine what another has written."""

_OTHER = "use another checkpoint of the run"
_SECONDS_TO_SECOND_TRY = 0.5


def digest(path: Path) -> File:
    """Size and SHA-256 of a file that was just written, once it is durable; raises OSError."""
    files.sync(path)
    return {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}


def unseen(folder: Path, expected: Mapping[str, File]) -> tuple[str, str] | None:
    """A file of `folder` that this process does not see in its size, and what it sees instead.

    None once it sees all; those that are not there yet have SECONDS_TO_APPEAR.
    """
    end = time.monotonic() + SECONDS_TO_APPEAR
    for name, file in expected.items():
        while found := _seen_instead(folder / name, file["bytes"]):
            if time.monotonic() > end:
                return name, found
            time.sleep(_SECONDS_TO_SECOND_TRY)
    return None


def _seen_instead(path: Path, size: int) -> str | None:
    try:
        with path.open("rb") as file:  # a network file system asks its server when it opens one
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        return str(error.strerror)
    return None if found == size else f"{found} bytes"


def verify(
    path: Path, mesh: Mesh | None = None, done: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """Return the manifest of the checkpoint at `path` once every file is as it says.

    With a mesh, each process reads a share of the files and all raise together. `done` is told the
    bytes of each file that was read. Raises what `read_manifest` does, `Damaged` if two looks agree
    that a file is not as it was written, and `CheckpointError` if two tries cannot read it, or one
    process sees it as it was written and another does not.
    """
    manifest = mesh.from_main(lambda: read_manifest(path)) if mesh else read_manifest(path)
    expected: dict[str, File] = manifest["files"]
    rank, size = (mesh.world.rank, mesh.world.size) if mesh else (0, 1)
    faults = _faults(path, expected, sorted(expected)[rank::size], mesh, done)
    if mesh:
        damaged = sorted(name for share in mesh.from_all(faults) for name in share)
        faults = {name: fault for name in damaged if (fault := _agreed(path, expected, name, mesh))}
    if faults:
        if not (mesh.from_main(path.is_dir) if mesh else path.is_dir()):
            raise _gone(path)
        raise Damaged(f"{path}: {'; '.join(faults.values())}; {_OTHER}")
    return dict(manifest)


def _faults(
    path: Path,
    expected: Mapping[str, File],
    names: Iterable[str],
    mesh: Mesh | None,
    done: Callable[[int], None] = lambda size: None,
) -> dict[str, str]:
    """What is wrong with the files `names`; `CheckpointError` on all if one rank cannot read one.

    Collective with a mesh.
    """
    found: dict[str, str] = {}
    unreadable: CheckpointError | None = None
    for name in names:
        try:
            if fault := _fault(path / name, expected[name]):
                found[name] = fault
        except OSError as error:
            unreadable = unreadable or _unreadable(path / name, error, mesh)
        done(expected[name]["bytes"])
    for refusal in mesh.from_all(unreadable) if mesh else [unreadable]:
        if refusal:
            raise refusal
    return found


def _agreed(path: Path, expected: Mapping[str, File], name: str, mesh: Mesh) -> str | None:
    """What is wrong with a file for all ranks, which look again; None if they now see it whole.

    `CheckpointError` if it is whole for one rank and not for another: that is no damage.
    """
    shares = mesh.from_all(_faults(path, expected, [name], mesh))
    found = [share.get(name) for share in shares]
    if None in found and any(found):
        whole, fault = found.index(None), next(fault for fault in found if fault)
        raise CheckpointError(
            f"{path / name}: {mesh.name(whole)} sees it as it was written, and "
            f"{mesh.name(found.index(fault))} does not ({fault}), so nothing was changed. Fix: let "
            f"all machines share {path.parent}, and start again"
        )
    return found[0]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint at `path`, its files not looked at.

    Raises `Damaged`, `Misnamed`, `Gone`, and `CheckpointError` if it cannot be read (tried twice)
    or another version wrote it.
    """
    try:
        text = _twice(lambda: (path / MANIFEST).read_text(encoding="utf-8"))
        manifest: dict[str, Any] = json.loads(text)
        found, digest = manifest["format"], manifest.pop("digest", None)
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_dir():
            raise _gone(path) from None
        raise Damaged(
            f"{path}: no {MANIFEST} there, so this is no complete checkpoint; give a folder such "
            "as results/NAME/step_1000"
        ) from None
    except OSError as error:
        raise _unreadable(path / MANIFEST, error) from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path / MANIFEST}: broken ({error!r}); {_OTHER}") from None
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        raise CheckpointError(
            f"{path}: checkpoint format {found!r}, expected {FORMAT}"
            f"{' (a newer version of mcore_sft wrote it)' if newer else ''}: go on with "
            "the version that wrote it, or name another output and start anew"
        )
    if digest != digest_of(manifest):
        raise Damaged(f"{path / MANIFEST}: is not as it was written; {_OTHER}")
    _require_own_names(path, manifest)
    return manifest


def signed(manifest: Mapping[str, Any]) -> str:
    """What is written of a manifest: itself and its digest."""
    plain = json.loads(json.dumps(manifest))
    return json.dumps({**plain, "digest": digest_of(plain)}, indent=2) + "\n"


@contextlib.contextmanager
def reading(path: Path, mesh: Mesh | None = None) -> Iterator[None]:
    """Say of an OSError within that the checkpoint at `path` has gone, or which file is unreadable.

    Raises `Gone` and `CheckpointError`, which names the rank of `mesh` that met it.
    """
    try:
        yield
    except (OSError, CheckpointException) as error:
        if not path.is_dir():
            raise _gone(path) from error
        if isinstance(error, OSError):
            raise _unreadable(Path(error.filename or path), error) from error
        # torch tells every rank what each of them met
        for rank, (fault, _) in error.failures.items():
            if isinstance(fault, OSError):
                raise _unreadable(Path(fault.filename or path), fault, mesh, rank) from error
        raise


def _require_own_names(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise unless the folder has its own step's number, and its files lie within it."""
    try:
        step, names = manifest["progress"]["step"], list(manifest["files"])
    except (KeyError, TypeError) as error:
        raise Damaged(f"{path / MANIFEST}: broken ({error!r}); {_OTHER}") from None
    number = path.name.removeprefix("step_")
    if path.name.startswith("step_") and number.isdecimal() and number != str(step):
        raise Misnamed(
            f"{path}: holds step {step}, expected step {number} by its name. Fix: rename it to "
            f"step_{step}, or move it out of the run's folder"
        )
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/":
            raise CheckpointError(
                f"{path / MANIFEST}: names {name!r}, which lies outside of the checkpoint. Fix: "
                "use a checkpoint from a source that you trust"
            )


def _fault(path: Path, expected: File) -> str | None:
    """What is wrong with a file, if a second look agrees; OSError if both cannot read it."""
    with contextlib.suppress(OSError):
        if _difference(path, expected) is None:
            return None
        return _difference(path, expected)
    time.sleep(_SECONDS_TO_SECOND_TRY)
    return _difference(path, expected)


def _difference(path: Path, expected: File) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes, expected {expected['bytes']}"
        if files.sha256_of(path) != expected["sha256"]:
            return f"{path.name} does not have the checksum of the manifest"
    except (FileNotFoundError, NotADirectoryError):
        return f"{path.name} is missing"
    return None


def _twice(read: Callable[[], str]) -> str:
    """What is read, tried once more if the disk fails; raises OSError."""
    try:
        return read()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError:
        time.sleep(_SECONDS_TO_SECOND_TRY)
        return read()


def _unreadable(
    file: Path, error: OSError, mesh: Mesh | None = None, rank: int | None = None
) -> CheckpointError:
    """The error of `rank`, or of this one."""
    by = ""
    if mesh and mesh.world.size > 1:
        by = f" by {mesh.name(mesh.world.rank if rank is None else rank)}"
    return CheckpointError(
        f"{file}: cannot be read{by} ({error.strerror}, errno {error.errno}), and nothing was "
        "changed. Fix: check the disk and start again, or move the checkpoint away to use an older "
        "one"
    )


def _gone(path: Path) -> Gone:
    return Gone(
        f"{path}: no such checkpoint; if it was there, it was removed or moved meanwhile. Fix: "
        "give a folder such as results/NAME/step_1000"
    )
