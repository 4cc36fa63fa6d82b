"""Hugging Face weights <-> Megatron-core weights: a family's table, read in both directions.

Loading reads the segments that this rank's shard of a weight covers; exporting writes them back.

    model.safetensors -> (the slice of each tensor that this rank holds) -> model
    (whole Megatron tensor, one at a time) -> model.safetensors
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mcore_sft.base.errors import UserError
from mcore_sft.base.model_folder import INDEX, SINGLE
from mcore_sft.base.progress import progress
from mcore_sft.base.terminal import Console
from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.model.architecture import Architecture
from mcore_sft.model.weight_table import Segment, Table, Weight
from mcore_sft.runtime.device import dtype_name
from mcore_sft.runtime.mesh import Mesh

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel


def load_pretrained(
    folder: SafetensorsFolder,
    model: Sequence[DistributedDataParallel],
    architecture: Architecture,
    mesh: Mesh,
    console: Console | None = None,
) -> None:
    """Fill `model`, the part of it on this rank, reading no more of `folder` than that part.

    Collective: what is wrong on any rank is the same `UserError` on all.
    """
    console = console or Console(quiet=True)
    parts = [shard for chunk in model for shard in shards(chunk.module)]
    problem: UserError | None = None
    try:
        for line in _said(folder, architecture.shapes(), parts[0].data.dtype):
            console.print(line, soft_wrap=True)
        _load(folder, parts, architecture, console)
    except UserError as error:
        problem = error
    problems = mesh.from_all(str(problem) if problem else None)
    if first := next(filter(None, problems), None):
        raise CheckpointError(first)


def _load(
    folder: SafetensorsFolder,
    parts: Sequence[ShardedTensor],
    architecture: Architecture,
    console: Console,
) -> None:
    table = architecture.weights()
    _require_same_tensors(folder, table, architecture)
    total = sum(shard.data.nbytes for shard in parts)
    with torch.no_grad(), progress("loading weights", total=total, console=console) as done:
        for shard in parts:
            if shard.key not in table:
                raise CheckpointError(f"{shard.key}: no Hugging Face tensor is known for it")
            _require_same_shapes(folder, table[shard.key])
            for target, segment, columns in _covered(shard, table[shard.key]):
                target.copy_(folder.read(segment.name, segment.start, segment.stop, columns))
            done(shard.data.nbytes)
        _require_finite(folder, parts, table)


def _require_finite(
    folder: SafetensorsFolder, parts: Sequence[ShardedTensor], table: Table
) -> None:
    """Raise `CheckpointError` naming the tensors in which this rank has read a NaN or an infinity.

    The extremes of each weight say it in one pass without a copy, and a GPU is waited for once.
    """
    extremes = torch.stack([torch.stack(torch.aminmax(shard.data)) for shard in parts])
    finite = torch.isfinite(extremes).all(1).tolist()
    bad = {
        segment.name: None
        for shard, good in zip(parts, finite, strict=True)
        if not good
        for target, segment, _ in _covered(shard, table[shard.key])
        if not torch.isfinite(target).all()
    }
    if bad:
        first, *others = bad
        more = f" and in {len(others)} more tensors" if others else ""
        raise CheckpointError(
            f"{folder.folder}: a NaN or an infinity in {first}{more}; copy the model again, or "
            "take another (model.path)"
        )


def _said(folder: SafetensorsFolder, names: Iterable[str], dtype: torch.dtype) -> Iterator[str]:
    """Lines on what is read, and from which values the fp32 main weights of a run start.

    They are copied from the model's own weights, which have `dtype`.
    """
    if folder.ignores_index:
        yield (
            f"{folder.folder}: {SINGLE} is read, as transformers does, and not the files of the "
            f"{INDEX} beside it"
        )
    stored = folder.types(names)
    if stored.keys() == {"fp32"} and dtype == torch.float32:
        return
    ours = dtype_name(dtype)
    exact = _EXACT[ours]
    rounded = " and ".join(sorted(stored.keys() - exact))
    yield (
        f"base weights in {' and '.join(sorted(stored))}: the fp32 main weights start from "
        + (f"them, {rounded} rounded to {ours}" if rounded else "exactly these values")
    )


_EXACT = {"fp32": {"fp32", "bf16", "fp16"}, "bf16": {"bf16"}}
"""Type of the model's weights -> the types all of whose values it has."""


def export(
    read_whole: Callable[[str], Tensor], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """Each Hugging Face tensor by name; `read_whole` gives Megatron-core's by its name."""
    for key, weight in architecture.weights().items():
        yield from _taken_apart(read_whole(key), weight).items()


def shards(model: torch.nn.Module) -> Iterator[ShardedTensor]:
    """This rank's shard of every weight: its name, and where in the whole tensor it lies."""
    state = model.sharded_state_dict(prefix="")  # type: ignore[operator]
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value


def _taken_apart(source: Tensor, weight: Weight) -> dict[str, Tensor]:
    """The Hugging Face tensors that `source` is made of."""
    if len(weight.segments) == 1:
        return {weight.segments[0].name: source[: weight.rows]}
    made = {name: source.new_empty(shape) for name, shape in weight.shapes.items()}
    first = 0
    for segment in weight.segments:
        made[segment.name][segment.start : segment.stop] = source[first : first + segment.size]
        first += segment.size
    return made


def _require_same_tensors(folder: SafetensorsFolder, table: Table, a: Architecture) -> None:
    """Raise `CheckpointError` if `folder` holds a weight that the model of its config has not."""
    known = {segment.name for weight in table.values() for segment in weight.segments}
    surplus = {name for name in folder.names() - known if not name.endswith("rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if a.tied and head in surplus:
        if not torch.equal(folder.read(head, 0, a.vocab), folder.read(embedding, 0, a.vocab)):
            raise CheckpointError(
                f"{folder.folder}: config.json ties {head} to the embedding, but the two differ; "
                "set tie_word_embeddings to false, or remove the head"
            )
        surplus.remove(head)
    if surplus:
        raise CheckpointError(
            f"{folder.folder}: holds {sorted(surplus)[0]} and {len(surplus) - 1} more tensors that "
            "the model of config.json does not have; the two do not belong together"
        )


def _require_same_shapes(folder: SafetensorsFolder, weight: Weight) -> None:
    for name, shape in weight.shapes.items():
        if folder.shape(name) != list(shape):
            raise CheckpointError(
                f"{folder.folder}: {name} has shape {folder.shape(name)}, but config.json says "
                f"{list(shape)}; the two do not belong together"
            )


def _covered(
    shard: ShardedTensor, weight: Weight
) -> Iterator[tuple[Tensor, Segment, slice | None]]:
    """(part of the shard, the segment it is filled from, its columns); the padding is zeroed."""
    data, offset = shard.data, shard.global_offset
    columns = None
    if data.dim() > 1:
        columns = slice(offset[1], offset[1] + data.shape[1])
    first, last = offset[0], offset[0] + data.shape[0]
    at = 0
    for segment in weight.segments:
        start, stop = max(first, at), min(last, at + segment.size)
        if start < stop:
            moved = segment.start - at
            source = replace(segment, start=moved + start, stop=moved + stop)
            yield data[start - first : stop - first], source, columns
        at += segment.size
    data[max(0, at - first) :].zero_()
