"""The output layer and its loss against their peers: one table of time and memory.

    python benchmarks/loss.py [--device cuda] [--quick] [--only NAME ...] [--minutes N]
                              [--json FILE]

Every contestant is first compared with an fp64 reference: its gradients may be as far off as those
of eager torch in the same precision, and no more. What is wrong is shown as wrong and not timed.
Then all of them take turns, in a new order each round; the figures are medians.

Memory is the peak beyond the inputs and the gradients that are kept (those of the hidden states and
of the weight; main_grad is an input). On the CPU it is the resident set's, in a process of its own.

N = rows, H = width, V = vocabulary rows of this rank. Eager computes softmax and loss in fp32,
and so must all others. Tensor parallelism is simulated by its shapes: one rank's share of the
vocabulary, without collectives and without the second pass over the logits that these cost.
"""

import ctypes
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, groupby, product, takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import Deadline, machine, require
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from mcore_sft.base.files import write_named
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.ops import library
from mcore_sft.ops.linear_cross_entropy import linear_cross_entropy
from mcore_sft.runtime.device import torch_dtype

PRECISIONS = ("fp32", "bf16")
IGNORE = -100

console = Console(width=140)


# ---- what is computed


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: its sizes, its precision, and how many percent of its rows are masked."""

    device: str
    rows: int
    width: int
    vocab: int
    dtype: str
    masked: int = 0
    backward: bool = True
    tensor: int = 1
    """Ranks that share the vocabulary; `vocab` is the part of one."""

    @property
    def supervised(self) -> int:
        """Rows that are not masked."""
        return self.rows - self.rows * self.masked // 100

    def __str__(self) -> str:
        share = f", one rank's share at TP {self.tensor}" if self.tensor > 1 else ""
        passes = "forward and backward" if self.backward else "forward only"
        return f"N={self.rows} H={self.width} V={self.vocab} {self.dtype}, {passes}{share}"


class Problem:
    """The tensors of a case, always the same ones, as a packed batch would hold them."""

    def __init__(self, case: Case) -> None:
        self.case, device = case, case.device
        made = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"device": device, "generator": made}
        dtype = torch_dtype(case.dtype)
        hidden = torch.randn(case.rows, case.width, **options)
        weight = torch.randn(case.vocab, case.width, **options) * case.width**-0.5
        self.hidden = hidden.to(dtype).requires_grad_(case.backward)
        self.weight = weight.to(dtype).requires_grad_(case.backward)
        self.main_grad = torch.zeros(case.vocab, case.width, device=device)
        every = torch.randint(case.vocab, (case.rows,), **options)
        supervised = torch.randperm(case.rows, **options)[: case.supervised].sort().values
        self.labels_R = every[supervised]
        self.labels = torch.full_like(every, IGNORE).index_copy_(0, supervised, self.labels_R)
        self.rows = supervised.cpu()

    def forget(self) -> None:
        """Drop the gradients of the last step."""
        self.hidden.grad = self.weight.grad = None


Run = Callable[[Problem], Tensor]
"""Computes the loss, summed up over the supervised rows."""


def eager(problem: Problem) -> Tensor:
    """All rows, masked ones too, through fp32 logits."""
    logits = (problem.hidden @ problem.weight.t()).float()
    return functional.cross_entropy(logits, problem.labels, reduction="sum")


def eager_rows(problem: Problem) -> Tensor:
    """Only the supervised rows enter the head."""
    rows = problem.rows.to(problem.hidden.device)
    logits = (problem.hidden.index_select(0, rows) @ problem.weight.t()).float()
    return functional.cross_entropy(logits, problem.labels_R, reduction="sum")


def ours(problem: Problem) -> Tensor:
    """The functional operator: the weight gets a gradient of its own dtype."""
    return linear_cross_entropy(
        problem.hidden, problem.weight, problem.labels_R, rows=problem.rows
    ).loss


def ours_main_grad(problem: Problem) -> Tensor:
    """The weight's gradient is added to fp32 main_grad."""
    return linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.labels_R,
        rows=problem.rows,
        main_grad=problem.main_grad,
    ).loss


def torch_native(problem: Problem, **options: Any) -> Tensor:
    """torch's own operator over chunks of rows; without options it would be eager torch."""
    return functional.linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.labels,
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(**options),
    )


