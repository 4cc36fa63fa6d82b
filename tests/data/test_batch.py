import numpy as np

from mcore_sft.data.batch import IGNORE, collate
from mcore_sft.data.pack import Pack
from mcore_sft.data.prompt import Example


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
    assert batch.supervised == 3
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
