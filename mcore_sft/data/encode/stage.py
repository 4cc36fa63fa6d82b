"""Blocks of a job in, their files out, and what is kept of them: the part that tokenizes.

job.blocks -> store.encode (processes) -> BlockFile -> store.compare (processes) -> Collector
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from mcore_sft.base.progress import Advance
from mcore_sft.config import DataConfig
from mcore_sft.data.encode import store as stores
from mcore_sft.data.encode.block import BAD, Drops
from mcore_sft.data.encode.block_files import BlockFile
from mcore_sft.data.encode.collect import Collected, Collector
from mcore_sft.data.encode.job import Job
from mcore_sft.data.encode.store import Bench, Store
from mcore_sft.data.errors import DataError
from mcore_sft.data.selection.contamination import Finding
from mcore_sft.data.selection.duplicates import Seen
from mcore_sft.data.text.prompt import UNFIT
from mcore_sft.data.workers import Workers

Result = TypeVar("Result")


class _GigatokenDiffers(Exception):
    """A sample did not bear out that gigatoken gives the tokenizer's ids."""


def by_one_tokenizer(job: Job, work: Callable[[], Result]) -> Result:
    """`work` by gigatoken, or all of it by `tokenizers`, whichever process noticed."""
    try:
        return work()
    except _GigatokenDiffers:
        job.tokenizer.gigatoken = False
        job.console.print("starting again with `tokenizers` for every text")
        return work()


def benches(
    job: Job, benchmark: Mapping[str, str] | None = None, *, as_json: bool = False
) -> Workers:
    """Processes for the blocks of `job`, which compare them with `benchmark`, or the job's own."""
    make: Callable[..., Bench] = Bench  # which needs no tokenizer to compare
    if benchmark is None:
        make, benchmark = stores.ready_bench, job.benchmark
    threshold = job.config.contamination.threshold
    return Workers(
        job.num_workers, partial(make, job.recipe(as_json=as_json), benchmark, threshold)
    )


def encode(
    job: Job,
    split: str,
    store: Store,
    workers: Workers,
    tokens: np.dtype[Any],
    *,
    every: int = 1,
    first: int = 0,
) -> Iterator[BlockFile]:
    """The blocks of `split`, or every n-th of them, encoded in order; `tokens` is the type of ids.

    Ends at bad rows, and where ids are wrong.
    """
    compared = is_compared(job, split)
    tasks = (
        (block, source, store.file(split, number), tokens, compared)
        for number, (source, block) in islice(enumerate(job.blocks(split)), first, None, every)
    )
    bad = Drops()
    for file in workers.each(stores.encode, tasks):
        block = BlockFile(file)
        if job.tokenizer.gigatoken and not block.gigatoken:
            raise _GigatokenDiffers
        bad.update(block.drops)
        _limit_bad_rows(bad, split, job.config)
        yield block


def is_compared(job: Job, split: str) -> bool:
    """Whether what users ask in a split is compared with benchmarks."""
    return split == "train" and bool(job.config.contamination.against)


def _limit_bad_rows(drops: Drops, split: str, config: DataConfig) -> None:
    if sum(drops.counts.get(reason, 0) for reason in (BAD, UNFIT)) > config.max_bad_rows:
        first = (drops.samples.get(BAD) or drops.samples[UNFIT])[0]
        raise DataError(
            f"{first.text}; it is the first of more than {config.max_bad_rows} rows of "
            f"data.{split} that cannot be used: mend them, or raise data.max_bad_rows"
        )


def collect(
    job: Job, split: str, blocks: Iterable[BlockFile], workers: Workers, advance: Advance
) -> Collected:
    """What is kept of `blocks`. Each distinct text is compared with the benchmarks once.

    advance: counts the bytes of the sources.
    """
    collector = Collector(
        deduplicate=job.config.filters.deduplicate, remove=job.config.contamination.remove
    )
    known = Seen()
    waiting: deque[tuple[BlockFile, Future[list[Finding]] | None]] = deque()

    def take() -> None:
        block, findings = waiting.popleft()
        collector.add(block, findings.result() if findings else ())
        advance(block.size)

    for block in blocks:
        findings = None
        if is_compared(job, split):
            new = np.flatnonzero(known.new(block.column("asked_text_hashes")))
            if len(new):
                findings = workers.submit(stores.compare, block.file, new)
        waiting.append((block, findings))
        if len(waiting) > workers.ahead:
            take()
    while waiting:
        take()
    return collector.collected()
