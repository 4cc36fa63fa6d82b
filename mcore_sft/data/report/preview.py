"""The first examples of each source on the console, and what the rules drop on the way."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice

import numpy as np
from rich.rule import Rule

from mcore_sft.base.terminal import Console
from mcore_sft.data.encode.block import Drops, Encoded, Encoder, Sample, excerpt
from mcore_sft.data.encode.collect import CONTAMINATED, Mask, contaminated, that_ask
from mcore_sft.data.encode.job import Job
from mcore_sft.data.encode.stage import is_compared
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.packs.split import TOO_LONG
from mcore_sft.data.report.show import coloured
from mcore_sft.data.selection.contamination import Contamination
from mcore_sft.data.sources.blocks import Block
from mcore_sft.data.sources.survey import peek
from mcore_sft.data.text.prompt import Example


def preview(job: Job, count: int, *, console: Console) -> None:
    """Print the first `count` examples of each source, trained tokens green, then the dropped.

    Of a source no more is read than these need.
    """
    encoder, rules = Encoder(job.recipe()), _Rules(job)
    for split, sources in job.sources.items():
        for source in sources:
            seen = peek(source, root=job.config.root)
            if seen.using:
                job.console.print(f"{source.path}: {seen.using}", soft_wrap=True)
            examples = _examples_of(seen.blocks(), encoder, split, rules)
            for title, example in islice(examples, count):
                console.print(Rule(f"{split}: {title}", align="left"))
                console.print(coloured(example, job.tokenizer))
    for reason, number in rules.drops.counts.items():
        console.print(Rule(f"{number:,} dropped on the way: {reason}", align="left"))
        for sample in rules.drops.samples.get(reason, ()):
            text = sample.text or excerpt(job.tokenizer.decode(list(sample.tokens)))
            console.print(f"{sample.where}: {text}")


class _Rules:
    """What is dropped of encoded blocks, each by itself."""

    def __init__(self, job: Job) -> None:
        self.drops = Drops()
        self.job = job

    def kept(self, encoded: Encoded, split: str) -> Mask:
        """Which examples are kept [M]; the others are added to `drops`."""
        self.drops.update(encoded.drops)
        fits = encoded.examples.lengths <= self.job.config.sequence_length
        asked = np.zeros(len(fits), np.bool_)
        if is_compared(self.job, split) and self.job.config.contamination.remove:
            found = self._contamination.check(encoded.asked.texts.to_pylist())
            asked = that_ask(encoded.asked.counts, encoded.asked.hashes, contaminated(found))
        self._drop(CONTAMINATED, encoded, asked)
        self._drop(TOO_LONG, encoded, ~fits & ~asked)
        return fits & ~asked

    @cached_property
    def _contamination(self) -> Contamination:
        threshold = self.job.config.contamination.threshold
        return Contamination(self.job.benchmark, threshold=threshold)

    def _drop(self, reason: str, encoded: Encoded, which: Mask) -> None:
        starts, made = running_sum(encoded.examples.lengths), encoded.examples
        samples = (
            Sample(
                f"{encoded.name}:{encoded.numbers[index]}",
                "",
                tokens=made.tokens[starts[index] : starts[index + 1]].tolist(),
            )
            for index in np.flatnonzero(which).tolist()
        )
        self.drops.add(reason, int(which.sum()), samples)


def _examples_of(
    blocks: Iterable[Block], encoder: Encoder, split: str, rules: _Rules
) -> Iterator[tuple[str, Example]]:
    """Titles and examples in order."""
    for block in blocks:
        encoded = encoder.encode(block, compared=is_compared(rules.job, split))
        kept = rules.kept(encoded, split)
        yield from (each for each, wanted in zip(_examples(encoded), kept, strict=True) if wanted)


def _examples(encoded: Encoded) -> Iterator[tuple[str, Example]]:
    token, span = 0, 0
    made = encoded.examples
    lengths, counts = made.lengths.tolist(), made.span_counts.tolist()
    for length, spans, number in zip(lengths, counts, encoded.numbers.tolist(), strict=True):
        example = Example(
            tokens=made.tokens[token : token + length], spans=made.spans[span : span + spans]
        )
        trained = int((example.spans[:, 1] - example.spans[:, 0]).sum())
        yield f"{encoded.name}:{number}: {length} tokens, {trained} trained", example
        token, span = token + length, span + spans