def torch_native_variants(case: Case) -> dict[str, Run]:
    """What its documentation offers: where sums are exact, in what precision, how long a chunk.

    Its own choice is left out on the CPU: "accurate" with chunks of a few rows, far slower.
    """
    kinds: list[tuple[str, torch.dtype | None]] = [("accurate", None), ("compact", None)]
    if case.dtype != "fp32":
        kinds += [(policy, torch.float32) for policy in ("accurate", "balanced", "compact")]
    variants: dict[str, Run] = {} if case.device == "cpu" else {"auto": torch_native}
    for (policy, sums), size in product(kinds, (case.rows // 4, case.rows)):
        name = f"{policy}, {'fp32' if sums else case.dtype} sums, chunks of {size} rows"
        variants[name] = partial(
            torch_native, acc_policy=policy, acc_dtype=sums, batch_chunk_size=size
        )
    return variants


def liger(problem: Problem, sums: torch.dtype | None) -> Tensor:
    """Liger's Triton kernels; `sums` over the chunks in the weight's dtype where None."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=sums)
    total: Tensor = loss(problem.weight, problem.hidden, problem.labels)
    return total


def quack(problem: Problem, **options: Any) -> Tensor:
    """QuACK's CuTe kernels over chunks of rows."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    total: Tensor = chunked_linear_cross_entropy(
        problem.hidden, problem.weight, problem.labels, reduction="sum", **options
    )
    return total


def megatron_fused(problem: Problem) -> Tensor:
    """Megatron-core with cross_entropy_loss_fusion."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = tensor_parallel_group(problem.case.device)
    return of_logits(problem, partial(fused_vocab_parallel_cross_entropy, tp_group=group))


def megatron_unfused(problem: Problem) -> Tensor:
    """Megatron-core's default."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    tensor_parallel_group(problem.case.device)
    return of_logits(problem, vocab_parallel_cross_entropy)


def of_logits(problem: Problem, cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Logits [N, 1, V] of all rows, a loss for each [N, 1], and the mask afterwards."""
    logits = functional.linear(problem.hidden[:, None], problem.weight)
    losses = cross_entropy(logits, problem.labels[:, None])
    return (losses[:, 0] * (problem.labels != IGNORE)).sum()


def tensor_parallel_group(device: str) -> dist.ProcessGroup:
    """A world of this process alone, which Megatron-core's losses cannot do without."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to compute the loss; of several variants the fastest correct one competes."""

    name: str
    variants: Callable[[Case], dict[str, Run]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    ours: bool = False
    into_main_grad: bool = False
    exact_loss: bool = True
    """False where the loss is known to be summed up in the inputs' dtype; gradients count."""


def only(run: Run) -> Callable[[Case], dict[str, Run]]:
    """Variants of what has but one."""
    return lambda case: {"": run}


LIGER: dict[str, Run] = {
    "fp32 sums": partial(liger, sums=torch.float32),
    "its sums": partial(liger, sums=None),
}
QUACK: dict[str, Run] = {
    "default": quack,
    "no scaled exponentials": partial(quack, use_scaled_exp=False),
}

CONTESTANTS = (
    Contestant(name="eager", variants=only(eager)),
    Contestant(name="eager, gathered rows", variants=only(eager_rows)),
    Contestant(name="torch native", variants=torch_native_variants, exact_loss=False),
    Contestant(name="Liger", variants=lambda case: LIGER),
    Contestant(name="Megatron-core, fused", variants=only(megatron_fused), devices=("cuda",)),
    Contestant(name="Megatron-core, unfused", variants=only(megatron_unfused), devices=("cuda",)),
    Contestant(name="QuACK", variants=lambda case: QUACK, devices=("cuda",)),
    Contestant(name="ours", variants=only(ours), ours=True),
    Contestant(
        name="ours, main_grad", variants=only(ours_main_grad), ours=True, into_main_grad=True
    ),
)


def step(run: Run, problem: Problem) -> Tensor:
    """What is measured."""
    loss = run(problem)
    if problem.case.backward:
        loss.backward()  # type: ignore[no-untyped-call]
    return loss


# ---- whether it is right


@dataclass(frozen=True)
class Exact:
    """Loss and gradients in fp64."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


Errors = dict[str, float]
"""|x - exact| / |exact| of loss, dX and dW, of the gradients in the 2-norm."""


def reference(problem: Problem) -> Exact:
    """By the book and in fp64, some rows at a time so that it fits beside the inputs."""
    rows = problem.rows.to(problem.hidden.device)
    hidden_RH = problem.hidden.detach().index_select(0, rows).double()
    weight = problem.weight.detach().double()
    grad_hidden = torch.zeros_like(problem.hidden, dtype=torch.float64)
    grad_weight = torch.zeros_like(weight)
    loss = weight.new_zeros(())
    for x, labels, into in zip(
        hidden_RH.split(1024),  # type: ignore[no-untyped-call]
        problem.labels_R.split(1024),  # type: ignore[no-untyped-call]
        rows.split(1024),  # type: ignore[no-untyped-call]
        strict=True,
    ):
        log_probs = (x @ weight.t()).log_softmax(1)
        loss -= log_probs.gather(1, labels[:, None]).sum()
        if problem.case.backward:
            grad = log_probs.exp_()
            grad[torch.arange(len(x), device=x.device), labels] -= 1
            grad_hidden[into] = grad @ weight
            grad_weight.addmm_(grad.t(), x)
    return Exact(loss, grad_hidden, grad_weight)


def errors_of(run: Run, problem: Problem, exact: Exact, *, into_main_grad: bool) -> Errors:
    """Those of one step."""

    def off(value: Tensor, expected: Tensor) -> float:
        return float((value.double() - expected).norm() / expected.norm())

    problem.forget()
    problem.main_grad.zero_()
    errors = {"loss": off(step(run, problem).detach(), exact.loss)}
    grad_hidden, grad_weight = problem.hidden.grad, problem.weight.grad
    if grad_hidden is not None and grad_weight is not None:
        errors["dX"] = off(grad_hidden, exact.hidden)
        errors["dW"] = off(problem.main_grad if into_main_grad else grad_weight, exact.weight)
    return errors


TOLERANCE = {"fp32": 2e-7, "bf16": 2e-4}
"""What summing in another order may add to an error."""


def is_right(errors: Errors, eager_errors: Errors, case: Case, *, exact_loss: bool) -> bool:
    """Whether the errors are no larger than eager's own, but for the order of the sums."""
    return all(
        error <= eager_errors[name] + TOLERANCE[case.dtype]
        for name, error in errors.items()
        if exact_loss or name != "loss"
    )


# ---- how long it takes, and how much memory


def cpu_seconds(run: Run, problem: Problem) -> float:
    """Wall time of one step on the CPU."""
    problem.forget()
    begin = time.perf_counter()
    step(run, problem)
    return time.perf_counter() - begin


def cuda_seconds(run: Run, problem: Problem) -> float:
    """Time of one step on the GPU, between two events."""
    problem.forget()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    step(run, problem)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


SECONDS_OF = {"cpu": cpu_seconds, "cuda": cuda_seconds}


def new_gradient_bytes(problem: Problem, *, into_main_grad: bool) -> int:
    """Of the gradients that stay: not what autograd is given beside main_grad, to throw away."""
    kept = [problem.hidden] if into_main_grad else [problem.hidden, problem.weight]
    return sum(tensor.grad.nbytes for tensor in kept if tensor.grad is not None)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def cpu_memory(case: Case, contestant: str, variant: str) -> int:
    """Peak of the resident set in bytes, less inputs and gradients; for a process of its own."""
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        ctypes.CDLL(None).mallopt(option, 1 << 16)  # what is freed goes back at once
    chosen = {one.name: one for one in CONTESTANTS}[contestant]
    run = chosen.variants(case)[variant]
    # What stays after a first call is none of the contestants' own: code, threads, and the buffers
    # in which the matrix library packs a matrix of this size.
    step(run, Problem(replace(case, rows=128, width=64, vocab=1024)))
    problem = Problem(case)
    torch.mm(problem.hidden.detach(), problem.weight.detach().t())
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew at VmRSS
    before = resident("VmRSS")
    step(run, problem)
    kept = new_gradient_bytes(problem, into_main_grad=chosen.into_main_grad)
    return resident("VmHWM") - before - kept


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def cuda_memory(run: Run, problem: Problem, *, into_main_grad: bool) -> int:
    """Peak of what torch has allocated in bytes, less inputs and gradients."""
    problem.forget()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(run, problem)
    torch.cuda.synchronize()
    kept = new_gradient_bytes(problem, into_main_grad=into_main_grad)
    return torch.cuda.max_memory_allocated() - before - kept


def fresh_processes() -> ProcessPoolExecutor:
    """A new process for every call, forked from one that has torch and has computed nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["mcore_sft.ops.linear_cross_entropy", "rich.table"])
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


# ---- what is asked of ours


@dataclass(frozen=True)
class Goal:
    """A limit for a figure of ours: a speedup is to be larger, all else smaller."""

    figure: str
    limit: float
    text: str

    def met(self, result: "Result") -> bool:
        """Whether the figure keeps to it."""
        value: float = getattr(result, self.figure)
        return value >= self.limit if self.figure == "speedup" else value <= self.limit


H100 = Case(device="cuda", rows=8192, width=4096, vocab=128256, dtype="bf16")


def goals_of(case: Case, *, into_main_grad: bool) -> list[Goal]:
    """On the CPU against eager torch, on CUDA what an H100 should do."""
    goals = []
    if case.device == "cpu":
        goals.append(Goal("memory_share", 0.25, "<= 0.25"))
        at_35 = {("bf16", 64): 2.0, ("bf16", 1024): 1.3}.get((case.dtype, case.width), 1.5)
        if speedup := {0: 1.0, 35: at_35}.get(case.masked):
            goals.append(Goal("speedup", speedup, f">= {speedup:g}"))
    elif case.backward:
        limit = 1.02 * memory_by_design(case, into_main_grad=into_main_grad)
        goals.append(Goal("memory", limit, f"<= {limit / 1e9:.2f} GB"))
        if case.tensor == 1 and (ms := {0: 37.0, 35: 24.0}.get(case.masked)):
            goals.append(Goal("ms", ms, f"<= {ms:g} ms"))
    return goals


def memory_by_design(case: Case, *, into_main_grad: bool) -> float:
    """Bytes of the longest chunk's logits on CUDA, and of supervised rows with their gradients.

    A chunk has up to a GiB of logits: with smaller ones the passes over the weight's gradient would
    take longer than its product. Without main_grad it has up to two: several chunks would need the
    sum in fp32, as many bytes as the logits of 2 H rows.
    """
    chunk = 2**30 if into_main_grad else max(2**31, 4 * case.vocab * case.width)
    logits = 2 * case.supervised * case.vocab
    return logits / math.ceil(logits / chunk) + 2 * 2 * case.supervised * case.width


def h100_floor_ms(case: Case) -> float:
    """Matrix products at 790 TFLOP/s, and one pass over bf16 logits at 3 TB/s."""
    logits = case.supervised * case.vocab
    products, logit_bytes = (6, 4) if case.backward else (2, 2)  # read and write, or read
    return 1e3 * (products * logits * case.width / 790e12 + logit_bytes * logits / 3e12)


def cases_of(device: str, *, quick: bool) -> list[Case]:
    """What is measured where."""
    masks = (0, 35, 50)
    if device == "cpu":
        shapes = [(512, 64, 8192), (512, 256, 32768), (512, 1024, 32768)]
        kinds = product(shapes[:1], ["bf16"]) if quick else product(shapes, PRECISIONS)
        return [
            Case(device="cpu", rows=rows, width=width, vocab=vocab, dtype=dtype, masked=masked)
            for ((rows, width, vocab), dtype), masked in product(kinds, masks)
        ]
    shares = [(1, True)] if quick else [*product((1, 2, 4), (True, False))]
    return [
        replace(H100, vocab=H100.vocab // tensor, tensor=tensor, backward=backward, masked=masked)
        for (tensor, backward), masked in product(shares, masks)
    ]


# ---- the measurement of a case


@dataclass(kw_only=True)
class Result:
    """What is known of one contestant in one case."""

    case: Case
    contestant: Contestant
    variant: str = ""
    run: Run = eager
    errors: Errors = field(default_factory=dict)
    reason: str = ""
    """Why there are no figures; empty where there are."""
    ms: float = math.nan
    min_ms: float = math.nan
    rounds: int = 0
    speedup: float = math.nan
    """Eager's time over its own."""
    memory: int = 0
    memory_share: float = math.nan
    """Of eager's."""

    @property
    def tflops(self) -> float:
        """Useful arithmetic a second: three products over the supervised rows, or one."""
        case = self.case
        flop = (6 if case.backward else 2) * case.supervised * case.width * case.vocab
        return flop / self.ms / 1e9

    @property
    def goals(self) -> list[Goal]:
        """What is asked of it."""
        if not self.contestant.ours or self.reason:
            return []
        return goals_of(self.case, into_main_grad=self.contestant.into_main_grad)

    def row(self) -> dict[str, Any]:
        """For --json."""
        figures = ("ms", "min_ms", "rounds", "speedup", "tflops", "memory", "memory_share")
        row = {**asdict(self.case), "contestant": self.contestant.name}
        row |= {"variant": self.variant, "reason": self.reason}
        row |= {"errors": self.errors}
        if not self.reason:
            row |= {name: getattr(self, name) for name in figures}
            row |= {"goals": [{"goal": goal.text, "met": goal.met(self)} for goal in self.goals]}
        return row


Best = dict[tuple[str, Case], str]
"""The fastest correct variant of a contestant, found once for all shares of masked rows."""


def measure(
    case: Case,
    contestants: Sequence[Contestant],
    seconds: float,
    processes: ProcessPoolExecutor,
    best: Best,
) -> list[Result]:
    """All contestants on one case, taking turns for about so many seconds."""
    problem = Problem(case)
    results = examine(problem, contestants, best)
    running = [result for result in results if not result.reason]
    take_turns(running, problem, seconds)
    for result in running:
        name, variant, run = result.contestant.name, result.variant, result.run
        if case.device == "cpu":
            result.memory = processes.submit(cpu_memory, case, name, variant).result()
        else:
            into_main_grad = result.contestant.into_main_grad
            result.memory = cuda_memory(run, problem, into_main_grad=into_main_grad)
    base = results[0]
    for result in running:
        result.speedup = base.ms / result.ms
        result.memory_share = result.memory / base.memory
    return results


def examine(problem: Problem, contestants: Sequence[Contestant], best: Best) -> list[Result]:
    """Each contestant's fastest correct variant, or what is wrong with it."""
    case, exact = problem.case, reference(problem)
    eager_errors = errors_of(eager, problem, exact, into_main_grad=False)
    results = []
    for contestant in contestants:
        validates_alike = contestant.into_main_grad and not case.backward
        if case.device not in contestant.devices or validates_alike:
            continue
        key = (contestant.name, replace(case, masked=0))
        variants = contestant.variants(case)
        if key in best:
            variants = {best[key]: variants[best[key]]}
        tried = [
            try_out(contestant, variant, run, problem, exact, eager_errors)
            for variant, run in variants.items()
        ]
        chosen = min(tried, key=lambda result: (result.reason != "", result.ms))
        if not chosen.reason:
            best[key] = chosen.variant
        results.append(chosen)
    return results


def try_out(
    contestant: Contestant,
    variant: str,
    run: Run,
    problem: Problem,
    exact: Exact,
    eager_errors: Errors,
) -> Result:
    """Whether it runs and is right, and about how long it takes."""
    case = problem.case
    result = Result(case=case, contestant=contestant, variant=variant, run=run)
    try:
        result.errors = errors_of(run, problem, exact, into_main_grad=contestant.into_main_grad)
        result.ms = 1e3 * SECONDS_OF[case.device](run, problem)
    except Exception as error:  # a peer may fail in any way; the others still run
        reason = f"not run: {type(error).__name__}: {error}".splitlines()[0]
        return Result(case=case, contestant=contestant, reason=reason)
    if not is_right(result.errors, eager_errors, case, exact_loss=contestant.exact_loss):
        result.reason = "WRONG"
    return result


def take_turns(results: list[Result], problem: Problem, seconds: float) -> None:
    """Rounds in which everyone runs once: at least 7, more while they are short."""
    times: list[list[float]] = [[] for _ in results]
    order = random.Random(0)
    begin, rounds = time.perf_counter(), 0
    while rounds < 7 or (rounds < 101 and time.perf_counter() - begin < seconds):
        for index in order.sample(range(len(results)), len(results)):
            run = results[index].run
            times[index].append(SECONDS_OF[problem.case.device](run, problem))
        rounds += 1
    for result, own in zip(results, times, strict=True):
        result.ms, result.min_ms = 1e3 * statistics.median(own), 1e3 * min(own)
        result.rounds = rounds


# ---- how it is shown


Column = tuple[str, Callable[[Result], str]]


def columns_of(device: str) -> list[Column]:
    """The figures of the table, in their order."""

    def verdict(*figures: str) -> Callable[[Result], str]:
        def show(result: Result) -> str:
            verdicts = {True: "met", False: "MISSED"}
            asked = [goal for goal in result.goals if goal.figure in figures]
            return "".join(f"{goal.text} {verdicts[goal.met(result)]}" for goal in asked)

        return show

    cuda: list[Column] = [
        ("TFLOP/s", lambda result: f"{result.tflops:.0f}"),
        ("floor", lambda result: f"{h100_floor_ms(result.case):.1f}"),
    ]
    return [
        ("ms", lambda result: f"{result.ms:.1f}"),
        ("min", lambda result: f"{result.min_ms:.1f}"),
        *(cuda if device == "cuda" else []),
        ("speedup", lambda result: f"{result.speedup:.2f}"),
        ("goal", verdict("speedup", "ms")),
        ("MB", lambda result: f"{result.memory / 1e6:.1f}"),
        ("of eager", lambda result: f"{result.memory_share:.2f}"),
        ("goal", verdict("memory_share", "memory")),
    ]


def show(results: list[Result]) -> None:
    """The results of one shape and precision, a section for each share of masked rows."""
    columns = columns_of(results[0].case.device)
    table = Table(
        title=str(results[0].case), title_justify="left", box=SIMPLE, collapse_padding=True
    )
    table.add_column(no_wrap=True)
    for name in (*(name for name, _ in columns), "loss error", "dX error", "dW error"):
        table.add_column(name, justify="right", no_wrap=True)
    for masked, section in groupby(results, key=lambda result: result.case.masked):
        table.add_section()
        table.add_row(f"{masked} % masked")
        for result in section:
            figures = ["" if result.reason else figure(result) for _, figure in columns]
            errors = [f"{error:.1e}" for error in result.errors.values()]
            table.add_row(result.contestant.name, *figures, *errors)
    console.print(table)
    notes = [
        (result.contestant.name, *filter(None, (result.reason, result.variant)))
        for result in results
    ]
    for note in dict.fromkeys(notes):
        if len(note) > 1:
            console.print("  " + ": ".join(note), soft_wrap=True)
    console.print()


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 if ours is wrong anywhere, or if time was too short."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases, about a minute")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="whose names begin so, and eager")
    Deadline.add_to(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    require(options.device, parser)
    deadline = Deadline(options.minutes)
    if options.device == "cuda":
        library.load_cuda()
    asked = ("eager", *options.only) if options.only else ("",)
    contestants = [one for one in CONTESTANTS if one.name.startswith(asked)]
    device = torch.cuda.get_device_name() if options.device == "cuda" else None
    where = machine("torch", device=device) | {"threads": torch.get_num_threads()}
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    results: list[Result] = []
    measured = 0
    best: Best = {}
    seconds = 1.0 if options.quick else 3.0
    cases = cases_of(options.device, quick=options.quick)
    with fresh_processes() as processes:
        begun = takewhile(lambda _: not deadline.over, cases)
        for _, group in groupby(begun, key=lambda case: replace(case, masked=0)):
            of_shape = [measure(case, contestants, seconds, processes, best) for case in group]
            measured += len(of_shape)
            results += chain.from_iterable(of_shape)
            show([*chain.from_iterable(of_shape)])
            if options.json:
                report = {**where, "rows": [result.row() for result in results]}
                write_named(options.json, json.dumps(report, indent=1) + "\n")
    verdicts = [goal.met(result) for result in results for goal in result.goals]
    wrong = [result for result in results if result.contestant.ours and result.reason]
    console.print(f"goals: {sum(verdicts)} of {len(verdicts)} met; wrong or not run: {len(wrong)}")
    if dist.is_initialized():
        dist.destroy_process_group()
    for case in cases[measured:]:
        console.print(f"{case}, {case.masked} % masked: {deadline.reason}")
    return int(bool(wrong or cases[measured:]))


if __name__ == "__main__":
    sys.exit(main())
