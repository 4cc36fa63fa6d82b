"""Distributed checkpoints: the model and the optimizer of a run, saved whole or not at all.

    RUN/step_N/   weights/        what Megatron-core's distributed checkpointing wrote
                  model/          config.json and the tokenizer of the model it grew from
                  config.yaml     the resolved configuration of the run
                  manifest.json   progress, size and SHA-256 of every file, and a digest of
                                  itself; written last
                  scores.json     what was measured of it later
    RUN/latest    the name of the newest complete step

A step is written as `.step_N.tmp`, made durable, and renamed: what bears the name step_N is whole.
Training goes on meanwhile (writer.py). A step that goes loses its name first.
"""

import contextlib
import functools
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_whole

from mcore_sft.base import files
from mcore_sft.checkpoint import optimizer_state
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.writer import File, Writer, digest
from mcore_sft.config import CheckpointConfig
from mcore_sft.data.manifest import digest_of
from mcore_sft.model.build import Chunks, whole_weights
from mcore_sft.runtime import megatron_core
from mcore_sft.runtime.mesh import Mesh

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import ChainedOptimizer

FORMAT = 3
MANIFEST = "manifest.json"
SCORES = "scores.json"
POINTER = "latest"
_OTHER = "use another checkpoint of the run"


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
        self.held: set[int] = set()
        """Steps that stay for now, since something reads them."""
        self._pending: _Pending | None = None

    def save(
        self,
        progress: Progress,
        describe: Callable[[Path], None],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to write step_N as it is now; the step before must be complete.

        `describe(folder)` adds the files that only one process writes, `scores` what is known of
        the step by name, such as its validation_loss.
        """
        assert self._pending is None, "wait() for the save before"
        temporary = self.folder / f".step_{progress.step}.tmp"
        if self.mesh.is_main:
            with _named(self.folder / f"step_{progress.step}"):
                for stale in self.folder.glob(".step_*.tmp"):
                    shutil.rmtree(stale)
                (temporary / "weights").mkdir(parents=True)
                describe(temporary)
        self.mesh.barrier()
        with whole_weights(self.model):
            model = self._model_state()
            optimizer = optimizer_state.state(self.optimizer, model, self.mesh)
            request = megatron_core.save_async(
                {"model": model, "optimizer": optimizer}, str(temporary / "weights")
            )
        self._pending = _Pending(
            temporary=temporary,
            manifest={
                "format": FORMAT,
                "progress": asdict(progress),
                "scores": {
                    name: score if math.isfinite(score) else None
                    for name, score in (scores or {}).items()
                },
            },
            writer=Writer(request, temporary),
            finish=request.finalize_fns,
        )

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
        while any(agree(self.mesh, int(self.is_writing))):
            if self._pending and self._pending.writer.goes_on():
                beat()
            time.sleep(0.05)
        return self.complete() if self.is_pending else None

    def complete(self) -> Path:
        """Name the step, once no rank `is_writing`; `CheckpointError` if a writer failed."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        final = self.folder / pending.temporary.name.removeprefix(".").removesuffix(".tmp")
        outcomes: list[Any] = [None] * self.mesh.world.size
        dist.all_gather_object(outcomes, pending.writer.outcome(), group=self.mesh.world.group)
        faults = [f"rank {rank}: {x}" for rank, x in enumerate(outcomes) if isinstance(x, str)]
        if faults:
            raise _unwritten(final, "; ".join(faults))
        with _named(final):
            for write_metadata in pending.finish:
                write_metadata()
            self._publish(pending, outcomes, final)
        self.mesh.barrier()
        self.newest = final
        return final

    def _publish(self, pending: "_Pending", outcomes: list[Any], final: Path) -> None:
        """Give the step its manifest and its name, and remove those that it makes superfluous."""
        if self.mesh.is_main:
            named = {name: file for share in outcomes for name, file in share.items()}
            named |= _small_files(pending.temporary, named)
            manifest = {**pending.manifest, "files": dict(sorted(named.items()))}
            files.write(pending.temporary / MANIFEST, signed(manifest))
            files.rename(pending.temporary, final)
            files.replace(self.folder / POINTER, final.name + "\n")
            self._prune()

    def add_score(self, step: int, name: str, score: float) -> None:
        """Keep what was measured of a complete step, and drop what is superfluous now.

        The main process does.
        """
        if not self.mesh.is_main:
            return
        path = self.folder / f"step_{step}"
        known = _scores_since(path) | {name: score if math.isfinite(score) else None}
        files.replace(path / SCORES, json.dumps(known) + "\n")
        self._prune()

    def lacks(self, step: int, name: str) -> bool:
        """Whether `step` is there without a score of this name; collective."""
        found = _from_main(lambda: scores(self.folder, name), self.mesh)
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
                nameless = self.folder / f".step_{step}.tmp"
                (self.folder / f"step_{step}").rename(nameless)
                shutil.rmtree(nameless)

    def restore_latest(
        self, fixed: dict[str, Any], formerly: Mapping[str, Any] = MappingProxyType({})
    ) -> Progress | None:
        """Load the newest step that is whole; None if the run has no checkpoint yet.

        Damaged ones are set aside as `damaged_step_N`, and said; `CheckpointError` if all are.
        `fixed` is compared with what the checkpoint says before anything is loaded; see
        `Progress.check`.
        """
        damaged: dict[Path, CheckpointError] = {}
        for path in _from_main(lambda: steps(self.folder), self.mesh):
            try:
                manifest = verify(path, self.mesh)
            except CheckpointError as error:
                damaged[path] = error
                continue
            self._set_aside(damaged)
            progress = Progress(**manifest["progress"])
            progress.check(fixed, formerly)
            model = self._model_state()
            _keep_what_was_not_saved(model, path)
            wanted = {"model": model, "optimizer": optimizer_state.wanted(self.optimizer, model)}
            # A weight's states are wanted by the ranks that update it, be it its first or not.
            read = megatron_core.load(
                wanted, str(path / "weights"), validate_access_integrity=False
            )
            for chunk, state in zip(self.model, read["model"].values(), strict=True):
                chunk.module.load_state_dict(state)
            optimizer_state.restore(self.optimizer, self._model_state(), read["optimizer"])
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
        found = _from_main(lambda: steps(self.folder), self.mesh)
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

    def _model_state(self) -> dict[str, Any]:
        """Each chunk's weights; it is their own keys that say where in the model they belong."""
        return {
            f"chunk{number}": chunk.module.sharded_state_dict(prefix="")
            for number, chunk in enumerate(self.model)
        }


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
        f"{final} could not be written ({fault}); see to the disk and start again: the run goes on "
        "from the checkpoint before"
    )


