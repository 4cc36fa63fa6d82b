from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from mcore_sft.data.packs.batch import IGNORE, collate
from mcore_sft.data.packs.pack import Pack
from mcore_sft.data.text.prompt import Example


def example(tokens: list[int], *spans: tuple[int, int]) -> Example:
    return Example(
        tokens=np.array(tokens, dtype=np.int32),
        spans=np.array(spans, dtype=np.int32).reshape(-1, 2),
    )


PACK = Pack(examples=(example([10, 11, 12, 13], (2, 4)), example([20, 21], (1, 2))))


def test_pack_is_laid_out_with_padding_as_a_document():
    batch = collate([PACK], 8, pad_id=9)
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 20, 21, 9, 9]]
    # The token at p is predicted by the row before it, and no row predicts across documents.
    i = IGNORE
    assert batch.labels.tolist() == [[i, 12, 13, i, 21, i, i, i]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert batch.starts.tolist() == [0, 4, 6, 8]
    assert batch.rows.tolist() == [1, 2, 4]
    assert (batch.length, batch.longest, batch.useful, batch.examples) == (8, 4, 6, 2)
    assert (batch.supervised, batch.squares) == (3, 4 * 4 + 2 * 2)
    kinds = {batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype, batch.rows.dtype}
    assert [str(kind) for kind in kinds] == ["torch.int64"]
    assert str(batch.starts.dtype) == "torch.int32"


def test_full_pack_has_no_padding_document():
    batch = collate([PACK], 6, pad_id=9)
    assert batch.starts.tolist() == [0, 4, 6]
    assert batch.useful == 6


def test_several_packs_are_joined_each_filled_up():
    batch = collate([PACK, Pack.empty(), PACK], 7, pad_id=9)
    assert batch.tokens.shape == (1, 21)
    assert batch.starts.tolist() == [0, 4, 6, 7, 14, 18, 20, 21]
    assert batch.rows.tolist() == [1, 2, 4, 15, 16, 18]
    assert (batch.longest, batch.useful, batch.examples) == (7, 12, 4)


def test_batch_without_anything_to_learn():
    batch = collate([Pack.empty()], 4, pad_id=9)
    assert batch.labels.tolist() == [[IGNORE] * 4]
    assert batch.starts.tolist() == [0, 4]
    assert (batch.supervised, batch.useful, batch.examples) == (0, 0, 0)


def test_pad_id_within_an_example_is_learned_like_any_token():
    batch = collate([Pack(examples=(example([9, 9, 9], (1, 3)),))], 4, pad_id=9)
    assert batch.labels.tolist() == [[9, 9, IGNORE, IGNORE]]


def test_first_token_is_predicted_by_nothing():
    batch = collate([Pack(examples=(example([5, 6], (0, 2)),))], 2, pad_id=9)
    assert batch.labels.tolist() == [[6, IGNORE]]


def test_other_device_holds_the_same_batch():
    batch = collate([PACK], 8, pad_id=9)
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.labels.device.type == "meta"
    assert moved.rows.device.type == "cpu"
    assert moved.useful == batch.useful
    assert moved.supervised == batch.supervised


def test_context_ranks_share_each_document_from_both_ends():
    ranks = [collate([PACK], 16, pad_id=9, context=2, rank=rank) for rank in range(2)]
    i = IGNORE
    # Of four parts of each document, rank 0 has the first and the last, rank 1 those between.
    assert ranks[0].tokens.tolist() == [[10, 13, 20, 9, 9, 9, 9, 9]]
    assert ranks[1].tokens.tolist() == [[11, 12, 21, 9, 9, 9, 9, 9]]
    assert ranks[0].positions.tolist() == [[0, 3, 0, 3, 0, 1, 6, 7]]
    assert ranks[1].positions.tolist() == [[1, 2, 1, 2, 2, 3, 4, 5]]
    assert ranks[0].labels.tolist() == [[i, i, 21, i, i, i, i, i]]
    assert ranks[1].labels.tolist() == [[12, 13, i, i, i, i, i, i]]
    assert [batch.rows.tolist() for batch in ranks] == [[2], [0, 1]]
    for batch in ranks:
        assert batch.starts.tolist() == [0, 4, 8, 16]
        assert (batch.length, batch.longest) == (8, 8)
    assert [batch.useful for batch in ranks] == [3, 3]
    assert [batch.examples for batch in ranks] == [2, 0]


@pytest.mark.parametrize("context", [2, 3, 4])
def test_context_ranks_have_together_what_one_has(context):
    length = 12 * context
    packs = [PACK, Pack.empty(), PACK]
    ranks = [
        collate(packs, length, pad_id=9, context=context, rank=rank) for rank in range(context)
    ]
    whole = collate(packs, length, pad_id=9)
    for count in ("supervised", "useful", "examples"):
        assert sum(getattr(batch, count) for batch in ranks) == getattr(whole, count)
    pairs = [
        {
            (token, label)
            for batch in batches
            for token, label in zip(batch.tokens[0].tolist(), batch.labels[0].tolist(), strict=True)
        }
        for batches in (ranks, [whole])
    ]
    assert pairs[0] == pairs[1]
    assert {batch.length for batch in ranks} == {len(packs) * length // context}


class PinnedAlone(TorchFunctionMode):
    """A GPU that takes what is pinned, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if func is torch.Tensor.to:
            assert any(args[0] is x for x in self.pinned)
            return args[0]
        return func(*args, **(kwargs or {}))


def test_what_a_gpu_is_sent_is_pinned():
    batch = collate([PACK], 8, pad_id=9)
    with PinnedAlone() as gpu:
        sent = batch.to("cuda")
    assert any(sent.rows is x for x in gpu.pinned)  # the loss sends them on
    assert len(gpu.pinned) == 5
    assert sent.tokens.tolist() == batch.tokens.tolist()
    assert batch.to("cpu").rows is batch.rows
