"""Rows of logits through the compiled operators, on whatever device, and by autograd in fp64."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mcore_sft.ops import library
from tests.ops import emulation

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


class Where(NamedTuple):
    """A device of torch's, or the CPU in the place of a GPU of that compute capability."""

    device: str
    dtype: torch.dtype
    capability: int = 0

    @property
    def operators(self) -> Any:
        """Those that compute there."""
        return torch.ops.mcore_sft_emulated if self.capability else torch.ops.mcore_sft

    def __str__(self) -> str:
        name = {0: self.device, 8: "a100", 9: "h100"}[self.capability]
        return f"{name}-{str(self.dtype).removeprefix('torch.')}"

    def load(self) -> "Where":
        """It, once its operators are there."""
        library.load()
        if self.device == "cuda":
            if not torch.cuda.is_available():
                pytest.skip("no CUDA device")
            library.load_cuda()
        if self.capability:
            emulation.set_machine(capability=self.capability)
        return self


@dataclass(frozen=True)
class Rows:
    """Rows of logits and what is asked of them, on the CPU."""

    logits: Tensor
    labels: Tensor
    factors: Tensor
    """Of each row's gradient; a row of factor 0 counts for nothing."""
    width: int
    offset: int = 0
    """Elements by which the operator's copy begins after an address that any vector may have."""


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


def in_one(rows: Rows, where: Where) -> Result:
    """`cross_entropy_`: both passes over one shard."""
    logits = copy(rows.logits, where, rows.offset)
    statistics = where.operators.cross_entropy_(
        logits,
        rows.labels.to(where.device),
        values(rows.factors, logits),
        rows.width,
    )
    assert statistics.dtype == (FP64 if rows.logits.dtype == FP64 else FP32)
    return Result(statistics.cpu(), logits.cpu())


def copy(logits: Tensor, where: Where, offset: int) -> Tensor:
    """On the device, from the element `offset` of a memory of their own."""
    if offset == 0:
        return logits.to(where.device, copy=True)
    memory = torch.empty(offset + logits.numel(), dtype=logits.dtype, device=where.device)
    return memory[offset:].view(logits.shape).copy_(logits)


def in_shards(rows: Rows, where: Where, size: int) -> Result:
    """`cross_entropy_statistics`, their combination in fp64, then `cross_entropy_gradient_`."""
    labels = rows.labels.to(where.device)
    shards = [copy(shard, where, rows.offset) for shard in rows.logits.chunk(size, dim=1)]
    firsts = [0]
    for shard in shards[:-1]:
        firsts.append(firsts[-1] + shard.shape[1])
    bounds = [(first, max(0, rows.width - first)) for first in firsts]
    bounds = [(a, min(w, shard.shape[1])) for (a, w), shard in zip(bounds, shards, strict=True)]

    found = []
    for shard, (first, width) in zip(shards, bounds, strict=True):
        found.append(where.operators.cross_entropy_statistics(shard, labels, first, width))
    statistics = combine(torch.stack(found).cpu())
    for shard, (first, width) in zip(shards, bounds, strict=True):
        where.operators.cross_entropy_gradient_(
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
