"""Hugging Face weights <-> Megatron-core weights: one table, read in both directions.

Every tensor of Megatron-core is, along its first dimension, a row of segments of Hugging Face
tensors: the query, key and value heads of each group in turn, or the gate above the up projection.
The table lists these segments. Loading reads the segments that this rank's shard covers; exporting
writes them back.

    model.safetensors -> (the slice of each tensor that this rank holds) -> model
    (whole Megatron tensor, one at a time) -> model.safetensors
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from mcore_sft.checkpoint.errors import CheckpointError
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.model.architecture import Architecture


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of the Hugging Face tensor `name`."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many rows it has."""
        return self.stop - self.start


Table = dict[str, tuple[Segment, ...]]


def table(architecture: Architecture) -> Table:
    """Megatron-core's name of each weight -> the segments that it is made of."""
    a = architecture
    rows: Table = {
        "embedding.word_embeddings.weight": _whole("model.embed_tokens.weight", a.vocab),
        "decoder.final_layernorm.weight": _whole("model.norm.weight", a.hidden),
    }
    if not a.tied:
        rows["output_layer.weight"] = _whole("lm_head.weight", a.vocab)
    for layer in range(a.layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        rows |= {
            f"{ours}.self_attention.linear_qkv.layer_norm_weight": _whole(
                f"{theirs}.input_layernorm.weight", a.hidden
            ),
            f"{ours}.self_attention.linear_qkv.weight": _heads_by_group(a, attention),
            f"{ours}.self_attention.linear_proj.weight": _whole(
                f"{attention}.o_proj.weight", a.hidden
            ),
            f"{ours}.mlp.linear_fc1.layer_norm_weight": _whole(
                f"{theirs}.post_attention_layernorm.weight", a.hidden
            ),
            f"{ours}.mlp.linear_fc1.weight": (
                *_whole(f"{mlp}.gate_proj.weight", a.intermediate),
                *_whole(f"{mlp}.up_proj.weight", a.intermediate),
            ),
            f"{ours}.mlp.linear_fc2.weight": _whole(f"{mlp}.down_proj.weight", a.hidden),
        }
    return rows


def load_pretrained(
    folder: SafetensorsFolder, model: torch.nn.Module, architecture: Architecture
) -> None:
    """Fill `model`, the part of it on this rank, reading no more of `folder` than that part."""
    rows = table(architecture)
    _require_same_tensors(folder, rows, architecture)
    with torch.no_grad():
        for shard in shards(model):
            if shard.key not in rows:
                raise CheckpointError(f"{shard.key}: no Hugging Face tensor is known for it")
            _require_same_shapes(folder, shard, rows[shard.key])
            for target, segment, columns in _covered(shard, rows[shard.key]):
                target.copy_(folder.read(segment.name, segment.start, segment.stop, columns))


def export(
    read_whole: Callable[[str], Tensor], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """Each Hugging Face tensor by name; `read_whole` gives Megatron-core's by its name."""
    for key, segments in table(architecture).items():
        source = read_whole(key)
        sizes = _sizes(segments).items()
        made = {name: source.new_empty(size, *source.shape[1:]) for name, size in sizes}
        first = 0
        for segment in segments:
            made[segment.name][segment.start : segment.stop] = source[first : first + segment.size]
            first += segment.size
        yield from made.items()


def shards(model: torch.nn.Module) -> Iterator[ShardedTensor]:
    """This rank's shard of every weight: its name, and where in the whole tensor it lies."""
    state = model.sharded_state_dict(prefix="")  # type: ignore[operator]
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value


def _sizes(segments: tuple[Segment, ...]) -> dict[str, int]:
    """Rows of each Hugging Face tensor that `segments` name."""
    sizes: dict[str, int] = {}
    for segment in segments:
        sizes[segment.name] = max(sizes.get(segment.name, 0), segment.stop)
    return sizes


def _require_same_tensors(folder: SafetensorsFolder, rows: Table, a: Architecture) -> None:
    """Raise `CheckpointError` if `folder` holds a weight that the model of its config has not."""
    known = {segment.name for segments in rows.values() for segment in segments}
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


def _require_same_shapes(
    folder: SafetensorsFolder, shard: ShardedTensor, segments: tuple[Segment, ...]
) -> None:
    for name, size in _sizes(segments).items():
        expected = [size, *shard.global_shape[1:]]
        if folder.shape(name) != expected:
            raise CheckpointError(
                f"{folder.folder}: {name} has shape {folder.shape(name)}, but config.json says "
                f"{expected}; the two do not belong together"
            )


def _whole(name: str, size: int) -> tuple[Segment, ...]:
    return (Segment(name, 0, size),)


def _heads_by_group(a: Architecture, attention: str) -> tuple[Segment, ...]:
    """For each key-value head: the query heads that share it, then its key, then its value."""
    queries, width = a.heads // a.kv_heads * a.head_dim, a.head_dim
    return tuple(
        segment
        for group in range(a.kv_heads)
        for segment in (
            Segment(f"{attention}.q_proj.weight", group * queries, (group + 1) * queries),
            Segment(f"{attention}.k_proj.weight", group * width, (group + 1) * width),
            Segment(f"{attention}.v_proj.weight", group * width, (group + 1) * width),
        )
    )


def _covered(
    shard: ShardedTensor, segments: tuple[Segment, ...]
) -> Iterator[tuple[Tensor, Segment, slice | None]]:
    """(part of the shard, the segment it is filled from, its columns); the padding is zeroed."""
    data, offset = shard.data, shard.global_offset
    columns = None
    if data.dim() > 1:
        columns = slice(offset[1], offset[1] + data.shape[1])
    first, last = offset[0], offset[0] + data.shape[0]
    at = 0
    for segment in segments:
        start, stop = max(first, at), min(last, at + segment.size)
        if start < stop:
            source = Segment(segment.name, segment.start + start - at, segment.start + stop - at)
            yield data[start - first : stop - first], source, columns
        at += segment.size
    data[max(0, at - first) :].zero_()
