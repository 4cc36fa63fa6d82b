"""A distributed checkpoint in, a Hugging Face folder out, one tensor at a time in one process.

step_N/ -> config.json, generation_config.json, tokenizer, *.safetensors, mcore_sft.json
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from mcore_sft.checkpoint import sharded, weights
from mcore_sft.checkpoint.describe import MODEL, RECORD
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.safetensors_folder import SHARD_BYTES, write
from mcore_sft.model import architecture as arch


def export(checkpoint: Path, output: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Make the Hugging Face folder `output` from `checkpoint`, whose files are verified first."""
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(
            f"{output}: already there and not empty; remove it, or choose another"
        )
    manifest = sharded.verify(checkpoint)
    architecture = arch.read(checkpoint / MODEL)
    temporary = output.parent / f".{output.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint / MODEL, temporary)
    tensors = weights.export(sharded.whole_tensors(checkpoint), architecture)
    write(temporary, _shown(tensors, len(_names(architecture))), shard_bytes)
    record = json.loads((temporary / RECORD).read_text(encoding="utf-8"))
    record["step"] = manifest["progress"]["step"]
    (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        output.rmdir()
    temporary.rename(output)


def _names(architecture: arch.Architecture) -> set[str]:
    return {segment.name for row in weights.table(architecture).values() for segment in row}


def _shown(tensors: Iterator[tuple[str, Tensor]], count: int) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with a bar on the console."""
    columns = (
        TextColumn("exporting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=count)
        for name, tensor in tensors:
            yield name, tensor
            bar.advance(task)
