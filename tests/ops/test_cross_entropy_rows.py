"""The compiled passes over rows of logits, on the CPU and on CUDA, against autograd in fp64."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mcore_sft.ops import library

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


class Where(NamedTuple):
    device: str
    dtype: torch.dtype


@pytest.fixture(
    params=[
        *(Where("cpu", dtype) for dtype in (FP32, BF16, FP64)),
        *(pytest.param(Where("cuda", dtype), marks=pytest.mark.gpu) for dtype in (FP32, BF16)),
    ],
    ids=lambda where: f"{where.device}-{str(where.dtype).removeprefix('torch.')}",
)
def where(request: pytest.FixtureRequest) -> Where:
    library.load()
    if request.param.device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        library.load_cuda()
    return request.param


@dataclass(frozen=True)
class Rows:
    """Rows of logits and what is asked of them, on the CPU."""

    logits: Tensor
    labels: Tensor
    factors: Tensor
    """Of each row's gradient; a row of factor 0 counts for nothing."""
    width: int


class Result(NamedTuple):
    statistics: Tensor
    gradient: Tensor


def draw(dtype: torch.dtype, vocab_size: int, padding: int = 0, scale: float = 3.0) -> Rows:
    """Four rows: a plain one, a weighted one, one that is ignored, one whose label is certain."""
    random = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(4, vocab_size + padding, generator=random) * scale
    labels = torch.randint(0, vocab_size, (4,), generator=random)
    logits[3, labels[3]] += 40 * scale
    labels[2] = -100
    logits[:, vocab_size:] = 1e30  # what the padding holds must not matter
    return Rows(logits.to(dtype), labels, torch.tensor([1.0, 0.3, 0.0, 2.0]), vocab_size)


def by_autograd(rows: Rows, dtype: torch.dtype) -> Result:
    """The same in plain torch, computed in `dtype`; the gradient is rounded as the logits are."""
    z = rows.logits[:, : rows.width].to(dtype).requires_grad_()
    here = (rows.labels >= 0) & (rows.labels < rows.width)
    labels = rows.labels.where(here, 0)[:, None]
    log_p = z.log_softmax(1)
    (rows.factors * -log_p.gather(1, labels)[:, 0]).sum().backward()
    assert z.grad is not None
    gradient = torch.zeros(rows.logits.shape, dtype=dtype)
    gradient[:, : rows.width] = z.grad
    z = z.detach()
    largest = z.amax(1)
    x = z - largest[:, None]
    of_label = z.gather(1, labels)[:, 0] * here
    statistics = [largest, x.exp().sum(1), of_label]
    rounded = gradient if dtype == FP64 else gradient.to(rows.logits.dtype)
    return Result(torch.stack(statistics, dim=1), rounded)


def in_one(rows: Rows, device: str) -> Result:
    """`cross_entropy_`: both passes over one shard."""
    logits = rows.logits.to(device, copy=True)
    statistics = torch.ops.mcore_sft.cross_entropy_(
        logits,
        rows.labels.to(device),
        values(rows.factors, logits),
        rows.width,
    )
    assert statistics.dtype == (FP64 if rows.logits.dtype == FP64 else FP32)
    return Result(statistics.cpu(), logits.cpu())


def in_shards(rows: Rows, device: str, size: int) -> Result:
    """`cross_entropy_statistics`, their combination in fp64, then `cross_entropy_gradient_`."""
    labels = rows.labels.to(device)
    shards = [shard.to(device, copy=True) for shard in rows.logits.chunk(size, dim=1)]
    firsts = [0]
    for shard in shards[:-1]:
        firsts.append(firsts[-1] + shard.shape[1])
    bounds = [(first, max(0, rows.width - first)) for first in firsts]
    bounds = [(a, min(w, shard.shape[1])) for (a, w), shard in zip(bounds, shards, strict=True)]

    found = []
    for shard, (first, width) in zip(shards, bounds, strict=True):
        found.append(torch.ops.mcore_sft.cross_entropy_statistics(shard, labels, first, width))
    statistics = combine(torch.stack(found).cpu())
    for shard, (first, width) in zip(shards, bounds, strict=True):
        torch.ops.mcore_sft.cross_entropy_gradient_(
            shard,
            labels,
            values(statistics[:, 0], shard),
            values(statistics[:, 1].log(), shard),
            values(rows.factors, shard),
            first,
            width,
        )
    return Result(statistics, torch.cat(shards, dim=1).cpu())


