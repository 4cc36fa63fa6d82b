"""Distributed checkpoints: the model and the optimizer of a run, saved whole or not at all.

    RUN/step_N/   weights/        what Megatron-core's distributed checkpointing wrote
                  model/          config.json and the tokenizer of the model it grew from
                  config.yaml     the resolved configuration of the run
                  manifest.json   progress, and size and SHA-256 of every file; written last
    RUN/latest    the name of the newest complete step

A step is written as `.step_N.tmp`, made durable, and renamed: what bears the name step_N is whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_whole

from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.config import CheckpointConfig
from mcore_sft.runtime.mesh import Mesh

FORMAT = 1
MANIFEST = "manifest.json"
POINTER = "latest"


@dataclass(kw_only=True)
class Progress:
    """All that a resumed run must know: everything else is a function of the step."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    skipped: int = 0
    fixed: dict[str, Any] = field(default_factory=dict)
    """What must stay as it was: with other values, a resumed run would not be the same run."""

    def check(self, fixed: dict[str, Any]) -> None:
        """Raise `CheckpointError` unless the run that goes on is the run that stopped."""
        changed = [
            f"{name} was {self.fixed.get(name)}, now {value}"
            for name, value in fixed.items()
            if self.fixed.get(name) != value
        ]
        if changed:
            raise CheckpointError(
                f"this is not the run that stopped after step {self.step}: {'; '.join(changed)}; "
                "set it back, or name another output"
            )


class Checkpoints:
    """Saves and restores one run's model, optimizer and progress."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        *,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        mesh: Mesh,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.mesh = mesh

    def save(self, progress: Progress, describe: Callable[[Path], None]) -> Path:
        """Write step_N; `describe(folder)` adds the files that only one process writes."""
        final = self.folder / f"step_{progress.step}"
        temporary = self.folder / f".step_{progress.step}.tmp"
        if self.mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "weights").mkdir(parents=True)
            describe(temporary)
        self.mesh.barrier()
        dist_checkpointing.save(self._state(is_loading=False), str(temporary / "weights"))
        self.mesh.barrier()
        files = self._hash(temporary)
        if self.mesh.is_main:
            manifest = {"format": FORMAT, "progress": asdict(progress), "files": files}
            _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _write_durably(self.folder / f".{POINTER}", final.name + "\n")
            (self.folder / f".{POINTER}").rename(self.folder / POINTER)
            _sync_folder(self.folder)
            self._prune()
        self.mesh.barrier()
        return final

    def restore_latest(self, fixed: dict[str, Any]) -> Progress | None:
        """Load the newest step that is whole; None if the run has no checkpoint yet.

        Damaged ones are set aside as `damaged_step_N`, and said; `CheckpointError` if all are.
        `fixed` is compared with what the checkpoint says before anything is loaded.
        """
        damaged: dict[Path, CheckpointError] = {}
        for path in steps(self.folder):
            try:
                manifest = verify(path, self.mesh)
            except CheckpointError as error:
                damaged[path] = error
                continue
            self._set_aside(damaged)
            progress = Progress(**manifest["progress"])
            progress.check(fixed)
            state = dist_checkpointing.load(self._state(is_loading=True), str(path / "weights"))
            self.model.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            return progress
        if damaged:
            raise CheckpointError(
                f"{self.folder}: no checkpoint of this run is whole: "
                f"{'; '.join(str(error) for error in damaged.values())}; repair one, or move them "
                "away to begin anew"
            )
        return None

    def begin_anew(self) -> None:
        """Raise `CheckpointError` where checkpoints of another run would mix with those to come."""
        found = steps(self.folder)
        if found:
            raise CheckpointError(
                f"{self.folder}: holds {found[0].name} of another run, which "
                "checkpoint.resume=false would leave behind; name another output, or move it away"
            )

    def _set_aside(self, damaged: dict[Path, CheckpointError]) -> None:
        for path, error in damaged.items():
            self.mesh.say(f"set aside as damaged_{path.name}: {error}")
            if self.mesh.is_main:
                aside = path.with_name(f"damaged_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        self.mesh.barrier()

    def _state(self, *, is_loading: bool) -> dict[str, Any]:
        model = self.model.module.sharded_state_dict(prefix="")
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading)
        return {"model": model, "optimizer": optimizer}

    def _hash(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every file; each process reads a share of them, and syncs it."""
        names = sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        )
        world = self.mesh.world
        mine = {name: _digest(folder / name) for name in names[world.rank :: world.size]}
        shares: list[Any] = [None] * world.size
        dist.all_gather_object(shares, mine, group=world.group)
        return {name: entry for share in shares for name, entry in sorted(share.items())}

    def _prune(self) -> None:
        if self.settings.keep:
            for path in steps(self.folder)[self.settings.keep :]:
                shutil.rmtree(path)


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, newest first."""
    numbers = {path: path.name.removeprefix("step_") for path in folder.glob("step_*")}
    found = [path for path, number in numbers.items() if number.isdecimal()]
    return sorted(found, key=lambda path: int(numbers[path]), reverse=True)


def verify(path: Path, mesh: Mesh | None = None) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`; `CheckpointError` if a file is not as it says.

    With a mesh, each process reads a share of the files and all raise together.
    """
    manifest = read_manifest(path)
    names = sorted(manifest["files"])
    rank, size = (mesh.world.rank, mesh.world.size) if mesh else (0, 1)
    faults = [
        fault
        for name in names[rank::size]
        if (fault := _fault(path / name, manifest["files"][name]))
    ]
    if mesh:
        shares: list[Any] = [None] * size
        dist.all_gather_object(shares, faults, group=mesh.world.group)
        faults = [fault for share in shares for fault in share]
    if faults:
        raise CheckpointError(f"{path}: {'; '.join(faults)}; use another checkpoint of the run")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, its files not looked at."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no {MANIFEST} there, so this is no complete checkpoint; give a folder such "
            "as results/NAME/step_1000"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST}: not valid JSON: {error}") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {manifest.get('format')!r}, expected {FORMAT}"
        )
    return manifest


def whole_tensors(path: Path) -> Callable[[str], Tensor]:
    """A reader of whole weights by Megatron-core's names, one at a time, in a single process."""
    reader = FileSystemReader(path / "weights")
    entries = reader.read_metadata().state_dict_metadata

    def read(key: str) -> Tensor:
        entry = entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{path}: no weight {key} there; does it hold this model?")
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        load_whole({key: tensor}, storage_reader=reader, no_dist=True)
        return tensor

    return read


def _fault(path: Path, expected: dict[str, Any]) -> str | None:
    if not path.exists():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
    if _digest(path)["sha256"] != expected["sha256"]:
        return f"{path.name} does not have the checksum of the manifest"
    return None


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
