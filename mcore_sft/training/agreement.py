"""What the ranks compare before a process group is made, and the run's folder that all must see.

    configuration, files, versions, code of each rank --Peers--> one error on all, or a run

Rank 0 compares. Keys of the configuration that are paths are compared by what lies there.
"""

import contextlib
import hashlib
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import mcore_sft
from mcore_sft import installed
from mcore_sft.base import files
from mcore_sft.base.errors import UserError
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.config import RunConfig, without_paths
from mcore_sft.data import manifest as manifests
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.runtime.peers import Peers
from mcore_sft.training import probe
from mcore_sft.training.alone import alone
from mcore_sft.training.errors import TrainingError

_MOST_TOLD = 3
_PACKAGES = ("mcore-sft", "megatron-core", "transformer-engine", "transformers", "tokenizers")

Record = dict[str, Any]


@contextlib.contextmanager
def agreed(config: RunConfig, peers: Peers) -> Iterator[None]:
    """Make the run's folder and keep other runs from it, once all ranks were started alike.

    Collective. Raises `UserError` on every rank where they were not, another run is in the folder,
    a machine does not see it, or it cannot be written. The main process alone holds the lock:
    processes that it forks do not, and may outlive it. Folders that stay empty are removed.
    """
    folder = config.folder
    with contextlib.ExitStack() as held:

        def begin(settings: list[Record]) -> str:
            _compare(settings, peers)
            held.enter_context(alone(folder))
            return held.enter_context(probe.laid(folder)) if peers.machines > 1 else ""

        # The lock comes before anything is read: another run may be at work on it.
        name = peers.exchange({**without_paths(config), **_versions()}, begin)
        if name:  # ranks of one machine read the same files
            probe.check(folder / name, peers)
            # The first rank of each machine looks at them for all of it.
            found = _files(config) if peers.is_first_here else None
            peers.exchange(found, lambda records: _compare(records, peers))
        yield


def _versions() -> dict[str, str | None]:
    package = Path(mcore_sft.__file__).parent
    csrc = package.parent / "csrc"
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed.version(name) for name in _PACKAGES},
        "mcore_sft's code": _hash_of(package),
        "csrc's code": _hash_of(csrc) if csrc.is_dir() else None,
    }


def _hash_of(folder: Path) -> str:
    """One SHA-256 of the sources in `folder`, names and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
            digest.update(f"{path.relative_to(folder)} {files.sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _files(config: RunConfig) -> dict[str, str]:
    """A fingerprint of what lies under each path that a run reads."""
    manifest = manifests.read(config.packed)
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    return {
        "config.json of model.path": _hash_of_json(config),
        "weights of model.path": _weights(config),
        "tokenizer": tokenizer.fingerprint,
        "prompt": Prompt.load(config.prompt, tokenizer).fingerprint,
        **{
            f"dataset data.packed ({split})": manifests.split_fingerprint(manifest, split)
            for split in manifest["splits"]
        },
    }


def _hash_of_json(config: RunConfig) -> str:
    path = config.model.path / "config.json"
    try:
        return files.sha256_of(path)
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be read ({error.strerror}). Fix: set model.path to a Hugging Face "
            "folder"
        ) from None


def _weights(config: RunConfig) -> str:
    """A fingerprint, or what is wrong with them: a run that goes on needs none."""
    try:
        return SafetensorsFolder(config.model.path).fingerprint()
    except UserError as error:
        return str(error)


def _compare(records: Sequence[Record | None], peers: Peers) -> None:
    """Raise `TrainingError` for the first rank that has something else than rank 0."""
    first = records[0] or {}
    for rank, record in enumerate(records):
        if record is None:
            continue
        here, there = peers.hosts[0], peers.hosts[rank]
        differ = [
            f"{name} (got {_short(record.get(name))} on {there}, expected "
            f"{_short(first.get(name))} as on {here})"
            for name in {**first, **record}
            if record.get(name) != first.get(name)
        ]
        if differ:
            more = f"; and {len(differ) - _MOST_TOLD} more" if len(differ) > _MOST_TOLD else ""
            raise TrainingError(
                f"rank {rank} ({there}) differs in {'; '.join(differ[:_MOST_TOLD])}{more}. Fix: "
                "start all ranks with the same code, --config and overrides, and let all machines "
                "see the same files"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text
