import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from mcore_sft.ops import head, library
from mcore_sft.ops.linear_cross_entropy import (
    IGNORE,
    LinearCrossEntropy,
    linear_cross_entropy,
    reference,
)
from tests.data.test_batch import PinnedAlone
from tests.distributed import run_ranks

D, VOCAB, PADDED = 12, 101, 104
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs in fp64 whose values bf16 holds exactly; `rows` of `hidden` enter the head."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class Outcome:
    result: LinearCrossEntropy
    hidden: Tensor
    weight: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, gradients last."""
        return (*self.result, self.hidden, self.weight)


def case(length: int = 1600, rows: int = 1200) -> Case:
    """By default so many rows that the operator needs several chunks."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCAB, (rows,), generator=random)
    labels[7::50] = IGNORE
    return Case(
        hidden=torch.randn(length, D, generator=random).bfloat16().double(),
        weight=torch.randn(PADDED, D, generator=random).bfloat16().double(),
        labels=labels,
        rows=torch.randperm(length, generator=random)[:rows].sort().values,
    )


def test_row_numbers_are_pinned_for_a_gpu() -> None:
    rows = torch.arange(5)[1:]
    with PinnedAlone() as gpu:
        there = head.sent(rows, torch.device("cuda"))
    assert there is gpu.pinned[0]
    assert head.sent(rows, torch.device("cpu")) is rows


def compute(
    function: Callable[..., LinearCrossEntropy],
    case: Case,
    dtype: torch.dtype,
    upstream: Tensor | float = 1.0,
    device: str = "cpu",
    **options: Any,
) -> Outcome:
    hidden = case.hidden.to(device, dtype, copy=True).requires_grad_()
    weight = case.weight.to(device, dtype, copy=True).requires_grad_()
    labels = case.labels.to(device)
    result = function(hidden, weight, labels, rows=case.rows, vocab_size=VOCAB, **options)
    (result.loss * upstream).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    here = LinearCrossEntropy(*(tensor.cpu() for tensor in result))
    return Outcome(result=here, hidden=hidden.grad.cpu(), weight=weight.grad.cpu())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the operator runs; the references too."""
    if request.param == "cuda":
        library.load_cuda()
    return str(request.param)


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square."""
    return (found.double() - exact).square().mean().sqrt().item()


