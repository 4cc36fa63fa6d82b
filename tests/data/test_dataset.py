import numpy as np
import pytest

from mcore_sft.data import manifest as manifests
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import write_index
from mcore_sft.data.packs.dataset import PackedDataset
from tests.data.test_manifest import MANIFEST

ARRAYS = {
    "spans": np.array([[1, 2], [0, 1], [3, 4]], dtype=np.int32),
    "span_offsets": np.array([0, 1, 1, 3]),
    "packs": np.array([2, 1, 0, 2]),
    "pack_offsets": np.array([0, 2, 4]),
    "supervised": np.array([1, 2], dtype=np.int32),
}


@pytest.fixture
def folder(tmp_path):
    """Three examples of 2, 3 and 4 tokens in two packs, the last of them in both."""
    write(tmp_path, [2, 3, 4])
    return tmp_path


def write(folder, lengths, **arrays):
    """A dataset of examples of these lengths; `arrays` stand for those of ARRAYS."""
    np.arange(sum(lengths), dtype=np.uint16).tofile(folder / "train.bin")
    write_index(folder / "train.idx", np.array(lengths, np.int32), np.dtype(np.uint16))
    for name, array in {**ARRAYS, **arrays}.items():
        np.save(folder / f"train.{name}.npy", array)
    written = sorted(folder.glob("train.*"))
    manifests.write(folder, {**MANIFEST, "files": manifests.describe_files(written)})


def test_packs_hold_their_examples_in_order(folder):
    dataset = PackedDataset(folder)
    packs = [dataset.pack(index) for index in range(len(dataset))]
    assert [[example.tokens.tolist() for example in pack.examples] for pack in packs] == [
        [[5, 6, 7, 8], [2, 3, 4]],
        [[0, 1], [5, 6, 7, 8]],
    ]
    assert [[example.spans.tolist() for example in pack.examples] for pack in packs] == [
        [[[0, 1], [3, 4]], []],
        [[[1, 2]], [[0, 1], [3, 4]]],
    ]
    first = packs[0].examples[0]
    assert first.tokens.dtype == first.spans.dtype == np.int32
    again = dataset.example(2)
    assert again.tokens.tolist() == first.tokens.tolist()
    assert again.spans.tolist() == first.spans.tolist()


@pytest.mark.parametrize(("unit", "tokens"), [(1, 7), (2, 8), (4, 8), (3, 9), (8, 16)])
def test_longest_pack_with_its_examples_filled_up(folder, unit, tokens):
    assert PackedDataset(folder).longest_pack(unit) == tokens


@pytest.mark.parametrize(
    ("length", "packs", "size"),
    [
        (17, 1, 9 * 9**2),
        (20, 1, (9 + 1) * 9**2),
        (40, 1, (9 + 1) * 23**2),  # of padding
        (20, 3, 3 * 10 * 20**2),
    ],
)
def test_largest_attention_counts_what_fills_the_rows_up(folder, length, packs, size):
    """One pack: a document of nine tokens and eight of one."""
    write(
        folder,
        [9, 1],
        packs=np.array([0, *8 * [1]]),
        pack_offsets=np.array([0, 9]),
        supervised=np.array([1], np.int32),
        span_offsets=np.array([0, 1, 1]),
    )
    assert PackedDataset(folder).largest_attention(length, packs) == size


def test_example_in_two_packs_counts_twice(folder):
    dataset = PackedDataset(folder)
    assert (dataset.num_examples, dataset.num_distinct) == (4, 3)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([0, 2, 4], dtype=np.int32), r"holds int32 \[3\], expected int64 with 1 dim"),
        (np.array([[0, 2, 4]]), r"holds int64 \[1, 3\], expected int64 with 1 dim"),
        (np.array([None, 2]), r"not an array file"),
    ],
)
def test_array_of_another_kind_is_named(folder, array, said):
    np.save(folder / "train.pack_offsets.npy", array)
    manifest = manifests.read(folder)
    files = manifests.describe_files(folder.glob("train.*"))
    manifests.write(folder, {**manifest, "files": files})
    with pytest.raises(DataError, match=rf"train\.pack_offsets\.npy: {said}"):
        PackedDataset(folder)
