"""The first examples of an experiment on the console, and what its rules drop on the way."""

from collections.abc import Iterator

from rich.console import Console
from rich.rule import Rule

from mcore_sft.data.encode import Drops, Encoded, Encoder
from mcore_sft.data.job import Job
from mcore_sft.data.prompt import Example
from mcore_sft.data.show import coloured


def preview(job: Job, count: int, *, console: Console) -> None:
    """Print the first `count` examples of training, trained tokens green, then what was dropped."""
    drops, left = Drops(), count
    for encoded in _encoded(job, count):
        drops.update(encoded.drops)
        for title, example in _examples(encoded):
            if left == 0:
                break
            console.print(Rule(title, align="left"))
            console.print(coloured(example, job.tokenizer))
            left -= 1
        if left == 0:
            break
    for reason, number in drops.counts.items():
        console.print(Rule(f"{number:,} dropped on the way: {reason}", align="left"))
        for sample in drops.samples.get(reason, ()):
            console.print(f"{sample.where}: {sample.text}", markup=False, highlight=False)


def _encoded(job: Job, count: int) -> Iterator[Encoded]:
    encoder = Encoder(job.recipe("train"))
    for source, block in job.blocks("train"):
        yield encoder.encode(block, source)


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
