import numpy as np
import pytest

from mcore_sft.data.indexed import IndexedTokens, write_index


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_is_written(tmp_path, dtype):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    np.arange(9, dtype=dtype).tofile(tmp_path / "train.v2.bin")
    lengths = np.array([4, 2, 3], dtype=np.int32)
    write_index(tmp_path / "train.v2.idx", lengths, np.dtype(dtype))
    theirs = indexed.IndexedDataset(str(tmp_path / "train.v2"))
    assert [sequence.tolist() for sequence in theirs] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]
    ours = IndexedTokens(tmp_path / "train.v2")
    assert [ours[i].tolist() for i in range(3)] == [sequence.tolist() for sequence in theirs]
    taken = ours.take(np.array([2, 0, 2]))
    assert [sequence.tolist() for sequence in taken] == [[6, 7, 8], [0, 1, 2, 3], [6, 7, 8]]
    assert {sequence.dtype for sequence in [ours[0], *taken]} == {np.dtype(np.int32)}
