"""How `linear_cross_entropy` computes: chunk by chunk, the gradients on the way.

    hidden_TD --Compaction--> hidden_RD --chunks of rows--> loss, grad_hidden_TD, grad_weight_VD

Three matrix products a chunk (logits, gradient of the rows, gradient of the weight), by torch; what
lies between them, along the rows of the logits, by csrc/. Letters as in linear_cross_entropy.py.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.nn import functional

from mcore_sft.ops import library

library.load()


class Inputs(NamedTuple):
    """The operator's arguments that are tensors: see `linear_cross_entropy`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    rows: Tensor | None


class Options(NamedTuple):
    """The operator's other arguments."""

    vocab_size: int
    """Vocabulary rows of all ranks, without padding."""
    group: str
    """Name of the process group that shares the vocabulary; empty where one rank has all of it."""
    sequence_parallel: bool


@dataclass(frozen=True)
class Machine:
    """What differs from device to device."""

    chunk_rows: Callable[[Tensor], int]
    """Weight -> how many rows of logits are held at a time, at most."""
    tile: int
    """Rows that a matrix product computes together."""
    add_product: Callable[[Tensor, Tensor, Tensor, bool], None]
    """(sum, left, right, fresh): sum += left @ right, = where fresh, in the sum's precision."""
    add_product_exactly: Callable[[Tensor, Tensor, Tensor, bool], None]
    """The same with products in the sum's precision too, for a sum that is to be rounded again."""


IGNORE = -100
"""The label of a row that counts for nothing."""


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The precision of the softmax for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Shard:
    """This rank's part of the vocabulary, and the ranks that hold the others."""

    group: dist.ProcessGroup | None
    size: int
    rank: int
    first: int
    """Token id of the first column."""
    width: int
    """Columns that are no padding."""

    @classmethod
    def of(cls, group: str, rows: int, vocab_size: int) -> "Shard":
        """The shard of `rows` vocabulary rows that this rank of `group` holds."""
        if not group:
            return cls(None, 1, 0, 0, min(rows, vocab_size))
        ranks = _resolve_process_group(group)  # type: ignore[arg-type]
        rank = dist.get_rank(ranks)
        width = min(max(vocab_size - rank * rows, 0), rows)
        return cls(ranks, dist.get_world_size(ranks), rank, rank * rows, width)

    def all_gather(self, tensor: Tensor) -> tuple[Tensor, dist.Work | None]:
        """The same tensor of every rank [size, ...], there once the work is waited for."""
        if self.size == 1:
            return tensor[None], None
        everyone = tensor.new_empty(self.size, *tensor.shape)
        work = dist.all_gather_into_tensor(
            everyone.flatten(0, 1), tensor, group=self.group, async_op=True
        )
        return everyone, work


def sent(rows: Tensor, device: torch.device) -> Tensor:
    """Row numbers on `device`; pinned for a GPU, whose host goes on meanwhile."""
    if device.type == "cuda" and not rows.is_pinned():
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)


class Compaction:
    """Brings together the rows that enter the head, and carries their gradients back.

    Under sequence parallelism each rank sends none but its supervised rows.
    """

    def __init__(self, rows: Tensor | None, hidden: Tensor, shard: Shard, *, split: bool) -> None:
        self.shard, self.split, self.length = shard, split, len(hidden)
        self.sum = hidden.new_empty(0, hidden.shape[1])
        self.work: dist.Work | None = None
        length = len(hidden) * (shard.size if split else 1)
        if rows is not None and not (
            rows.device.type == "cpu"
            and rows.dtype == torch.int64
            and rows.dim() == 1
            and (
                torch.diff(rows, prepend=torch.tensor([-1]), append=torch.tensor([length])) > 0
            ).all()
        ):
            raise ValueError(
                f"rows are {rows.dtype} {list(rows.shape)} on {rows.device}, expected int64 [R] on "
                f"the CPU, increasing, from 0 to {length - 1}"
            )
        if split:
            rows = torch.arange(length) if rows is None else rows
            bounds = torch.arange(shard.size + 1) * len(hidden)
            ends = torch.searchsorted(rows, bounds).tolist()
            counts = [end - begin for begin, end in itertools.pairwise(ends)]
            self.sent = max(counts)  # rows that every rank sends, filled up where it has fewer
            received = [torch.arange(n) + rank * self.sent for rank, n in enumerate(counts)]
            self.received = sent(torch.cat(received), hidden.device)
            rows = rows[ends[shard.rank] : ends[shard.rank + 1]] - bounds[shard.rank]
        elif rows is not None and len(rows) == length:
            rows = None
        self.rows = None if rows is None else sent(rows, hidden.device)

    def gather(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] of this rank -> those of all supervised rows [R, D]."""
        own = hidden.contiguous() if self.rows is None else hidden.index_select(0, self.rows)
        if not self.split or not self.sent:
            return own
        everyone, work = self.shard.all_gather(functional.pad(own, (0, 0, 0, self.sent - len(own))))
        wait(work)
        return everyone.flatten(0, 1).index_select(0, self.received)

    def start_return(self, grad_x: Tensor) -> None:
        """Begin to sum up the gradients [R, D], of which each rank has its shard's part."""
        self.sum = grad_x
        if self.split:
            spread = grad_x.new_zeros(self.shard.size * self.sent, grad_x.shape[1])
            spread.index_copy_(0, self.received, grad_x)
            self.sum = grad_x.new_empty(self.sent, grad_x.shape[1])
            self.work = dist.reduce_scatter_tensor(
                self.sum, spread, group=self.shard.group, async_op=True
            )
        elif self.shard.size > 1:
            self.work = dist.all_reduce(grad_x, group=self.shard.group, async_op=True)

    def finish_return(self) -> Tensor:
        """The gradient of the hidden states [T, D], zero in the rows that did not enter."""
        wait(self.work)
        if self.rows is None:
            return self.sum
        grad = self.sum.new_zeros(self.length, self.sum.shape[1])
        return grad.index_copy_(0, self.rows, self.sum[: len(self.rows)])


