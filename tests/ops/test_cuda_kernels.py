"""csrc/cuda on the CPU, and on CUDA where that is: rows so wide that an H100 takes four blocks for
each, and what only an emulation can tell. Narrow rows are in test_cross_entropy_rows.py.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.ops import emulation
from tests.ops.rows import BF16, FP32, Result, Rows, Where, check, draw, in_one, in_shards

EMULATED = [Where("cpu", dtype, capability) for capability in (8, 9) for dtype in (FP32, BF16)]
REAL = [pytest.param(Where("cuda", dtype), marks=pytest.mark.gpu) for dtype in (FP32, BF16)]
WIDE = 16411  # beside 2048 whole vectors of bf16 some elements before and after them


@pytest.fixture(params=[*EMULATED, *REAL], ids=str)
def gpu(request: pytest.FixtureRequest) -> Where:
    found: Where = request.param
    return found.load()


@pytest.fixture(params=EMULATED, ids=str)
def emulated(request: pytest.FixtureRequest) -> Where:
    found: Where = request.param
    return found.load()


def wide(gpu: Where, width: int = WIDE, padding: int = 5, offset: int = 3) -> Rows:
    return replace(draw(gpu.dtype, width, padding), offset=offset)


def assert_close(found: Result, expected: Result) -> None:
    """But for the last bits of the exponential function and of a sum."""
    assert torch.equal(found.statistics[:, [0, 2]], expected.statistics[:, [0, 2]])
    assert torch.allclose(found.statistics, expected.statistics, rtol=4e-6, equal_nan=True)
    rounding = 2e-6 if found.gradient.dtype == FP32 else 2**-7
    assert torch.allclose(
        found.gradient, expected.gradient, rtol=rounding, atol=1e-9, equal_nan=True
    )


@pytest.mark.parametrize(("width", "padding", "offset"), [(WIDE, 5, 3), (20000, 0, 0)])
def test_wide_rows(gpu: Where, width: int, padding: int, offset: int) -> None:
    rows = wide(gpu, width, padding, offset)
    found = in_one(rows, gpu)
    check(found, rows)
    assert_close(found, in_one(rows, Where("cpu", gpu.dtype)))
    check(in_shards(rows, gpu, 2), rows)


@pytest.mark.slow
@pytest.mark.parametrize("width", [16384, WIDE, 32000, 128256, 151936, 200003])
@pytest.mark.parametrize("padding", [0, 1, 64])
@pytest.mark.parametrize("offset", range(8))
def test_every_width_pitch_and_offset(gpu: Where, width: int, padding: int, offset: int) -> None:
    test_wide_rows(gpu, width, padding, offset)


def first(rows: Rows) -> Rows:
    """The first of them alone."""
    return replace(rows, logits=rows.logits[:1], labels=rows.labels[:1], factors=rows.factors[:1])


def test_a_row_too_long_for_shared_memory(gpu: Where) -> None:
    rows = first(wide(gpu, 940_000 // gpu.dtype.itemsize))
    check(in_one(rows, gpu), rows)


def test_an_h100_takes_four_blocks_for_a_row_neither_short_nor_long(emulated: Where) -> None:
    shared = 4 if emulated.capability == 9 else 1
    shortest, longest = {FP32: (8192, 231_000), BF16: (16384, 462_000)}[emulated.dtype]
    widths = {shortest - 1: 1, shortest: shared, longest: shared, longest + 1000: 1}
    for width, blocks in widths.items():
        in_one(first(wide(emulated, width)), emulated)
        assert emulation.load("kernels").blocks_of_last_launch() == blocks


def cuts(gpu: Where, offset: int) -> Tensor:
    """Columns on both sides of where vectors, blocks and the row begin and end."""
    lanes = 16 // gpu.dtype.itemsize
    head = -offset % lanes
    vectors = (WIDE - head) // lanes
    bounds = [head + min(part * -(-vectors // 4), vectors) * lanes for part in range(5)]
    columns = {bound + beside for bound in bounds for beside in (-1, 0, 1)} | {0, WIDE - 1}
    return torch.tensor(sorted(column for column in columns if 0 <= column < WIDE))


@pytest.mark.parametrize("offset", [0, 3])
def test_the_label_may_be_anywhere(gpu: Where, offset: int) -> None:
    labels = cuts(gpu, offset)
    few = wide(gpu, padding=0, offset=offset)
    rows = replace(
        few,
        logits=few.logits[:1].repeat(len(labels), 1),
        labels=labels,
        factors=torch.ones(len(labels)),
    )
    check(in_one(rows, gpu), rows)


def test_a_label_of_another_shard_changes_nothing(gpu: Where) -> None:
    few = wide(gpu)
    absent = replace(few, labels=torch.tensor([-100, -1, WIDE, WIDE + 10**12]))
    found, expected = in_one(absent, gpu), in_one(absent, Where("cpu", gpu.dtype))
    assert not found.statistics[:, 2].any()
    assert_close(found, expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_and_inf_reach_their_row_and_no_other(gpu: Where, poison: float) -> None:
    clean = wide(gpu)
    untouched = in_one(clean, gpu)
    for column in cuts(gpu, clean.offset)[::4].tolist():
        logits = clean.logits.clone()
        logits[0, column] = logits[2, column] = poison  # row 2 has factor 0
        found = in_one(replace(clean, logits=logits), gpu)
        assert found.statistics[[0, 2], 1].isnan().all()
        assert found.gradient[0, :WIDE].isnan().all()
        assert not found.gradient[2].any()
        for a, b in zip(found, untouched, strict=True):
            assert torch.equal(a[[1, 3]], b[[1, 3]])


def test_parts_of_a_row_at_minus_infinity_have_no_share(gpu: Where) -> None:
    rows = wide(gpu)
    rows.labels[:] = 5000
    for row, part in enumerate((slice(0, 4200), slice(8000, 16000), slice(12400, WIDE))):
        rows.logits[row, part] = -torch.inf
    rows.labels[0] = 9000
    found = in_one(rows, gpu)
    assert_close(found, in_one(rows, Where("cpu", gpu.dtype)))
    assert not found.gradient[rows.logits == -torch.inf].any()
    assert found.statistics.isfinite().all()


def test_a_row_at_minus_infinity_is_as_on_the_cpu(gpu: Where) -> None:
    rows = wide(gpu)
    rows.logits[0, :WIDE] = rows.logits[2, :WIDE] = -torch.inf
    found = in_one(rows, gpu)
    assert_close(found, in_one(rows, Where("cpu", gpu.dtype)))
    assert found.gradient[0, :WIDE].isnan().all()
    assert not found.gradient[2].any()


def test_masked_rows_alone(gpu: Where) -> None:
    rows = replace(wide(gpu), labels=torch.full((4,), -100), factors=torch.zeros(4))
    assert not in_one(rows, gpu).gradient.any()


def test_the_order_of_the_threads_changes_no_bit(emulated: Where) -> None:
    rows = wide(emulated)
    found = []
    for backwards in (False, True):
        emulation.set_machine(capability=emulated.capability, backwards=backwards)
        found.append((*in_one(rows, emulated), *in_shards(rows, emulated, 2)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("capability", "forgotten"), [(8, "blocks"), (9, "blocks"), (9, "clusters")]
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_barriers_that_put_nothing_in_order_are_missed(
    dtype: torch.dtype, capability: int, forgotten: str
) -> None:
    emulated = Where("cpu", dtype, capability).load()
    emulation.set_machine(capability=capability, forgotten=forgotten)
    with pytest.raises(RuntimeError, match="with no barrier between"):
        in_one(wide(emulated), emulated)