def assert_no_worse_than_plain(ours: Outcome, plain: Outcome, exact: Outcome) -> None:
    """The errors against fp64 are no larger than plain torch's, but for the order of sums."""
    for mine, theirs, truth in zip(ours.tensors(), plain.tensors(), exact.tensors(), strict=True):
        size = 1 + error(truth, torch.zeros(()))
        assert error(mine, truth) <= 1.02 * error(theirs, truth) + 1e-6 * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_error_beyond_that_of_plain_torch(dtype: torch.dtype, device: str) -> None:
    exact = compute(reference, case(), torch.float64)
    plain = compute(reference, case(), dtype, device=device)
    ours = compute(linear_cross_entropy, case(), dtype, device=device)
    assert_no_worse_than_plain(ours, plain, exact)
    assert not ours.weight[VOCAB:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_chunks_on_a_gpu(dtype: torch.dtype) -> None:
    """A chunk is a GiB of logits there, and two where the sum of chunks would be rounded."""
    library.load_cuda()
    random = torch.Generator("cuda").manual_seed(0)
    made: dict[str, Any] = {"device": "cuda", "generator": random}
    hidden, weight = torch.randn(9000, 64, **made), torch.randn(128256, 64, **made)
    labels = torch.randint(0, 128256, (9000,), **made)
    labels[7::50] = IGNORE
    found = []
    for function, numbers in ((linear_cross_entropy, dtype), (reference, torch.float32)):
        x, w = (t.to(dtype).to(numbers).requires_grad_() for t in (hidden, weight))
        loss = function(x, w, labels, vocab_size=len(w)).loss
        loss.backward()
        found.append([t.detach().float() for t in (loss, x.grad, w.grad) if t is not None])
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= limit * theirs.norm()


def test_fp64_is_torch() -> None:
    exact = compute(reference, case(), torch.float64)
    ours = compute(linear_cross_entropy, case(), torch.float64)
    for mine, truth in zip(ours.tensors(), exact.tensors(), strict=True):
        assert torch.allclose(mine, truth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_are_those_of_the_loss(reduction: str) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 3, dtype=torch.float64, generator=random, requires_grad=True)
    weight = torch.randn(8, 3, dtype=torch.float64, generator=random, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden,
            weight,
            torch.tensor([2, 6, IGNORE, 0]),
            rows=torch.tensor([0, 2, 3, 5]),
            vocab_size=7,
            reduction=reduction,
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("upstream", [3.0, 0.0, -0.5])
def test_a_scalar_upstream_gradient_scales(upstream: float, device: str) -> None:
    exact = compute(reference, case(), torch.float64, upstream)
    ours = compute(linear_cross_entropy, case(), torch.float32, upstream, device)
    assert error(ours.hidden, exact.hidden) < 1e-5
    assert error(ours.weight, exact.weight) < 1e-5


def by_rows(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, rows: Tensor, vocab_size: int
) -> LinearCrossEntropy:
    """The reference with reduction "none"."""
    logits = (hidden[rows] @ weight.t())[:, :vocab_size]
    loss = functional.cross_entropy(logits, labels, reduction="none")
    return LinearCrossEntropy(loss, loss.detach())


def test_upstream_gradients_that_differ_from_row_to_row() -> None:
    few = case()
    upstream = torch.randn(2 * len(few.rows), generator=torch.Generator().manual_seed(1))[::2]
    exact = compute(by_rows, few, torch.float64, upstream.double())
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        ours = compute(linear_cross_entropy, few, dtype, upstream, reduction="none")
        assert ours.result.loss.shape == few.labels.shape
        assert error(ours.hidden, exact.hidden) < limit
        assert error(ours.weight, exact.weight) < limit


def test_a_second_backward_pass_finds_the_same_gradients() -> None:
    few = case(9, 7)
    hidden, weight = few.hidden.requires_grad_(), few.weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, few.labels, rows=few.rows).loss
    first = torch.autograd.grad(loss * 0, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    third = torch.autograd.grad(loss, (hidden, weight))
    assert not any(gradient.any() for gradient in first)
    assert all(torch.equal(one, other) for one, other in zip(second, third, strict=True))
    assert second[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_weight_is_added_to_main_grad(dtype: torch.dtype, device: str) -> None:
    exact = compute(reference, case(), torch.float64)
    plain = compute(reference, case(), dtype, device=device)
    main_grad = torch.full((PADDED, D), 3.0, device=device)
    ours = compute(linear_cross_entropy, case(), dtype, device=device, main_grad=main_grad)
    assert not ours.weight.to_dense().any()  # what autograd is given
    assert_no_worse_than_plain(replace(ours, weight=main_grad.cpu() - 3), plain, exact)


def test_main_grad_needs_an_upstream_gradient_of_one() -> None:
    main_grad = torch.zeros(PADDED, D)
    with pytest.raises(RuntimeError, match=r"upstream gradient is not 1.*after the backward pass"):
        compute(linear_cross_entropy, case(), torch.float32, 2.0, main_grad=main_grad)


def test_a_detached_weight_leaves_its_gradient_in_main_grad_alone() -> None:
    few = case(9, 7)
    hidden, main_grad = few.hidden.float().requires_grad_(), torch.zeros(PADDED, D)
    weight = few.weight.float().requires_grad_()
    linear_cross_entropy(
        hidden, weight.detach(), few.labels, rows=few.rows, main_grad=main_grad
    ).loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert main_grad.any()


def test_without_grad_mode_main_grad_stays_as_it_is() -> None:
    few, main_grad = case(9, 7), torch.zeros(PADDED, D)
    hidden, weight = few.hidden.float().requires_grad_(), few.weight.float().requires_grad_()
    with torch.no_grad():
        result = linear_cross_entropy(
            hidden, weight, few.labels, rows=few.rows, main_grad=main_grad
        )
    trained = linear_cross_entropy(hidden, weight, few.labels, rows=few.rows)
    assert torch.equal(result.loss, trained.loss)
    assert not main_grad.any()


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"main_grad": torch.zeros(104, D)}])
def test_second_derivatives_are_refused(options: dict[str, Any]) -> None:
    few = case(9, 7)
    hidden, weight = few.hidden.float().requires_grad_(), few.weight.float()
    loss = linear_cross_entropy(hidden, weight, few.labels, rows=few.rows, **options).loss.sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_what_flows_back_to_an_ignored_row_does_not_matter() -> None:
    few = case()
    upstream = torch.where(few.labels == IGNORE, math.nan, 1.0)
    ours = compute(linear_cross_entropy, few, torch.float32, upstream, reduction="none")
    plain = compute(linear_cross_entropy, few, torch.float32)
    assert torch.equal(ours.hidden, plain.hidden)
    assert torch.equal(ours.weight, plain.weight)