def agree(mesh: Mesh, *flags: int) -> list[int]:
    """The largest that any rank gives, of each flag; collective."""
    found = torch.tensor(flags, device=mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=mesh.world.group)
    return [int(flag) for flag in found.tolist()]


def superfluous(scores: Mapping[int, float | None], settings: CheckpointConfig) -> list[int]:
    """The steps that may go, of the steps that are there with their scores.

    With `keep` or `best`, what stays is the newest, the best and the multiples of `keep_every`.
    """
    if not (settings.keep or settings.best):
        return []
    newest = sorted(scores, reverse=True)
    best = best_first(scores, settings.metric)
    stay = {*newest[: max(1, settings.keep)], *best[: settings.best]}
    if settings.keep_every:
        stay |= {step for step in scores if step % settings.keep_every == 0}
    return [step for step in newest if step not in stay]


def best_first(scores: Mapping[int, float | None], metric: str) -> list[int]:
    """The steps that have a score by `metric`, of two that are as good the newer first."""
    sign = -1 if metric == "accuracy" else 1
    order = sorted((sign * score, -step) for step, score in scores.items() if score is not None)
    return [-step for _, step in order]


def scores(folder: Path, metric: str) -> dict[int, float | None]:
    """The score of each step by `metric`, the newest first.

    None where it was not measured, or cannot be read.
    """
    found: dict[int, float | None] = {}
    for path in steps(folder):
        known: dict[str, float | None] = {}
        with contextlib.suppress(CheckpointError):
            known |= read_manifest(path).get("scores", {})
        known |= _scores_since(path)
        found[int(path.name.removeprefix("step_"))] = known.get(metric)
    return found


def _scores_since(path: Path) -> dict[str, float | None]:
    """What was measured of a step after it was complete; nothing where that cannot be read."""
    try:
        return dict(json.loads((path / SCORES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _small_files(folder: Path, written: Mapping[str, File]) -> dict[str, File]:
    """Size and SHA-256 of all files but the shares of the ranks, which are `written`."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: digest(path) for name, path in paths.items() if name not in written}


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, newest first."""
    numbers = {path: path.name.removeprefix("step_") for path in folder.glob("step_*")}
    found = [path for path, number in numbers.items() if number.isdecimal()]
    return sorted(found, key=lambda path: int(numbers[path]), reverse=True)


def verify(
    path: Path, mesh: Mesh | None = None, done: Callable[[int], None] = lambda size: None
) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`; `CheckpointError` if a file is not as it says.

    With a mesh, each process reads a share of the files and all raise together. `done` is told the
    bytes of each file that was read.
    """
    manifest = _from_main(lambda: read_manifest(path), mesh) if mesh else read_manifest(path)
    names = sorted(manifest["files"])
    rank, size = (mesh.world.rank, mesh.world.size) if mesh else (0, 1)
    faults = []
    for name in names[rank::size]:
        if fault := _fault(path / name, manifest["files"][name]):
            faults.append(fault)
        done(manifest["files"][name]["bytes"])
    if mesh:
        shares: list[Any] = [None] * size
        dist.all_gather_object(shares, faults, group=mesh.world.group)
        faults = [fault for share in shares for fault in share]
    if faults:
        raise CheckpointError(f"{path}: {'; '.join(faults)}; {_OTHER}")
    return dict(manifest)


def _from_main(find: Callable[[], Any], mesh: Mesh) -> Any:
    return mesh.from_main(find)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path` as it was written, its files not looked at."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found, digest = manifest["format"], manifest.pop("digest", None)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no {MANIFEST} there, so this is no complete checkpoint; give a folder such "
            "as results/NAME/step_1000"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path / MANIFEST}: cannot be read ({error.strerror}); {_OTHER}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: broken ({error!r}); {_OTHER}") from None
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {found!r}, expected {FORMAT}: go on with "
            "the version that wrote it, or name another output and start anew"
        )
    if digest != digest_of(manifest):
        raise CheckpointError(f"{path / MANIFEST}: is not as it was written; {_OTHER}")
    return manifest


def signed(manifest: Mapping[str, Any]) -> str:
    """What is written of a manifest: itself and its digest."""
    plain = json.loads(json.dumps(manifest))
    return json.dumps({**plain, "digest": digest_of(plain)}, indent=2) + "\n"


class _Reader(FileSystemReader):
    """Reads what lies where but once: of many ranks it takes longer than many a weight."""

    @functools.cached_property
    def _contents(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What lies where."""
        return self._contents


def whole_tensors(path: Path) -> Callable[[str], Tensor]:
    """A reader of whole weights by Megatron-core's names, one at a time, in a single process."""
    reader = _Reader(path / "weights")
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
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes, expected {expected['bytes']}"
        if digest(path)["sha256"] != expected["sha256"]:
            return f"{path.name} does not have the checksum of the manifest"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None
