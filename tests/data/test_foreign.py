from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.foreign import count_megatron, is_bridge, read_bridge, read_megatron

# Three documents: two sequences, none, one.
DOCUMENTS = [[[5, 6, 7], [8, 9]], [], [[10, 11, 12, 13]]]
FLAGS = [[[1, 0, 1], [1, 0]], [], [[0, 1, 0, 1]]]


@pytest.fixture(scope="module")
def indexed():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.fixture
def write(indexed, tmp_path):
    """Write documents as Megatron-LM does; returns the .idx."""

    def write(name, documents, dtype=np.int32, multimodal=False):
        torch = pytest.importorskip("torch")
        builder = indexed.IndexedDatasetBuilder(
            str(tmp_path / f"{name}.bin"), dtype=dtype, multimodal=multimodal
        )
        for document in documents:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
        return tmp_path / f"{name}.idx"

    return write


def plain(examples):
    """Each example as its tokens, its spans and its row."""
    assert examples.tokens.dtype == examples.lengths.dtype == np.int32
    assert examples.spans.dtype == examples.span_counts.dtype == np.int32
    assert examples.rows.dtype == np.int64
    tokens, spans = iter(examples.tokens.tolist()), iter(examples.spans.tolist())
    columns = (examples.lengths.tolist(), examples.span_counts.tolist(), examples.rows.tolist())
    made = [
        (list(islice(tokens, length)), list(islice(spans, count)), row)
        for length, count, row in zip(*columns, strict=True)
    ]
    assert not [*tokens, *spans]
    return made


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2"])
def test_documents_of_megatron_with_their_mask(write, dtype):
    file = write("my.v1_text", DOCUMENTS, np.dtype(dtype).type)
    mask = write("my.v1_mask", FLAGS, np.uint8)
    assert count_megatron(file) == 3
    assert plain(read_megatron(file, mask, 0, 3)) == [
        ([5, 6, 7, 8, 9], [[2, 4]], 0),  # token 0 is predicted by nothing; 7, 8 are one run
        ([], [], 1),
        ([10, 11, 12, 13], [[1, 2], [3, 4]], 2),
    ]
    assert plain(read_megatron(file, mask, 2, 3)) == [([10, 11, 12, 13], [[1, 2], [3, 4]], 0)]
    assert plain(read_megatron(file, mask, 1, 1)) == []


def test_all_tokens_of_megatron(write):
    file = write("text", [*DOCUMENTS, [[4]]])
    assert [spans for _, spans, _ in plain(read_megatron(file, "all", 0, 4))] == [
        [[1, 5]],
        [],
        [[1, 4]],
        [],
    ]


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_megatron_without_a_token(write, documents):
    file = write("text", documents)
    assert count_megatron(file) == len(documents)
    expected = [([], [], row) for row in range(len(documents))]
    assert plain(read_megatron(file, "all", 0, len(documents))) == expected


def test_modes_of_megatron_are_passed_over(write):
    file = write("text", DOCUMENTS, multimodal=True)
    assert file.stat().st_size == 34 + 3 * 20 + 4 * 8 + 3 - 3 * 8
    assert plain(read_megatron(file, "all", 2, 3)) == [([10, 11, 12, 13], [[1, 4]], 0)]


def put(file, at, number, size):
    raw = bytearray(file.read_bytes())
    raw[at : at + size] = number.to_bytes(size, "little", signed=True)
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda i: put(i.with_suffix(".bin"), 16, -2, 4), r"sequence 1: holds -2, expected 0 to 2"),
        (lambda i: put(i, 17, 6, 1), r"text\.idx: holds fractions \(dtype code 6\)"),
        (lambda i: put(i, 17, 9, 1), r"text\.idx: not the index of a token file"),
        (lambda i: put(i, 38, 3, 4), r"text\.idx: sequence 2: 4 tokens at byte 20, .* at byte 24"),
        (lambda i: put(i, 34, -1, 4), r"text\.idx: sequence 0: -1 tokens at byte 0"),
        (lambda i: put(i, 46, 4, 8), r"text\.idx: sequence 0: 3 tokens at byte 4, .* at byte 0"),
        (lambda i: put(i, 78, 3, 8), r"text\.idx: document 1: goes from sequence 3 to 2"),
        (lambda i: put(i, 94, 2, 8), r"documents do not go from sequence 0 to 3"),
        (lambda i: i.with_suffix(".bin").write_bytes(b"1"), r"text\.bin: 1 bytes, .* describes 36"),
        (lambda i: i.write_bytes(i.read_bytes()[:-1]), r"text\.idx: 101 bytes, .* describes 102"),
        (lambda i: i.with_suffix(".bin").unlink(), r"text\.bin: cannot be read \(No such file"),
    ],
)
def test_damage_of_megatron_is_named(write, damage, said):
    file = write("text", DOCUMENTS)
    damage(file)
    with pytest.raises(DataError, match=rf"{said}.*; write it again"):
        read_megatron(file, "all", 0, 3)


def test_damage_in_the_middle_of_a_file_is_named(write):
    file = write("text", DOCUMENTS)
    put(file, 34 + 3 * 4 + 2 * 8, 16, 8)  # the last sequence begins within the one before it
    put(file, 34 + 2 * 4, 5, 4)
    with pytest.raises(DataError, match=r"sequence 2: 5 tokens at byte 16, .* at byte 20"):
        read_megatron(file, "all", 2, 3)
    put(file, 34 + 3 * 12 + 8, 7, 8)
    with pytest.raises(DataError, match=r"document 0: goes from sequence 0 to 7, .* 0 to 3"):
        read_megatron(file, "all", 0, 1)


