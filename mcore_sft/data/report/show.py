"""A packed dataset in, its packs, examples and lengths for people: coloured text, ids, a chart.

Supervised tokens are green, the others dim, special tokens bold.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.bar import Bar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mcore_sft.base.terminal import Console, printable
from mcore_sft.data.errors import DataError
from mcore_sft.data.packs.dataset import Arrays, PackedDataset
from mcore_sft.data.text.prompt import Example
from mcore_sft.data.text.tokenizer import Tokenizer, load_tokenizer

_BINS = 12


def load_own_tokenizer(path: Path, dataset: PackedDataset) -> Tokenizer:
    """The tokenizer at `path`; `DataError` if another one made the dataset."""
    tokenizer = load_tokenizer(path, option="--tokenizer DIR")
    expected = dataset.manifest["inputs"]["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != expected:
        raise DataError(
            f"{path}: not the tokenizer that made this dataset (fingerprint "
            f"{tokenizer.fingerprint[:12]}, expected {expected[:12]}); "
            "give that one (--tokenizer DIR), or none to see the ids"
        )
    return tokenizer


class Viewer:
    """Prints packs and examples of one split; without a tokenizer, as ids."""

    def __init__(
        self,
        dataset: PackedDataset,
        arrays: Arrays,
        tokenizer: Tokenizer | None,
        *,
        ids: bool,
        console: Console,
    ) -> None:
        """`ids`: every token on a line of its own, with position and id. `arrays` are sound."""
        self._dataset = dataset
        self._arrays = arrays
        self._tokenizer = tokenizer
        self._ids = ids
        self._console = console

    def pack(self, index: int) -> None:
        """Print one pack, example by example."""
        _require(index, len(self._dataset), "pack")
        start, end = self._arrays.pack_offsets[index : index + 2].tolist()
        size = int(self._arrays.tokens.lengths[self._arrays.packs[start:end]].sum())
        whole = self._dataset.sequence_length
        self._console.print(
            f"{self._arrays.prefix}: pack {index} of {len(self._dataset):,}: "
            f"{size:,} of {whole:,} tokens ({size / whole:.1%}), "
            f"{self._dataset.supervised[index]:,} supervised, examples: {end - start}",
            soft_wrap=True,
        )
        for place in range(start, end):
            self._print(place, index)

    def example(self, index: int) -> None:
        """Print one example, and say in which pack it lies."""
        _require(index, self._dataset.num_distinct, "example")
        place = int(np.flatnonzero(self._arrays.packs == index)[0])
        pack = self._arrays.pack_of(place)
        self._console.print(f"{self._arrays.prefix}: pack {pack}", soft_wrap=True)
        self._print(place, pack)

    def _print(self, place: int, pack: int) -> None:
        """The example at `place` of the order of packing, and where it lies in its pack."""
        start = self._arrays.pack_offsets[pack]
        before = self._arrays.packs[start:place]
        position = int(self._arrays.tokens.lengths[before].sum())
        index = int(self._arrays.packs[place])
        example = self._dataset.example(index)
        trained = int((example.spans[:, 1] - example.spans[:, 0]).sum())
        title = (
            f"example {index}: {len(example):,} tokens at {position:,} to "
            f"{position + len(example) - 1:,}, {trained:,} supervised"
        )
        self._console.print(Rule(title, align="left", style="cyan"))
        self._require_known(example, index)
        if self._ids:
            self._console.print(_by_token(example, self._tokenizer, position))
        elif self._tokenizer:
            self._console.print(coloured(example, self._tokenizer), soft_wrap=True)
        else:
            self._console.print(_only_ids(example), soft_wrap=True)

    def _require_known(self, example: Example, index: int) -> None:
        if self._tokenizer is None:
            return
        size = self._tokenizer.vocab_size
        strange = np.flatnonzero((example.tokens < 0) | (example.tokens >= size))
        if len(strange):
            at = strange[0]
            raise DataError(
                f"{self._arrays.file('bin')}: example {index}: token {at} has id "
                f"{example.tokens[at]}, expected one of the vocabulary, 0 to {size - 1}; "
                "run preprocess again with --overwrite"
            )


def coloured(example: Example, tokenizer: Tokenizer) -> Text:
    """The text of an example: trained tokens green, the others dim, special tokens bold."""
    text = Text()
    for ids, style in _runs(example, _special_ids(tokenizer)):
        text.append(printable(tokenizer.spell(ids)), style=style)
    return text


def length_chart(lengths: npt.NDArray[np.int32], title: str) -> Table:
    """How many examples are how long: about twelve steps of a round width."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = _round_up(-(-(longest - shortest + 1) // _BINS))
    first = (shortest - 1) // width
    counts = np.bincount((lengths - 1) // width - first)
    table = Table("tokens", "examples", "share", "", title=title, box=None)
    for column in table.columns[:3]:
        column.justify = "right"
    for step, count in enumerate(counts.tolist(), first):
        table.add_row(
            f"{step * width + 1:,} to {(step + 1) * width:,}",
            f"{count:,}",
            f"{count / len(lengths):.1%}",
            Bar(size=int(counts.max()), begin=0, end=count, width=40),
        )
    return table


def _by_token(example: Example, tokenizer: Tokenizer | None, position: int) -> Table:
    """A line for each token: its position in the pack, id, text, and whether it is supervised."""
    table = Table("position", "id", "text", "supervised", box=None)
    for column in table.columns[:2]:
        column.justify = "right"
    at = position
    for ids, style in _runs(example, _special_ids(tokenizer) if tokenizer else []):
        for number in ids:
            shown = repr(tokenizer.spell([number])) if tokenizer else ""
            trained = "yes" if "green" in style else ""
            table.add_row(str(at), str(number), Text(shown), trained, style=style)
            at += 1
    return table


def _only_ids(example: Example) -> Text:
    return Text(" ").join(
        Text(" ".join(map(str, ids)), style=style) for ids, style in _runs(example, [])
    )


def _runs(example: Example, special: list[int]) -> Iterator[tuple[list[int], str]]:
    """Stretches of tokens that look alike, with their style."""
    trained = np.zeros(len(example), dtype=np.bool_)
    for start, end in example.spans.tolist():
        trained[start:end] = True
    kind = 2 * trained + np.isin(example.tokens, special)
    styles = ("dim", "bold", "green", "bold green")
    cuts = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(example)]
    for start, end in pairwise(cuts):
        yield example.tokens[start:end].tolist(), styles[kind[start]]


def _special_ids(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.token_id(name) for name in tokenizer.special_tokens]


def _round_up(number: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = int("1" + "0" * (len(str(number)) - 1))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


def _require(index: int, count: int, what: str) -> None:
    if not 0 <= index < count:
        raise DataError(f"--{what} {index}: expected 0 to {count - 1}")