def test_compiled_with_a_transposed_hidden_state() -> None:
    few = case(9, 7)
    rows = few.hidden[few.rows].float().t().contiguous().t()

    def loss(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, few.weight.float(), few.labels).loss.double()

    hidden = rows.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    compiled.backward()
    assert torch.allclose(compiled, loss(rows))
    assert hidden.grad is not None


def test_only_the_loss_has_a_gradient() -> None:
    result = compute(linear_cross_entropy, case(), torch.float32).result
    assert result.loss.requires_grad
    assert not result.token_loss.requires_grad


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("labels", [[], [IGNORE, IGNORE, IGNORE]])
def test_nothing_to_learn_from_gives_zeros(labels: list[int], main: bool) -> None:
    hidden, weight = torch.randn(5, D).requires_grad_(), torch.randn(PADDED, D).requires_grad_()
    main_grad = torch.zeros(PADDED, D) if main else None
    result = linear_cross_entropy(
        hidden,
        weight,
        torch.tensor(labels, dtype=torch.long),
        rows=torch.arange(len(labels)),
        main_grad=main_grad,
    )
    result.loss.backward()
    assert result.loss.item() == 0
    assert result.token_loss.shape == (len(labels),)
    assert hidden.grad is not None
    assert hidden.grad.shape == (5, D)
    assert not hidden.grad.any()
    found = weight.grad if main_grad is None else main_grad
    assert found is not None
    assert not found.any()


def test_all_rows_of_a_strided_hidden_state() -> None:
    few = case(7, 7)
    wide = torch.cat([few.hidden, few.hidden], dim=1)
    found = linear_cross_entropy(wide[:, :D], few.weight, few.labels, vocab_size=VOCAB)
    expected = reference(few.hidden, few.weight, few.labels, vocab_size=VOCAB)
    assert torch.allclose(found.token_loss, expected.token_loss)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype: torch.dtype) -> None:
    few = case(9, 7)
    large = replace(few, hidden=few.hidden * 2048)
    exact = compute(reference, large, torch.float64)
    plain = compute(reference, large, dtype)
    ours = compute(linear_cross_entropy, large, dtype)
    assert (large.hidden @ large.weight.t()).max() > 1e4
    assert_no_worse_than_plain(ours, plain, exact)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    few = case(9, 7)
    few.hidden[few.rows[2], 3] = value
    ours = compute(linear_cross_entropy, few, torch.float32)
    assert ours.result.loss.isnan()
    assert ours.result.token_loss.isnan().tolist() == [row == 2 for row in range(7)]
    assert ours.hidden[few.rows[2]].isnan().all()
    assert ours.weight[:VOCAB].isnan().all()