def combine(of_shards: Tensor) -> Tensor:
    """The statistics of whole rows from those of their shards [S, C, 3], in fp64."""
    largest, exponentials, of_label = of_shards.double().unbind(2)
    most = largest.amax(0)
    exponentials = ((largest - most).clamp(min=-1e30).exp() * exponentials).sum(0)
    return torch.stack([most, exponentials, of_label.sum(0)], dim=1)


def values(of_rows: Tensor, logits: Tensor) -> Tensor:
    """One number a row, as an operator on these logits takes it."""
    return of_rows.to(logits.device, FP64 if logits.dtype == FP64 else FP32).contiguous()


def check(found: Result, rows: Rows) -> None:
    """No error is above that of plain fp32 code, but for some roundings of what is summed."""
    exact, plain = by_autograd(rows, FP64), by_autograd(rows, FP32)
    precise = rows.logits.dtype == FP64
    rounding = 1e-11 if precise else 4 * torch.finfo(FP32).eps  # autograd itself is no better
    error = (found.statistics - exact.statistics).abs()
    allowed = 0 if precise else (plain.statistics - exact.statistics).abs()
    assert (error <= allowed + rounding * exact.statistics.abs()).all(), error
    assert torch.equal(found.statistics[:, [0, 2]].double(), exact.statistics[:, [0, 2]])

    assert found.gradient.dtype == rows.logits.dtype
    error = (found.gradient.double() - exact.gradient).abs().amax(1)
    allowed = 0 if precise else (plain.gradient.double() - exact.gradient).abs().amax(1)
    sizes = exact.gradient.abs().amax(1)
    assert (error <= allowed + rounding * sizes + 1e-14 * rows.factors).all(), error
    assert not found.gradient[:, rows.width :].any()
    assert not found.gradient[rows.factors == 0].any()


# Fewer columns than a vector holds, rows that start anywhere, more than the threads read at once,
# and Llama 3's vocabulary.
@pytest.mark.parametrize("vocab_size", [1, 7, 701, 8191, 40000, 128256])
@pytest.mark.parametrize("padding", [0, 19])
def test_one_shard(where: Where, vocab_size: int, padding: int) -> None:
    rows = draw(where.dtype, vocab_size, padding)
    check(in_one(rows, where.device), rows)


@pytest.mark.parametrize(("vocab_size", "padding"), [(7, 1), (701, 899), (9001, 1234)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards(where: Where, vocab_size: int, padding: int, size: int) -> None:
    """Of four shards of 400 columns the third and fourth hold little or nothing but padding."""
    rows = draw(where.dtype, vocab_size, padding)
    check(in_shards(rows, where.device, size), rows)


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0), (1e4, 0), (3, 1e4), (3, -1e4)])
def test_small_and_large_logits(where: Where, scale: float, shift: float) -> None:
    rows = draw(where.dtype, 701, scale=scale)
    rows.logits.add_(shift)
    check(in_one(rows, where.device), rows)
    check(in_shards(rows, where.device, 2), rows)


def test_no_row_and_no_column(where: Where) -> None:
    rows = draw(where.dtype, 40)
    none = replace(rows, logits=rows.logits[:0], labels=rows.labels[:0], factors=rows.factors[:0])
    for found in (in_one(none, where.device), in_shards(none, where.device, 2)):
        assert found.statistics.shape == (0, 3)
    padding = replace(rows, width=0)
    found = in_one(padding, where.device)
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
        (in_one(poisoned, where.device), in_one(clean, where.device)),
        (in_shards(poisoned, where.device, 2), in_shards(clean, where.device, 2)),
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
    for run in (in_one, lambda rows, device: in_shards(rows, device, 3)):
        found, expected = run(rows, where.device), run(alone, where.device)
        assert torch.allclose(found.statistics[0], expected.statistics[0], rtol=1e-6)
        assert not found.gradient[0, 350:].any()


@pytest.mark.parametrize("vocab_size", [704, 40000])
def test_the_same_bits_again_and_in_other_company(where: Where, vocab_size: int) -> None:
    rows = draw(where.dtype, vocab_size, padding=8)
    first = in_one(rows, where.device)
    last = replace(rows, logits=rows.logits[3:], labels=rows.labels[3:], factors=rows.factors[3:])
    for again, alone, whole in zip(
        in_one(rows, where.device), in_one(last, where.device), first, strict=True
    ):
        assert torch.equal(again, whole)
        assert torch.equal(alone, whole[3:])


def test_wrong_inputs_are_named(where: Where) -> None:
    rows = draw(where.dtype, 40)

    def run(**wrong: object) -> None:
        in_one(replace(rows, **wrong), where.device)

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
        one = in_one(many, "cpu")
        torch.set_num_threads(5)
        five = in_one(many, "cpu")
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
