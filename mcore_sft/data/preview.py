"""The first examples of each source on the console, and what the rules drop on the way."""

from collections.abc import Iterable, Iterator
from itertools import islice

from rich.rule import Rule

from mcore_sft.base.terminal import Console
from mcore_sft.data.blocks import Block
from mcore_sft.data.encode import Drops, Encoded, Encoder
from mcore_sft.data.job import Job
from mcore_sft.data.prompt import Example
from mcore_sft.data.show import coloured
from mcore_sft.data.sources import peek


def preview(job: Job, count: int, *, console: Console) -> None:
    """Print the first `count` examples of each source, trained tokens green, then the dropped.

    Of a source no more is read than these need.
    """
    drops = Drops()
    for split, sources in job.sources.items():
        encoder = Encoder(job.recipe(split))
        for source in sources:
            seen = peek(source, root=job.config.root)
            if seen.using:
                job.console.print(f"{source.path}: {seen.using}", soft_wrap=True)
            for title, example in islice(_examples_of(seen.blocks(), encoder, drops), count):
                console.print(Rule(f"{split}: {title}", align="left"))
                console.print(coloured(example, job.tokenizer))
    for reason, number in drops.counts.items():
        console.print(Rule(f"{number:,} dropped on the way: {reason}", align="left"))
        for sample in drops.samples.get(reason, ()):
            console.print(f"{sample.where}: {sample.text}")


def _examples_of(
    blocks: Iterable[Block], encoder: Encoder, drops: Drops
) -> Iterator[tuple[str, Example]]:
    """Titles and examples in order; what is dropped on the way is added to `drops`."""
    for block in blocks:
        encoded = encoder.encode(block)
        drops.update(encoded.drops)
        yield from _examples(encoded)


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