def test_an_ignored_row_hides_what_is_not_finite() -> None:
    few = case(9, 7)
    few.hidden[few.rows[2], 3] = math.nan
    few.labels[2] = IGNORE
    ours = compute(linear_cross_entropy, few, torch.float32)
    assert ours.result.loss.isfinite()
    assert not ours.hidden[few.rows[2]].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "mean"}, 'reduction is \'mean\', expected "sum" or "none"'),
        ({"labels": torch.tensor([1, 2])}, r"labels are \[2\], expected \[3\]"),
        ({"labels": torch.tensor([1, VOCAB, 2])}, "neither below the vocabulary's size"),
        ({"labels": torch.tensor([1, -1, 2])}, "neither below the vocabulary's size"),
        ({"weight": torch.zeros(PADDED, D, dtype=torch.bfloat16)}, "expected one dtype"),
        ({"weight": torch.zeros(PADDED, D + 1)}, "expected one dtype and one width"),
        ({"main_grad": torch.zeros(PADDED, D).bfloat16()}, "main_grad is torch.bfloat16"),
        ({"main_grad": torch.zeros(PADDED, D), "reduction": "none"}, "main_grad needs"),
        ({"hidden": torch.zeros(3, D).half()}, "hidden is torch.float16"),
        ({"hidden": torch.zeros(D)}, "expected two matrices"),
        ({"labels": torch.tensor([1, 2, 3], dtype=torch.int32)}, "expected int64"),
        ({"labels": torch.zeros(3, dtype=torch.long, device="meta")}, "expected one device"),
        ({"vocab_size": PADDED + 1}, f"1 rank.s. of {PADDED} vocabulary rows"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rows": torch.tensor([0, 2, 1])}, "rows"),
        ({"rows": torch.tensor([0, 1, 9])}, "rows"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(3, D),
        "weight": torch.zeros(PADDED, D, requires_grad=True),
        "labels": torch.tensor([1, IGNORE, 2]),
        "vocab_size": VOCAB,
    }
    with pytest.raises((ValueError, RuntimeError), match=message):
        linear_cross_entropy(**{**given, **change})


# --- vocabulary shards ---


def _rank(dtype: torch.dtype, mode: str) -> list[Outcome]:
    """Twice the outcome on this rank: its rows of `hidden`, its rows of the weight."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = case()
    mine = whole.hidden.chunk(size)[rank] if mode == "sequence" else whole.hidden
    share = replace(whole, hidden=mine, weight=whole.weight.chunk(size)[rank])
    outcomes = []
    for _ in range(2):
        arguments = {"group": dist.group.WORLD, "sequence_parallel": mode == "sequence"}
        if mode == "main_grad":
            arguments["main_grad"] = torch.zeros(share.weight.shape)
        if mode == "none":
            arguments["reduction"] = "none"
        outcome = compute(linear_cross_entropy, share, dtype, **arguments)
        if mode == "main_grad":
            outcome = replace(outcome, weight=arguments["main_grad"])
        outcomes.append(
            replace(outcome, result=LinearCrossEntropy(*(x.detach() for x in outcome.result)))
        )
    dist.destroy_process_group()
    return outcomes


@pytest.mark.parametrize(
    ("size", "dtype", "mode"),
    [
        (2, torch.float32, "replicated"),
        (4, torch.float32, "replicated"),
        (4, torch.float32, "sequence"),
        (2, torch.bfloat16, "sequence"),
        (4, torch.bfloat16, "main_grad"),
        (2, torch.float32, "none"),
    ],
)
def test_vocabulary_shards(size: int, dtype: torch.dtype, mode: str) -> None:
    exact = compute(reference, case(), torch.float64)
    plain = compute(reference, case(), dtype)
    found = run_ranks(size, _rank, dtype, mode)
    for again, other in ((found[0][1], found[0][0]), *((each[0], found[0][0]) for each in found)):
        for mine, theirs in zip(again.result, other.result, strict=True):
            assert torch.equal(mine, theirs)
    ranks = [first for first, _ in found]
    hidden = torch.cat([each.hidden for each in ranks]) if mode == "sequence" else ranks[0].hidden
    weight = torch.cat([each.weight for each in ranks])
    result = ranks[0].result
    if mode == "none":
        result = result._replace(loss=result.loss.sum())
    whole = Outcome(result=result, hidden=hidden, weight=weight)
    if dtype == torch.bfloat16:  # each rank's part of the sum is rounded
        plain = replace(plain, hidden=exact.hidden + size**0.5 * (plain.hidden - exact.hidden))
    assert_no_worse_than_plain(whole, plain, exact)
    assert not weight[VOCAB:].any()
    for each in ranks if mode != "sequence" else []:
        assert torch.equal(each.hidden, hidden)


def _no_rows(sequence_parallel: bool) -> tuple[float, bool]:
    dist.init_process_group("gloo")
    hidden = torch.randn(4, D).requires_grad_()
    none = torch.empty(0, dtype=torch.long)
    result = linear_cross_entropy(
        hidden,
        torch.randn(PADDED // 2, D).requires_grad_(),
        none,
        rows=none,
        group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
    )
    result.loss.backward()
    dist.destroy_process_group()
    assert hidden.grad is not None
    return result.loss.item(), bool(hidden.grad.any())


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_no_row_on_any_rank(sequence_parallel: bool) -> None:
    assert run_ranks(2, _no_rows, sequence_parallel) == [(0.0, False)] * 2


# --- as an operator of torch ---


def _arguments(gradients: bool) -> tuple[Any, ...]:
    few = case(9, 7)
    return (
        few.hidden.float().requires_grad_(gradients),
        few.weight.float().requires_grad_(gradients),
        few.labels,
        few.rows,
    )


@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck(gradients: bool) -> None:
    for upstream in (None, torch.rand(7)):
        torch.library.opcheck(
            torch.ops.mcore_sft.linear_cross_entropy,
            (*_arguments(gradients), upstream, VOCAB, "", False, gradients, gradients),
        )


def test_opcheck_of_the_mutating_form() -> None:
    torch.library.opcheck(
        torch.ops.mcore_sft.linear_cross_entropy_main_grad_,
        (*_arguments(False), torch.zeros(PADDED, D), VOCAB, "", False, True),
    )


@pytest.mark.parametrize("form", ["sum", "none", "main_grad"])
def test_compiles_into_one_graph(form: str) -> None:
    few = case(9, 7)

    def train(hidden: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        result = linear_cross_entropy(
            hidden * 1.5,
            weight,
            few.labels,
            rows=few.rows,
            vocab_size=VOCAB,
            reduction="none" if form == "none" else "sum",
            main_grad=main_grad if form == "main_grad" else None,
        )
        return (result.loss * (1 if form == "main_grad" else 2)).sum()

    found = []
    for function in (train, torch.compile(train, fullgraph=True, backend="aot_eager")):
        hidden, weight = few.hidden.float().requires_grad_(), few.weight.float().requires_grad_()
        main_grad = torch.zeros(PADDED, D)
        loss = function(hidden, weight, main_grad)
        loss.backward()
        found.append((loss, hidden.grad, main_grad if form == "main_grad" else weight.grad))
    for eager, compiled in zip(*found, strict=True):
        assert eager is not None
        assert compiled is not None
        assert torch.allclose(eager, compiled, rtol=1e-6, atol=1e-7)


# --- chunks and memory ---


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 4096, 4097, 5325, 8192, 31337])
@pytest.mark.parametrize(("limit", "tile"), [(4096, 128), (448, 16), (100, 128)])
def test_chunks_are_few_and_even_but_for_a_tile(rows: int, limit: int, tile: int) -> None:
    chunks = head.split(rows, limit, tile)
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    largest = max(limit // tile, 1)
    assert len(chunks) == math.ceil(math.ceil(rows / tile) / largest)
    assert all(0 < length <= largest * tile for length in lengths)
    assert all(length % tile == 0 for length in lengths[:-1])
    tiles = [math.ceil(length / tile) for length in lengths]
    assert tiles == sorted(tiles, reverse=True)
    assert not tiles or tiles[0] - tiles[-1] <= 1


def peak(function: Callable[[], Any], folder: Path) -> int:
    """Bytes of tensors that `function` held at most, beyond those that were there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    held = [event["args"]["Total Allocated"] for event in memory]
    return int(max(held) - held[0] + memory[0]["args"]["Bytes"]) if memory else 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_one_chunk_of_logits_beyond_the_gradients(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    rows, width, vocab = 2048, 64, 4096
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_()
    labels, main_grad = torch.randint(0, vocab, (rows,)), torch.zeros(vocab, width)
    size = hidden.element_size()
    chunk_rows = {2: 448, 4: 320}[size]
    chunk, gradient = chunk_rows * vocab * size, rows * width * size
    weight_gradient = (3 << 20) + weight.nbytes  # a slice of it in bf16, then in fp32
    logits = torch.empty(chunk_rows, vocab, dtype=dtype)

    def multiply() -> None:
        with torch.no_grad():
            torch.mm(hidden[:chunk_rows], weight.t(), out=logits)

    # In bf16 torch lays out the weight anew, and without instructions for it computes in fp32.
    product = peak(multiply, tmp_path)

    def train() -> None:
        linear_cross_entropy(hidden, weight, labels, main_grad=main_grad).loss.backward()

    beside = max(weight_gradient, product)
    assert peak(train, tmp_path) <= chunk + 2 * gradient + beside + 64 * rows

    def finish() -> None:
        loss.backward()

    loss = linear_cross_entropy(hidden, weight, labels, main_grad=main_grad).loss
    assert peak(finish, tmp_path) <= 64 * rows

    def validate() -> None:
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, labels)

    assert peak(validate, tmp_path) <= chunk + 32 * rows + product