def test_token_too_large_is_named(write):
    file = write("text", [[[1, 2]], [[3, 1 << 40]]], np.int64)
    with pytest.raises(DataError, match=r"text\.idx: sequence 1: holds 1099511627776, expected 0"):
        read_megatron(file, "all", 0, 2)
    assert plain(read_megatron(file, "all", 0, 1)) == [([1, 2], [[1, 2]], 0)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([[[1, 0, 1], [1, 0]]], r"mask\.idx: 2 sequences, but .*text\.idx has 3"),
        ([[[1, 0, 1]], [[1]], [[1, 0, 1, 1]]], r"mask\.idx: sequence 1: 1 flags, but .* has 2 tok"),
        ([[[1, 0, 1], [1, 0]], [[0, 1, 2, 0]]], r"mask\.idx: sequence 2: holds 2, expected 0 to 1"),
    ],
)
def test_mask_of_something_else_is_named(write, flags, said):
    file, mask = write("text", DOCUMENTS), write("mask", flags, np.uint8)
    with pytest.raises(DataError, match=said):
        read_megatron(file, mask, 0, 3)


def packs(*rows):
    """A table of (input_ids, loss_mask, seq_start_id), as Megatron-Bridge types its columns."""
    ids, mask, starts = zip(*rows, strict=True)
    return pa.table(
        {
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "loss_mask": pa.array(mask, pa.list_(pa.int8())),
            "seq_start_id": pa.array(starts, pa.list_(pa.int32())),
        }
    )


def test_packs_of_bridge_become_their_examples():
    table = packs(
        # Trained: 12, 13 of the first; 22, 24 of the second. A last entry says nothing.
        ([11, 12, 13, 21, 22, 23, 24], [1, 1, 1, 1, 0, 1, 1], [0, 3]),
        ([31, 32], [0, 0], [0]),
    )
    expected = [
        ([11, 12, 13], [[1, 3]], 0),
        ([21, 22, 23, 24], [[1, 2], [3, 4]], 0),
        ([31, 32], [], 1),
    ]
    assert is_bridge(table.schema)
    assert plain(read_bridge(table, name="f", first=1, eos=0)) == expected
    assert plain(read_bridge(table.slice(1), name="f", first=2, eos=0)) == [([31, 32], [], 0)]
    assert plain(read_bridge(table.slice(0, 0), name="f", first=1, eos=0)) == []


def test_packs_of_bridge_from_a_file_of_several_row_groups(tmp_path):
    rows = packs(*[([1, 2, 3 + row], [1, 0, 0], [0]) for row in range(5)])
    large = rows.set_column(0, "input_ids", rows["input_ids"].cast(pa.large_list(pa.int64())))
    flags = rows["loss_mask"].cast(pa.list_(pa.bool_()))
    large = large.set_column(1, "loss_mask", flags)
    pq.write_table(large, tmp_path / "packed.parquet", row_group_size=2)
    table = pq.read_table(tmp_path / "packed.parquet")
    assert plain(read_bridge(table, name="f", first=1, eos=0)) == [
        ([1, 2, 3 + row], [[1, 2]], row) for row in range(5)
    ]


def test_padding_of_bridge_is_left_out():
    """0 ends each example; what follows it fills up, though the mask says 1 there too."""
    table = packs(([7, 8, 0, 0, 0, 0, 0, 7, 0, 0], [1, 1, 1, 1, 1, 0, 1, 0, 0, 0], [0, 5, 7]))
    assert plain(read_bridge(table, name="f", first=1, eos=0)) == [
        ([7, 8, 0], [[1, 3]], 0),
        ([0], [], 0),  # its first token does not repeat the one before it
        ([7, 0], [], 0),
    ]


@pytest.mark.parametrize("eos", [0, 3, None])
def test_tokens_that_repeat_and_are_no_padding_stay(eos):
    last = 8 if eos == 0 else 0
    ids = [0, 0, 7, last, last, last, 5, 0, 0, 9, 9]
    expected = [(ids[:6], [[1, 6]], 0), (ids[6:], [[1, 5]], 0)]
    table = packs((ids, [1] * len(ids), [0, 6]))
    assert plain(read_bridge(table, name="f", first=1, eos=eos)) == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (([1, 2], [0], [0]), "2 input_ids, but a loss_mask of 1"),
        (([1, -2], [0, 0], [0]), r"input_ids\[1\] is -2, expected 0 to 2147483647"),
        (([1, None], [0, 0], [0]), r"input_ids\[1\] is None"),
        (([1, 2], [0, 2], [0]), r"loss_mask\[1\] is 2, expected 0 to 1"),
        ((None, [0, 0], [0]), "input_ids is null"),
        (([1, 2], [0, 0], []), "seq_start_id is empty"),
        (([1, 2], [0, 0], [1]), "an example from 1 to 2 in seq_start_id"),
        (([1, 2], [0, 0], [0, 0]), "an example from 0 to 0 in seq_start_id"),
        (([1, 2, 3], [0, 0, 0], [0, 2, 1]), "an example from 2 to 1 in seq_start_id"),
        (([1, 2], [0, 0], [0, 2]), "an example from 2 to 2 in .* within 2 tokens"),
    ],
)
def test_damage_of_bridge_is_named(row, said):
    table = packs(([1, 2, 3], [0, 1, 0], [0, 2]), row)
    with pytest.raises(DataError, match=rf"packed\.parquet:8: {said}.*; write it again"):
        read_bridge(table, name="packed.parquet", first=7, eos=0)


def test_tables_that_are_not_of_bridge():
    assert not is_bridge(packs(([1], [0], [0])).drop_columns("loss_mask").schema)
    assert not is_bridge(pa.schema([(n, pa.string()) for n in ("input_ids", "loss_mask")]))
    columns = ("input_ids", "loss_mask", "seq_start_id")
    assert not is_bridge(pa.schema([(name, pa.string()) for name in columns]))
