"""Distributed checkpoints: the model and the optimizer of a run, saved whole or not at all.

    RUN/step_N/   weights/        what Megatron-core's distributed checkpointing wrote
                  model/          config.json and the tokenizer of the model it grew from
                  config.yaml     the resolved configuration of the run
                  manifest.json   progress, size and SHA-256 of every file, and a digest of
                                  itself; written last
                  scores.json     what was measured of it later
    RUN/latest    the name of the newest complete step

A step is written as `.step_N.tmp`, made durable, and renamed: what bears the name step_N is whole.
Training goes on meanwhile (writer.py). What the files are is in manifest.py, what stays in
retention.py, what may be unpickled in pickles.py.
"""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_whole

from mcore_sft.base import files
from mcore_sft.checkpoint import optimizer_state, pickles, replicas, retention
from mcore_sft.checkpoint.errors import CheckpointError, Damaged, Gone, Misnamed
from mcore_sft.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    File,
    digest,
    read_manifest,
    reading,
    signed,
    unseen,
    verify,
)
from mcore_sft.checkpoint.retention import best_first, scores, steps, superfluous
from mcore_sft.checkpoint.writer import Writer
from mcore_sft.config import CheckpointConfig
from mcore_sft.model.build import Chunks, whole_weights
from mcore_sft.runtime import megatron_core
from mcore_sft.runtime.mesh import Mesh

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import ChainedOptimizer

POINTER = "latest"
_GIB = 2**30
_NAMED_RANKS = 8
"""As many stand in a sentence."""


DATASET_BEFORE = "dataset of all splits"
"""What a run is known by too that an older version began: one fingerprint of all its packs."""


@dataclass(kw_only=True)
class Progress:
    """All that a resumed run must know: everything else is a function of the step."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    supervised: int = 0
    skipped: int = 0
    """Steps that left the weights as they were."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last steps that were no spike, which a spike is told by."""
    spikes: int = 0
    """Steps in a row, up to this one, whose loss was a spike."""
    nonfinite: int = 0
    """Steps in a row, up to this one, whose loss or gradient was no finite number."""
    validation: str | None = None
    """Fingerprint of the validation packs, if the dataset has any; they may change."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What was changed where the run was resumed: {"step": 6, "changed": {key: [old, new]}}."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """What the run grew from, and what must stay as it was for a resumed run to be the same."""

    @classmethod
    def read(cls, path: Path, told: Mapping[str, Any]) -> "Progress":
        """What the manifest at `path` tells; `CheckpointError` if a newer version wrote it."""
        unknown = told.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise CheckpointError(
                f"{path}: its progress holds {', '.join(sorted(unknown))}, which this version does "
                "not know (a newer version of mcore_sft wrote it). Fix: use that version, or name "
                "another output"
            )
        return cls(**told)

    def check(self, fixed: dict[str, Any], formerly: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless the run that goes on is the run that stopped.

        `formerly` has what older versions recorded instead, by name.
        """
        changed = [
            f"{name} was {short(was)}, now {short(now)}"
            for name, was, now in _leaves("", self.fixed, fixed)
            if was != now and not (name in formerly and was == formerly[name])
        ]
        if changed:
            raise CheckpointError(
                f"this is not the run that stopped after step {self.step}: {'; '.join(changed)}; "
                "set it back, or name another output"
            )


