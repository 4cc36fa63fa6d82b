import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from mcore_sft.ops.linear_cross_entropy import linear_cross_entropy
from tests.distributed import run_ranks

T, D, VOCAB, PADDED = 12, 8, 29, 32
ROWS = torch.tensor([0, 3, 4, 9, 11])


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=random)
    weight = torch.randn(PADDED, D, generator=random) * 3
    labels = torch.randint(0, VOCAB, (len(ROWS),), generator=random)
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.25, 3.0])
    return hidden, weight, labels, upstream


def _expected() -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradients in fp64 by torch, the padding of the vocabulary cut off."""
    hidden, weight, labels, upstream = _inputs()
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    losses = functional.cross_entropy(h[ROWS] @ w[:VOCAB].t(), labels, reduction="none")
    (losses * upstream).sum().backward()
    assert h.grad is not None
    assert w.grad is not None
    return losses.detach(), h.grad, w.grad


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_one_rank_is_torch_without_the_padding() -> None:
    hidden, weight, labels, upstream = _inputs()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    losses = linear_cross_entropy(h, w, ROWS, labels, vocab_size=VOCAB)
    (losses * upstream).sum().backward()
    for found, expected in zip((losses.detach(), h.grad, w.grad), _expected(), strict=True):
        assert found is not None
        assert _close(found, expected)
    assert w.grad is not None
    assert not w.grad[VOCAB:].any()


def _rank(sequence_parallel: bool) -> tuple[Tensor, Tensor, Tensor]:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, labels, upstream = _inputs()
    share = T // size if sequence_parallel else T
    first = rank * share if sequence_parallel else 0
    h = hidden[first : first + share].clone().requires_grad_()
    w = weight.chunk(size)[rank].clone().requires_grad_()
    losses = linear_cross_entropy(
        h,
        w,
        ROWS,
        labels,
        vocab_size=VOCAB,
        group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
    )
    (losses * upstream).sum().backward()
    dist.destroy_process_group()
    assert h.grad is not None
    assert w.grad is not None
    return losses.detach(), h.grad, w.grad


def test_vocabulary_shards() -> None:
    losses, grad_h, grad_w = _expected()
    found = run_ranks(4, _rank, False)
    for rank, (loss, h, w) in enumerate(found):
        assert _close(loss, losses)
        assert _close(h, grad_h)
        assert _close(w, torch.cat([grad_w]).chunk(4)[rank])


def test_vocabulary_shards_with_sequence_parallelism() -> None:
    losses, grad_h, grad_w = _expected()
    found = run_ranks(2, _rank, True)
    assert _close(torch.cat([h for _, h, _ in found]), grad_h)
    assert _close(torch.cat([w for _, _, w in found]), grad_w)
    assert all(_close(loss, losses) for loss, _, _ in found)


def test_no_supervised_row() -> None:
    hidden, weight, _, _ = _inputs()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    none = torch.empty(0, dtype=torch.long)
    losses = linear_cross_entropy(h, w, none, none, vocab_size=VOCAB)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert h.grad is not None
    assert not h.grad.any()


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels, _ = _inputs()
    losses = linear_cross_entropy(hidden * 1e4, weight, ROWS, labels, vocab_size=VOCAB)
    assert losses.isfinite().all()


def test_bf16_is_no_worse_than_plain_bf16() -> None:
    hidden, weight, labels, _ = _inputs()
    exact, _, _ = _expected()
    h, w = hidden.bfloat16(), weight.bfloat16()
    ours = linear_cross_entropy(h, w, ROWS, labels, vocab_size=VOCAB)
    plain = functional.cross_entropy(h[ROWS] @ w[:VOCAB].t(), labels, reduction="none")
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= (plain - exact).abs().max() + 1e-6
