"""The compiled passes over rows of logits against autograd in fp64.

They run on the CPU, on CUDA where that is, and csrc/cuda runs on the CPU too, as on an H100 and an
A100.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mcore_sft.ops import library
from tests.ops.rows import BF16, FP32, FP64, Where, check, draw, in_one, in_shards


@pytest.fixture(
    params=[
        *(Where("cpu", dtype) for dtype in (FP32, BF16, FP64)),
        *(Where("cpu", dtype, capability=9) for dtype in (FP32, BF16)),
        *(pytest.param(Where("cpu", dtype, 8), marks=pytest.mark.slow) for dtype in (FP32, BF16)),
        *(pytest.param(Where("cuda", dtype), marks=pytest.mark.gpu) for dtype in (FP32, BF16)),
    ],
    ids=str,
)
def where(request: pytest.FixtureRequest) -> Where:
    found: Where = request.param
    return found.load()


# Fewer columns than a vector holds, rows that start anywhere, more than the threads read at once,
# and Llama 3's vocabulary.
@pytest.mark.parametrize("vocab_size", [1, 7, 701, 8191, 40000, 128256])
@pytest.mark.parametrize("padding", [0, 19])
def test_one_shard(where: Where, vocab_size: int, padding: int) -> None:
    rows = draw(where.dtype, vocab_size, padding)
    check(in_one(rows, where), rows)


@pytest.mark.parametrize(("vocab_size", "padding"), [(7, 1), (701, 899), (9001, 1234)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards(where: Where, vocab_size: int, padding: int, size: int) -> None:
    """Of four shards of 400 columns the third and fourth hold little or nothing but padding."""
    rows = draw(where.dtype, vocab_size, padding)
    check(in_shards(rows, where, size), rows)


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0), (1e4, 0), (3, 1e4), (3, -1e4)])
def test_small_and_large_logits(where: Where, scale: float, shift: float) -> None:
    rows = draw(where.dtype, 701, scale=scale)
    rows.logits.add_(shift)
    check(in_one(rows, where), rows)
    check(in_shards(rows, where, 2), rows)


def test_no_row_and_no_column(where: Where) -> None:
    rows = draw(where.dtype, 40)
    none = replace(rows, logits=rows.logits[:0], labels=rows.labels[:0], factors=rows.factors[:0])
    for found in (in_one(none, where), in_shards(none, where, 2)):
        assert found.statistics.shape == (0, 3)
    padding = replace(rows, width=0)
    found = in_one(padding, where)
    lowest = torch.finfo(found.statistics.dtype).min
    assert found.statistics.tolist() == [[lowest, 0, 0]] * 4
    assert not found.gradient.any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 350, 700])
def test_nan_and_inf_reach_their_row_and_no_other(where: Where, poison: float, column: int) -> None:
    clean = draw(where.dtype, 701)
    logits = clean.logits.clone()
    logits[0, column] = logits[2, column] = poison  # row 2 has factor 0
    poisoned = replace(clean, logits=logits)
    for found, untouched in (
        (in_one(poisoned, where), in_one(clean, where)),
        (in_shards(poisoned, where, 2), in_shards(clean, where, 2)),
    ):
        assert found.statistics[[0, 2], 1].isnan().all()
        assert found.gradient[0].isnan().all()
        assert not found.gradient[2].any()
        for a, b in zip(found, untouched, strict=True):
            assert torch.equal(a[[1, 3]], b[[1, 3]])


def test_a_column_at_minus_infinity_has_no_share(where: Where) -> None:
    rows = draw(where.dtype, 701)
    rows.labels[0] = 3
    rows.logits[0, 350:] = -torch.inf
    alone = replace(rows, logits=rows.logits[:1, :350], labels=rows.labels[:1], width=350)
    alone = replace(alone, logits=alone.logits.contiguous(), factors=rows.factors[:1])
    for run in (in_one, lambda rows, where: in_shards(rows, where, 3)):
        found, expected = run(rows, where), run(alone, where)
        assert torch.allclose(found.statistics[0], expected.statistics[0], rtol=1e-6)
        assert not found.gradient[0, 350:].any()


@pytest.mark.parametrize("vocab_size", [704, 40000])
def test_the_same_bits_again_and_in_other_company(where: Where, vocab_size: int) -> None:
    rows = draw(where.dtype, vocab_size, padding=8)
    first = in_one(rows, where)
    last = replace(rows, logits=rows.logits[3:], labels=rows.labels[3:], factors=rows.factors[3:])
    for again, alone, whole in zip(in_one(rows, where), in_one(last, where), first, strict=True):
        assert torch.equal(again, whole)
        assert torch.equal(alone, whole[3:])


def test_wrong_inputs_are_named(where: Where) -> None:
    rows = draw(where.dtype, 40)

    def run(**wrong: object) -> None:
        in_one(replace(rows, **wrong), where)

    with pytest.raises(RuntimeError, match="logits"):
        run(logits=rows.logits.half())
    with pytest.raises(RuntimeError, match="logits"):
        run(logits=rows.logits.t().contiguous().t())
    with pytest.raises(RuntimeError, match="labels"):
        run(labels=rows.labels.int())
    with pytest.raises(RuntimeError, match="labels"):
        run(labels=rows.labels[:3])
    with pytest.raises(RuntimeError, match="factors"):
        run(factors=rows.factors[:3])
    with pytest.raises(RuntimeError, match="width is 41, expected 0 to 40"):
        run(width=41)


def test_the_number_of_threads_changes_no_bit() -> None:
    library.load()
    rows = draw(FP32, 5000)
    many = replace(
        rows,
        logits=rows.logits.repeat(16, 1),
        labels=rows.labels.repeat(16),
        factors=rows.factors.repeat(16),
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = in_one(many, Where("cpu", FP32))
        torch.set_num_threads(5)
        five = in_one(many, Where("cpu", FP32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, five, strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets(capability: str) -> None:
    """The tests above once more, in a process where torch and we may use no more than this."""
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", __file__, "-k", "cpu"],
        env=dict(os.environ, ATEN_CPU_CAPABILITY=capability),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