def _leaves(
    prefix: str, then: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Each value of `now` by its dotted name, and what it was `then`."""
    for name, value in now.items():
        was = then.get(name)
        if isinstance(value, dict) and isinstance(was, dict):
            yield from _leaves(f"{prefix}{name}.", was, value)
        else:
            yield prefix + name, was, value


def short(value: Any) -> str:
    """A value in a sentence: a fingerprint by its first digits."""
    text = "none" if value is None else str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


class Checkpoints:
    """Saves and restores one run's model, optimizer and progress."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        *,
        model: Chunks,
        optimizer: ChainedOptimizer,
        mesh: Mesh,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.mesh = mesh
        self.newest: Path | None = None
        """The last step that was completed here."""
        self.restored: Path | None = None
        """The step that the run goes on from."""
        self.held: set[int] = set()
        """Steps that stay for now, since something reads them."""
        self._pending: _Pending | None = None
        self._told: set[Path] = set()
        """What could not be removed or renamed, which is said once."""

    def save(
        self,
        progress: Progress,
        describe: Callable[[Path], None],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to write step_N as it is now; the step before must be complete.

        `describe(folder)` adds the files that only one process writes, `scores` what is known of
        the step by name, such as its validation_loss. Raises `CheckpointError`, on all ranks, if
        the disk refuses, or if weights differ between ranks that hold the same.
        """
        assert self._pending is None, "wait() for the save before"
        with whole_weights(self.model):
            self._require_equal_replicas(progress.step)
            temporary = self.mesh.from_main(lambda: self._begin(progress.step, describe))
            model = self._model_state()
            optimizer = optimizer_state.state(self.optimizer, model, self.mesh)
            request, results = megatron_core.save_async(
                {"model": model, "optimizer": optimizer}, str(temporary / "weights")
            )
        self._pending = _Pending(
            temporary=temporary,
            final=self.folder / f"step_{progress.step}",
            manifest={
                "format": FORMAT,
                "progress": asdict(progress),
                "scores": {
                    name: score if math.isfinite(score) else None
                    for name, score in (scores or {}).items()
                },
            },
            writer=Writer(request, results, temporary),
            finish=request.finalize_fns,
        )

    def _require_equal_replicas(self, step: int) -> None:
        """Raise `CheckpointError` where a rank's weights are not those of its replicas."""
        found = replicas.differing(self.model, self.mesh)
        if not found:
            return
        name = self.mesh.name
        last = self.newest or self.restored
        told = ", ".join(f"{name(rank)} from {name(first)}" for rank, first in found[:_NAMED_RANKS])
        more = len(found) - _NAMED_RANKS
        raise CheckpointError(
            f"{self.folder / f'step_{step}'}: not saved, because ranks that hold the same weights "
            f"differ after step {step} (got other bits on {told}"
            f"{f' and {more} more' if more > 0 else ''}, expected the same). Fix: look for a fault "
            "of these machines or of their software, and start again; "
            + (f"{last} is the last good checkpoint" if last else "no checkpoint was saved before")
        )

    def _begin(self, step: int, describe: Callable[[Path], None]) -> Path:
        """Make the folder that step_N is written as, which nothing has used before."""
        for left in retention.leftovers(self.folder):
            self._tidy(left, retention.discard)
        with _named(self.folder / f"step_{step}"):
            temporary = retention.unfinished(self.folder, f"step_{step}")
            (temporary / "weights").mkdir(parents=True)
            describe(temporary)
        return temporary

    @property
    def is_pending(self) -> bool:
        """Whether a save was begun that is not complete; the same on every rank."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether the writer of this rank is at work."""
        return self._pending is not None and self._pending.writer.is_writing

    def wait(self, beat: Callable[[], None] = lambda: None) -> Path | None:
        """Wait for the save that was begun, if there is one, and complete it.

        `beat` meanwhile, as long as the writer of this rank goes on.
        """
        while any(self.mesh.largest(int(self.is_writing))):
            if self._pending and self._pending.writer.goes_on():
                beat()
            time.sleep(0.05)
        return self.complete() if self.is_pending else None

    def complete(self) -> Path:
        """Name the step, once no rank `is_writing`; `CheckpointError` if a writer failed."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        final = pending.final
        outcomes: list[Any] = self.mesh.from_all(pending.writer.outcome())
        told = enumerate(outcomes)
        faults = [f"{self.mesh.name(rank)}: {x}" for rank, x in told if isinstance(x, str)]
        if faults:
            raise _unwritten(final, "; ".join(faults))
        with _named(final):
            for write_metadata in pending.finish:
                write_metadata()
        self.mesh.from_main(lambda: self._publish(pending, outcomes))
        self.newest = final
        return final

    def _publish(self, pending: "_Pending", outcomes: list[dict[str, File]]) -> None:
        """Give the step its manifest and its name, and remove those that it makes superfluous.

        The main process does, once it sees what all have written; raises `CheckpointError`.
        """
        temporary, final = pending.temporary, pending.final
        with _named(final):
            written = {name: file for share in outcomes for name, file in share.items()}
            written |= _small_files(temporary, written)
            self._require_seen(temporary, written, outcomes)
            for inner in temporary.rglob("*"):
                if inner.is_dir():
                    files.sync(inner)
            manifest = {**pending.manifest, "files": dict(sorted(written.items()))}
            files.write(temporary / MANIFEST, signed(manifest))
            if os.path.lexists(final):
                aside = retention.set_aside(final, "replaced")
                self.mesh.say(f"warning: {final} was there already, and is now called {aside.name}")
            files.rename(temporary, final)
        with _named(self.folder / POINTER):
            files.replace(self.folder / POINTER, final.name + "\n")
        self._prune()

    def _require_seen(
        self, temporary: Path, written: dict[str, File], outcomes: list[dict[str, File]]
    ) -> None:
        """Raise `CheckpointError` unless the main process sees all files in their sizes."""
        if missed := unseen(temporary, written):
            name, found = missed
            writers = (rank for rank, share in enumerate(outcomes) if name in share)
            raise CheckpointError(
                f"{temporary / name}: {self.mesh.name(0)} does not see what "
                f"{self.mesh.name(next(writers, 0))} wrote (got {found}, expected "
                f"{written[name]['bytes']} bytes), so the checkpoint keeps this name. Fix: let all "
                f"machines share {self.folder}, and start again: the run goes on from the "
                "checkpoint before"
            )

    def add_score(self, step: int, name: str, score: float) -> None:
        """Keep what was measured of a complete step, and drop what is superfluous now.

        The main process does.
        """
        if not self.mesh.is_main:
            return
        path = self.folder / f"step_{step}"
        known = retention.scores_since(path) | {name: score if math.isfinite(score) else None}
        files.replace(path / retention.SCORES, json.dumps(known) + "\n")
        self._prune()

    def lacks(self, step: int, name: str) -> bool:
        """Whether `step` is there without a score of this name; collective."""
        found = self.mesh.from_main(lambda: scores(self.folder, name))
        return step in found and found[step] is None

    def best(self) -> str | None:
        """The best step there is by `checkpoint.metric` and its score, in words."""
        found = scores(self.folder, self.settings.metric)
        for step in best_first(found, self.settings.metric):
            return f"{self.folder / f'step_{step}'} ({self.settings.metric} {found[step]:.4f})"
        return None

    def _prune(self) -> None:
        found = scores(self.folder, self.settings.metric)
        for step in superfluous(found, self.settings):
            if step not in self.held:
                self._tidy(self.folder / f"step_{step}", retention.remove)

    def _tidy(self, path: Path, how: Callable[[Path], Path | None]) -> Path | None:
        """Do what the run can do without; what cannot be done is said once, and left."""
        try:
            return how(path)
        except OSError as error:
            if path not in self._told:
                self._told.add(path)
                self.mesh.say(
                    f"warning: {path} could not be removed or renamed ({error}), and the run goes "
                    "on without. Fix: remove it yourself, if it is in the way"
                )
            return None

    def restore_latest(
        self,
        fixed: dict[str, Any],
        formerly: Mapping[str, Any] = MappingProxyType({}),
        beat: Callable[[], None] = lambda: None,
    ) -> Progress | None:
        """Load the newest step that is whole; None if the run has no checkpoint yet.

        Newer ones that are damaged, or not the step that they are called, are set aside, and said;
        `CheckpointError` if all are, or if one cannot be read. `fixed` is compared with what the
        checkpoint says before anything is loaded; see `Progress.check`.
        """
        found = self._newest_whole(beat)
        if found is None:
            return None
        path, manifest = found
        progress = Progress.read(path, manifest["progress"])
        progress.check(fixed, formerly)
        self.mesh.from_main(lambda: pickles.check(path, manifest["files"]))
        with reading(path, self.mesh):
            self._load(path)
        self.restored = path
        return progress

    def _newest_whole(self, beat: Callable[[], None]) -> tuple[Path, dict[str, Any]] | None:
        unfit: dict[Path, CheckpointError] = {}
        for path in self.mesh.from_main(lambda: steps(self.folder)):
            try:
                manifest = verify(path, self.mesh, lambda _: beat())
            except Gone:
                return self._newest_whole(beat)  # it was there when they were listed
            except (Damaged, Misnamed) as error:
                unfit[path] = error
            else:
                for other, why in unfit.items():
                    self._set_aside(other, why)
                self.mesh.barrier()
                return path, manifest
        if unfit:
            raise CheckpointError(
                f"{self.folder}: no checkpoint of this run is whole: "
                f"{'; '.join(str(error) for error in unfit.values())}; repair one, or move them "
                "away to begin anew"
            )
        return None

    def _set_aside(self, path: Path, error: CheckpointError) -> None:
        why = "damaged" if isinstance(error, Damaged) else "misnamed"
        if self.mesh.is_main:
            aside = self._tidy(path, lambda path: retention.set_aside(path, why))
            if aside:
                self.mesh.say(f"set aside as {aside.name}: {error}")

    def _load(self, path: Path) -> None:
        """Fill model and optimizer with what the checkpoint at `path` holds."""
        model = self._model_state()
        _keep_what_was_not_saved(model, path)
        wanted = {"model": model, "optimizer": optimizer_state.wanted(self.optimizer, model)}
        # A weight's states are wanted by the ranks that update it, be it its first or not.
        read = megatron_core.load(wanted, str(path / "weights"), validate_access_integrity=False)
        for chunk, state in zip(self.model, read["model"].values(), strict=True):
            chunk.module.load_state_dict(state)
        optimizer_state.restore(self.optimizer, self._model_state(), read["optimizer"])

    def check_room(self, steps: int) -> None:
        """Raise `CheckpointError` where the disk has less room than a checkpoint takes; collective.

        Its weights and moments are counted, if there are `steps` to come.
        """
        if steps <= 0:
            return
        size = sum(self.mesh.from_all(optimizer_state.size(self.optimizer, self._model_state())))
        self.mesh.from_main(lambda: _require_room(self.folder, size))

    def begin_anew(self) -> None:
        """Raise `CheckpointError` where checkpoints of another run would mix with those to come."""
        found = self.mesh.from_main(lambda: steps(self.folder))
        if found:
            raise CheckpointError(
                f"{self.folder}: holds {found[0].name} of another run, which "
                "checkpoint.resume=false would leave behind; name another output, or move it away"
            )

    def _model_state(self) -> dict[str, Any]:
        """Each chunk's weights; it is their own keys that say where in the model they belong."""
        return {
            f"chunk{number}": chunk.module.sharded_state_dict(prefix="")
            for number, chunk in enumerate(self.model)
        }


def _require_room(folder: Path, size: int) -> None:
    room = retention.room(folder)
    if room is not None and room < size:
        raise CheckpointError(
            f"output {folder}: has room for {room / _GIB:.2f} GiB, and one checkpoint takes "
            f"{size / _GIB:.2f} GiB. Fix: make room there, or name another folder with output=DIR"
        )


def _keep_what_was_not_saved(model: dict[str, Any], path: Path) -> None:
    """Leave layers what they hold beside weights, where the run was saved with other layers.

    It is the scales of 8-bit products; local layers hold nothing.
    """
    saved = load_sharded_metadata(str(path / "weights"))

    def kept(value: Any) -> Any:
        if isinstance(value, ShardedObject) and value.unique_key not in saved:
            return LocalNonpersistentObject(value.data)
        return value

    dict_list_map_inplace(kept, model)


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A save that was begun."""

    temporary: Path
    final: Path
    manifest: dict[str, Any]
    writer: Writer
    finish: list[Callable[[], None]]
    """What Megatron-core does once every rank has written; collective."""


@contextlib.contextmanager
def _named(final: Path) -> Iterator[None]:
    """`CheckpointError` for what the disk refuses to one rank; the others wait, and end with it."""
    try:
        yield
    except OSError as error:
        raise _unwritten(final, f"{type(error).__name__}: {error}") from error


def _unwritten(final: Path, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{final} could not be written ({fault}); check the disk and start again: the run goes on "
        "from the checkpoint before"
    )


def _small_files(folder: Path, written: Mapping[str, File]) -> dict[str, File]:
    """Size and SHA-256 of all files but the shares of the ranks, which are `written`."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: digest(path) for name, path in paths.items() if name not in written}


class _Reader(FileSystemReader):
    """Knows what lies where: torch would unpickle that, and once for each weight."""

    def __init__(self, path: Path) -> None:
        super().__init__(path / "weights")
        self._contents = pickles.read_metadata(path, read_manifest(path)["files"])

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What lies where."""
        return self._contents


def whole_tensors(path: Path) -> Callable[[str], Tensor]:
    """A reader of whole weights by Megatron-core's names, one at a time, in a single process.

    Raises `Gone` and `CheckpointError`, and so does what is returned.
    """
    reader = _Reader(path)
    entries = reader.read_metadata().state_dict_metadata

    def read(key: str) -> Tensor:
        entry = entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{path}: no weight {key} there; does it hold this model?")
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with reading(path):
            load_whole({key: tensor}, storage_reader=reader, no_dist=True)
        return tensor

    return read
