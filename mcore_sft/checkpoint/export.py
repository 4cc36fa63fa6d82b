"""Distributed checkpoints in, a Hugging Face folder out, one tensor at a time in one process.

step_N/ -> config.json, generation_config.json, tokenizer, *.safetensors, mcore_sft.json

Several checkpoints of one run are averaged, weight by weight.
"""

import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_sft.base import files
from mcore_sft.base.progress import progress
from mcore_sft.base.terminal import Console
from mcore_sft.checkpoint import sharded, weights
from mcore_sft.checkpoint.describe import MODEL, RECORD, named_files, with_dtype, write_json
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.manifest import MANIFEST, read_manifest, reading, verify
from mcore_sft.checkpoint.safetensors_folder import SHARD_BYTES, write
from mcore_sft.data.text import chat_files
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.model import families
from mcore_sft.model.architecture import Architecture
from mcore_sft.runtime.device import torch_dtype

_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
_OF_OTHER_WEIGHTS = ("quantization_config", "compression_config", "auto_map")
"""What a base may say that is not so of plain weights without code beside them."""
_SMALL = "decoder.final_layernorm.weight"  # says what all are stored as


def export(
    checkpoint: Path,
    output: Path,
    *,
    others: Sequence[Path] = (),
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    console: Console | None = None,
) -> None:
    """Make the Hugging Face folder `output` of `checkpoint`, or of the mean of it and `others`.

    All files of the checkpoints are verified before any weight is read, and `output` is there once
    all of it is on the disk. Without `dtype`, the weights are stored as they were trained. Raises
    `CheckpointError`.
    """
    checkpoints = (checkpoint, *others)
    console = console or Console(quiet=True)
    with _new_folder(output) as folder:
        manifests = {path: _verified(path, console) for path in checkpoints}
        _require_one_run(checkpoints, manifests)
        _write_description(checkpoint, manifests[checkpoint], folder)
        _write_weights(checkpoints, folder, dtype, shard_bytes, console)
        record = _write_record(folder / RECORD, manifests)
    if record.get("chat_template") is False:
        console.print(
            f"{output}: no chat template, because the training texts held their own markup "
            "(a template that is verbatim); a server can be asked by its completions endpoint"
        )


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` once all of it is on the disk, and is removed otherwise.

    Raises `CheckpointError` if `output` holds anything, or cannot be made, or another export is
    at work on it.
    """
    taken = f"{output}: already there and not empty; remove it, or choose another"
    output = files.end_of_links(output)
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(taken)
        with files.new_folder(output) as folder:
            yield folder
    except files.Locked as held:
        raise CheckpointError(
            f"{output}: another export is writing it{held.by}. Fix: wait for it, or choose another "
            "--output"
        ) from None
    except files.Occupied:
        raise CheckpointError(taken) from None
    except OSError as error:
        raise CheckpointError(
            f"{output}: could not be written ({error}); make room, or choose another --output"
        ) from error


def _verified(path: Path, console: Console) -> dict[str, Any]:
    total = sum(file["bytes"] for file in read_manifest(path)["files"].values())
    with progress(f"verifying {path.name}", total=total, console=console) as done:
        return verify(path, done=done)


def _require_one_run(checkpoints: Sequence[Path], manifests: dict[Path, dict[str, Any]]) -> None:
    """Raise `CheckpointError` unless `checkpoints` are different steps of the same run."""
    first, *others = checkpoints
    for path in others:
        differ = list(_differences(manifests[first], manifests[path]))
        if differ:
            raise CheckpointError(
                f"{path} and {first} are not of one run: they differ in {', '.join(differ)}; "
                "average checkpoints of one run"
            )
    steps = [manifests[path]["progress"]["step"] for path in checkpoints]
    twice = {step for step in steps if steps.count(step) > 1}
    if twice:
        raise CheckpointError(f"step {min(twice)} is named twice; name each checkpoint once")


def _differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """What differs between two checkpoints that is the same in all checkpoints of a run."""
    described = (f"{MODEL}/config.json", f"{MODEL}/{RECORD}")
    sides = [
        manifest["progress"]["fixed"] | {name: manifest["files"].get(name) for name in described}
        for manifest in (one, other)
    ]
    for name in sorted((sides[0].keys() | sides[1].keys()) - {sharded.DATASET_BEFORE}):
        if sides[0].get(name) == sides[1].get(name):
            continue
        if name == "dataset" and _datasets(sides[0]) & _datasets(sides[1]):
            continue  # older versions knew the training packs by another fingerprint
        yield name


def _datasets(side: dict[str, Any]) -> set[Any]:
    return {side[name] for name in ("dataset", sharded.DATASET_BEFORE) if name in side}


def _write_description(checkpoint: Path, manifest: dict[str, Any], folder: Path) -> None:
    """Write what stands beside the weights, if it is of the model that was trained."""
    for name, content in named_files(checkpoint, manifest).items():
        place = folder / name.removeprefix(f"{MODEL}/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    for name in ("config.json", "tokenizer_config.json"):
        _leave_out(folder / name, _OF_OTHER_WEIGHTS)
    _require_as_trained(checkpoint, manifest, folder)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if "prompt" in record and "chat_template" not in record:  # an older version kept the base's
        tokenizer = load_tokenizer(folder)
        prompt = Prompt.restore(record["prompt"], tokenizer)
        chat_files.chat_as(tokenizer, prompt, folder)
        record["chat_template"] = prompt.chat_template is not None
        write_json(folder / RECORD, record)


def _leave_out(file: Path, keys: Collection[str]) -> None:
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in found.items() if key not in keys}
        if kept != found:
            write_json(file, kept)


def _require_as_trained(checkpoint: Path, manifest: dict[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` if config.json in `folder` is of another model than was trained."""
    trained = manifest["progress"]["fixed"].get("architecture", {})
    found = json.loads(json.dumps(asdict(families.read(folder))))
    differ = [
        f"{key} (got {found[key]}, trained with {value})"
        for key, value in trained.items()
        if key in found and found[key] != value
    ]
    if differ:
        raise CheckpointError(
            f"{checkpoint / MODEL / 'config.json'}: is not of the model that was trained: "
            f"{', '.join(differ)}; the base folder was changed during the run. Fix: export a "
            "checkpoint from before that"
        )


def _write_weights(
    checkpoints: Sequence[Path],
    folder: Path,
    dtype: str | None,
    shard_bytes: int,
    console: Console,
) -> None:
    architecture = families.read(folder)
    shapes = architecture.shapes()
    readers = [sharded.whole_tensors(path) for path in checkpoints]
    stored = torch_dtype(dtype) if dtype else readers[0](_SMALL).dtype
    if dtype:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", with_dtype(config, dtype))
    tensors = weights.export(_mean(readers, architecture), architecture)
    total = sum(math.prod(shape) for shape in shapes.values()) * stored.itemsize
    with progress("exporting", total=total, console=console) as done:
        # A loop over them would hold one while the next is read.
        write(folder, shapes, map(partial(_cast, stored, done), tensors), stored, shard_bytes)


def _mean(
    readers: Sequence[Callable[[str], Tensor]], architecture: Architecture
) -> Callable[[str], Tensor]:
    """A reader of the mean of a weight, in more digits than its own where there are several."""
    rows = {key: weight.rows for key, weight in architecture.weights().items()}

    def read(key: str) -> Tensor:
        # Without the rows that fill the vocabulary up: their number is the layout's.
        parts = (reader(key)[: rows[key]] for reader in readers)
        total = next(parts)
        if len(readers) > 1:
            total = total.to(_WIDER[total.dtype])
            for part in parts:
                total += part
            total /= len(readers)
        return total

    return read


def _cast(
    dtype: torch.dtype, done: Callable[[int], None], named: tuple[str, Tensor]
) -> tuple[str, Tensor]:
    """The same tensor as `dtype`; `CheckpointError` where a number is too large for it."""
    name, tensor = named
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not cast.isfinite().all():
        raise CheckpointError(
            f"{name} holds numbers up to {tensor.abs().max():g}, and {dtype} ends at "
            f"{torch.finfo(dtype).max:g}; export as bf16 or fp32"
        )
    done(cast.nbytes)
    return name, cast


def _write_record(path: Path, manifests: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Add to what the model was trained with the checkpoints that it is made of; returns it all."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    record["checkpoints"] = []
    for checkpoint, manifest in manifests.items():
        with reading(checkpoint):
            digest = files.sha256_of(checkpoint / MANIFEST)
        record["checkpoints"].append(
            {"step": manifest["progress"]["step"], "manifest_sha256": digest}
        )
    write_json(path, record)
    return record