class Chunk(NamedTuple):
    """Rows whose logits are held at the same time."""

    rows: slice
    logits: Tensor
    """[C, V], and later their gradient."""
    statistics: Tensor
    """[ranks, C, 3], as csrc/cpu/cross_entropy_rows.h lists them."""
    arrival: dist.Work | None


class Head:
    """One computation of the loss, with the gradients that are asked for."""

    def __init__(
        self,
        machine: Machine,
        inputs: Inputs,
        options: Options,
        for_hidden: bool,
        for_weight: bool,
        upstream: Tensor | None = None,
        main_grad: Tensor | None = None,
    ) -> None:
        hidden, weight, labels, rows = inputs
        self.machine, self.options = machine, options
        self.weight, self.labels = weight, labels
        self.for_hidden, self.for_weight = for_hidden, for_weight
        self.shard = Shard.of(options.group, len(weight), options.vocab_size)
        self.compaction = Compaction(rows, hidden, self.shard, split=options.sequence_parallel)
        self.x = self.compaction.gather(hidden)
        self.valid = labels != IGNORE
        self._check(main_grad)
        self.factors = self.valid.to(arithmetic(weight.dtype))
        if upstream is not None:
            self.factors = torch.where(self.valid, upstream, self.factors)
        limit = machine.chunk_rows(weight)
        if for_weight and main_grad is None and weight.element_size() == 2:
            # Several chunks would need a sum in fp32: as many bytes hold 2 D rows of logits.
            limit = 2 * max(limit, weight.shape[1])
        self.chunks = split(len(labels), limit, machine.tile)
        self.grad_x = torch.empty_like(self.x) if for_hidden else self.x.new_empty(0)
        self.main_grad = main_grad
        self.grad_weight = self._new_grad_weight() if main_grad is None else main_grad

    def run(self) -> tuple[Tensor, ...]:
        """Sum of the losses, each row's, and the gradients of hidden and weight where asked for.

        The weight's gradient is added to `main_grad` where there is one, and then not returned.
        """
        token_loss = self._losses([self._finish(chunk) for chunk in self._started()])
        loss = token_loss.sum(dtype=torch.float64).to(token_loss.dtype)
        grad_hidden = self.compaction.finish_return() if self.for_hidden else self.grad_x
        if self.main_grad is None:
            return loss, token_loss, grad_hidden, self.grad_weight.to(self.weight.dtype)
        return loss, token_loss, grad_hidden

    def _started(self) -> Iterator[Chunk]:
        """The chunks; over several ranks each one's statistics travel beside the next's logits."""
        ahead = 1 if self.shard.size > 1 else 0
        longest = self.chunks[0].stop if self.chunks else 0
        free = deque(
            self.weight.new_empty(longest, len(self.weight)) for _ in self.chunks[: 1 + ahead]
        )
        waiting: deque[Chunk] = deque()
        for rows in self.chunks:
            waiting.append(self._start(rows, free.popleft()))
            if len(waiting) > ahead:
                chunk = waiting.popleft()
                yield chunk
                free.append(chunk.logits)
        yield from waiting

    def _start(self, rows: slice, buffer: Tensor) -> Chunk:
        logits = buffer[: rows.stop - rows.start]
        torch.mm(self.x[rows], self.weight.t(), out=logits)
        labels = self.labels[rows]
        if self.shard.size == 1 and (self.for_hidden or self.for_weight):
            statistics = torch.ops.mcore_sft.cross_entropy_(
                logits, labels, self.factors[rows], self.shard.width
            )
        else:
            statistics = torch.ops.mcore_sft.cross_entropy_statistics(
                logits, labels, self.shard.first, self.shard.width
            )
        return Chunk(rows, logits, *self.shard.all_gather(statistics))

    def _finish(self, chunk: Chunk) -> Tensor:
        rows, logits = chunk.rows, chunk.logits
        wait(chunk.arrival)
        if self.shard.size > 1 and (self.for_hidden or self.for_weight):
            largest, log_sum, _ = combine(chunk.statistics)
            torch.ops.mcore_sft.cross_entropy_gradient_(
                logits,
                self.labels[rows],
                largest,
                log_sum,
                self.factors[rows],
                self.shard.first,
                self.shard.width,
            )
        if self.for_hidden:
            torch.mm(logits, self.weight, out=self.grad_x[rows])
            if rows is self.chunks[-1]:  # these travel while the weight's gradient is computed
                self.compaction.start_return(self.grad_x)
        if self.for_weight:
            fresh = self.main_grad is None and rows is self.chunks[0]
            rounded_again = self.grad_weight.dtype != self.weight.dtype and self.main_grad is None
            machine = self.machine
            add = machine.add_product_exactly if rounded_again else machine.add_product
            add(self.grad_weight, logits.t(), self.x[rows], fresh)
        return chunk.statistics

    def _losses(self, statistics: list[Tensor]) -> Tensor:
        """Each row's, once for all chunks: many small steps, which no product waits for."""
        if not statistics:
            return torch.empty_like(self.factors)
        largest, log_sum, of_label = combine(torch.cat(statistics, dim=1))
        return torch.where(self.valid, log_sum - (of_label - largest), 0)

    def _new_grad_weight(self) -> Tensor:
        """Where the chunks' gradients of the weight are added up, in fp32 if there are several."""
        if not self.for_weight:
            return self.weight.new_empty(0)
        if not self.chunks:
            return torch.zeros_like(self.weight)
        several = len(self.chunks) > 1
        dtype = arithmetic(self.weight.dtype) if several else self.weight.dtype
        return torch.empty_like(self.weight, dtype=dtype)

    def _check(self, main_grad: Tensor | None) -> None:
        x, weight, labels = self.x, self.weight, self.labels
        if x.dtype != weight.dtype or x.shape[1:] != weight.shape[1:]:
            raise ValueError(
                f"hidden is {x.dtype} {list(x.shape)}, weight {weight.dtype} {list(weight.shape)}: "
                "expected one dtype and one width"
            )
        if labels.shape != x.shape[:1]:
            raise ValueError(f"labels are {list(labels.shape)}, expected [{len(x)}]: one a row")
        if main_grad is not None and (
            main_grad.shape != weight.shape or main_grad.dtype != arithmetic(weight.dtype)
        ):
            raise ValueError(
                f"main_grad is {main_grad.dtype} {list(main_grad.shape)}, expected "
                f"{arithmetic(weight.dtype)} {list(weight.shape)}"
            )
        known = (labels >= 0) & (labels < self.options.vocab_size)
        torch._assert_async(
            (known | ~self.valid).all(),
            f"a label is neither below the vocabulary's size ({self.options.vocab_size}) nor "
            f"{IGNORE}",
        )


def combine(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of every shard [ranks, C, 3] -> those of the whole rows [C].

    They are the largest logit, log sum exp(z - largest) and the label's logit. The ranks are summed
    up in their order, so that every rank finds the same bits.
    """
    most, exponentials, of_label = statistics.unbind(-1)
    largest = most.amax(0)
    log_sum = ((most - largest).exp() * exponentials).sum(0).log()
    return largest, log_sum, of_label.sum(0)


def split(rows: int, limit: int, tile: int) -> list[slice]:
    """As few chunks of at most `limit` rows as will do, even but for a tile, the longest first."""
    if rows == 0:
        return []
    tiles = -(-rows // tile)
    number = -(-tiles // max(1, limit // tile))
    even, longer = divmod(tiles, number)
    bounds = [min((i * even + min(i, longer)) * tile, rows) for i in range(number + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def wait(work: dist.Work | None) -> None:
    """Until `work` is done; the host does not wait where a stream can."""
    if work is not None:
        work.wait()
