"""A block of rows in, its examples as flat arrays out: the work of one process.

Block -> Rows -> filters -> Examples -> Encoded
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.config import FilterConfig
from mcore_sft.data.encode.prompt_record import SystemHashes, system_hashes
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.rows import Chats, Examples, Pairs, Rows, Tokens
from mcore_sft.data.selection.asked import Asked, asked, said_by_users
from mcore_sft.data.selection.duplicates import Hashes, hashes_of, joined, text_hashes
from mcore_sft.data.selection.filters import Filters, Row
from mcore_sft.data.sources.blocks import Block
from mcore_sft.data.sources.conversation import system_text
from mcore_sft.data.sources.open_table import OpenTable
from mcore_sft.data.text.answers import TrainOn
from mcore_sft.data.text.prompt import UNFIT, Prompt
from mcore_sft.data.text.tokenizer import BULK, load_tokenizer

BAD = "bad row"
"""Why a row is dropped that cannot be used, where the run may leave such out."""

UNTRAINED = "nothing to learn"
"""Why an example is dropped of which others have marked no token as trained."""

SAMPLES = 3
"""Rows of a block that are shown for each reason to drop them."""

PROMPTS = 8
"""Examples of a block whose prompt is compared with what evaluation would send."""

_EXCERPT = 600


@dataclass(frozen=True)
class Sample:
    """A row that was dropped, and where it stands."""

    where: str
    text: str
    same_as: str = ""
    """Where the row stands that it repeats."""
    tokens: Sequence[int] = ()
    """What it says, where its text is not at hand."""


@dataclass
class Drops:
    """Rows that become no example, counted by reason, and the first few of each."""

    counts: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def add(self, reason: str, count: int, samples: Iterable[Sample] = ()) -> None:
        """Count `count` rows; of `samples`, as many are kept as are shown."""
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            shown = self.samples.setdefault(reason, [])
            shown.extend(islice(samples, SAMPLES - len(shown)))

    def update(self, other: "Drops") -> None:
        """Add those of `other`."""
        for reason, count in other.counts.items():
            self.add(reason, count, other.samples.get(reason, ()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Examples of one block and what became of its rows. M = examples.

    numbers int64 [M]: line or row of each in file `name`; hashes uint64 [M, 2]: of all that makes
    two examples the same; problems uint64 [M]: of the problem.
    read_hashes uint64 [rows, 2]: of all rows as they were before the filters, where those are
    compared too, else [0, 2].
    systems uint64 [M]: which system text each conversation has (`system_hashes`), else [0];
    system_texts: these texts, and how many examples have each.
    asked: what their users ask, where that is compared with benchmarks.
    rows: how many could be used, which `examples.rows` counts; size: bytes of the source.
    """

    source: int
    name: str
    examples: Examples
    numbers: npt.NDArray[np.int64]
    hashes: Hashes
    read_hashes: Hashes
    problems: npt.NDArray[np.uint64]
    systems: SystemHashes
    system_texts: Mapping[str, int]
    asked: Asked
    drops: Drops
    rows: int
    size: int
    gigatoken: bool
    kind: Literal["problems", "conversations", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a process needs to know to encode a block."""

    tokenizer: Path
    gigatoken: bool
    prompt: Mapping[str, Any]
    train_on: TrainOn
    skip_bad: bool
    filters: FilterConfig
    as_json: bool = False
    """Bytes of NeMo-Skills' JSON lines instead of tokens."""
    unfed: int | None = None
    """The id that no example may hold: a token that the model does not have."""


class Encoder:
    """Encodes blocks by one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tokenizer = load_tokenizer(recipe.tokenizer, gigatoken=recipe.gigatoken)
        self._prompt = Prompt.restore(recipe.prompt, self._tokenizer)
        self._table = OpenTable()
        self._filters = Filters(recipe.filters, self._count_tokens)

    def load(self) -> None:
        """Load what is loaded otherwise when it is first used."""
        self._tokenizer.encode_column(pa.array(["1 + 1"] * BULK, pa.large_string()))

    def encode(self, block: Block, source: int = 0, *, compared: bool = False) -> Encoded:
        """Examples of all rows that are wanted; the rest is counted.

        compared: whether what users ask is to be compared with benchmarks.
        """
        skip_bad, eos = self._recipe.skip_bad, self._tokenizer.eos_id
        read = block.read(skip_bad=skip_bad, eos=eos, table=self._table)
        drops = Drops()
        bad = (Sample(f"{read.name}:{number}", said) for number, said in read.bad.items())
        drops.add(BAD, len(read.bad), bad)
        rows, origin = self._filtered(read, drops)
        examples = self._examples(rows, drops)
        asked_first = _problem_hashes(rows)
        hashes, problems = _hashes(rows, examples, asked_first)
        systems = _systems(rows, examples)
        return Encoded(
            source=source,
            name=read.name,
            examples=replace(examples, rows=origin[examples.rows]),
            numbers=rows.numbers[examples.rows],
            hashes=hashes,
            read_hashes=self._read_hashes(read),
            problems=problems,
            systems=system_hashes(systems),
            system_texts=Counter(text for text in systems if text is not None),
            asked=_asked(rows, asked_first, examples) if compared else Asked(),
            drops=drops,
            rows=len(read),
            size=block.size,
            gigatoken=self._tokenizer.gigatoken,
            kind=_kind(read),
        )

    def _filtered(self, rows: Rows, drops: Drops) -> tuple[Any, npt.NDArray[np.int64]]:
        """The rows that the filters leave, perhaps changed, and the index each had."""
        everything = np.arange(len(rows), dtype=np.int64)
        if not self._filters.active:
            return rows, everything
        if not isinstance(rows, Pairs):
            raise DataError(
                f"{rows.name}: the filters read problems and solutions, which this source does "
                "not have apart; turn those of data.filters off"
            )
        votes = rows.votes.tolist() if rows.votes is not None else [(None, None)] * len(rows)
        texts = zip(rows.problems.to_pylist(), rows.solutions.to_pylist(), votes, strict=True)
        made = self._filters.apply([Row(p, s, *map(_number, v)) for p, s, v in texts])
        kept = np.array([isinstance(row, Row) for row in made], np.bool_)
        for index in np.flatnonzero(~kept).tolist():
            drops.add(str(made[index]), 1, _samples(rows, np.array([index])))
        left = [row.solution for row in made if isinstance(row, Row)]
        changed = replace(rows.take(kept), solutions=pa.array(left, pa.large_string()))
        return changed, everything[kept]

    def _read_hashes(self, rows: Rows) -> Hashes:
        """Of the rows before the filters: what NeMo-Skills compares when it reads."""
        filters = self._recipe.filters
        wanted = filters.deduplicate and filters.order == "nemo_skills" and self._filters.active
        if not wanted or not isinstance(rows, Pairs):
            return np.zeros((0, 2), np.uint64)
        return joined(text_hashes(rows.problems), text_hashes(rows.solutions))

    def _examples(self, rows: Any, drops: Drops) -> Examples:
        if self._recipe.as_json:
            return _json_lines(rows, self._prompt)
        if isinstance(rows, Tokens):
            return self._of_tokens(rows, drops)
        unfit: dict[int, str] | None = {} if self._recipe.skip_bad else None
        examples, dropped = self._prompt.encode(rows, unfit, self._recipe.train_on)
        if isinstance(rows, Pairs):
            self._require_prompts_of_evaluation(rows, examples)
        for index, reason in dropped.items():
            drops.add(reason, 1, _samples(rows, np.array([index])))
        for index, said in (unfit or {}).items():
            drops.add(UNFIT, 1, [Sample(rows.where(index), said)])
        return self._that_are_fed(rows, examples)

    def _require_prompts_of_evaluation(self, rows: Pairs, examples: Examples) -> None:
        """`DataError` if some examples do not begin with the ids that evaluation would send."""
        starts, spans = running_sum(examples.lengths), running_sum(examples.span_counts)
        for i in range(0, len(examples), max(1, len(examples) // PROMPTS)):
            row = int(examples.rows[i])
            asked = self._prompt.prompt_ids(rows.problems[row].as_py())
            trained = examples.tokens[starts[i] :][: examples.spans[spans[i], 0]].tolist()
            if trained != asked:
                raise DataError(
                    f"{rows.where(row)}: training has other ids for its prompt than evaluation "
                    f"would send ({trained[:8]} ... and {asked[:8]} ...); this is a defect of "
                    "mcore_sft or of the tokenizer's files: data.gigatoken=false may avoid it"
                )

    def _of_tokens(self, rows: Tokens, drops: Drops) -> Examples:
        """Examples that others have tokenized: all tokens must be of the vocabulary."""
        examples, vocab_size = rows.examples, self._tokenizer.vocab_size
        if examples.tokens.max(initial=0) >= vocab_size:
            at = int(np.argmax(examples.tokens >= vocab_size))
            raise DataError(
                f"{_where(rows, examples, at)}: token {examples.tokens[at]} is not in the "
                f"vocabulary of {vocab_size}; name the tokenizer that made the tokens"
            )
        idle = examples.span_counts == 0
        drops.add(UNTRAINED, int(idle.sum()), _samples(rows, examples.rows[idle]))
        return self._that_are_fed(rows, examples.keep(~idle))

    def _that_are_fed(self, rows: Rows, examples: Examples) -> Examples:
        unfed = self._recipe.unfed
        if unfed is not None and (found := np.flatnonzero(examples.tokens == unfed)).size:
            raise DataError(
                f"{_where(rows, examples, int(found[0]))}: it holds the token "
                f"{self._tokenizer.decode([unfed])} ({unfed}), which only pads and which the model "
                "does not have; take it out of the row or of prompt.template"
            )
        return examples

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer.encode_batch(texts)]


def _asked(rows: Any, problems: Hashes, examples: Examples) -> Asked:
    if isinstance(rows, Tokens):
        raise DataError(
            f"{rows.name}: tokens cannot be compared with benchmarks; give this source as text, or "
            "leave data.contamination.against empty"
        )
    return asked(rows, problems, examples.rows)


def _where(rows: Rows, examples: Examples, at: int) -> str:
    """The row that the token at place `at` of `examples` is from."""
    example = int(np.searchsorted(running_sum(examples.lengths), at, side="right")) - 1
    return rows.where(int(examples.rows[example]))


def _kind(rows: Rows) -> Literal["problems", "conversations", "tokens"]:
    if isinstance(rows, Tokens):
        return "tokens"
    return "conversations" if isinstance(rows, Chats) else "problems"


def _systems(rows: Rows, examples: Examples) -> list[str | None]:
    """The system text of each example, where they are conversations; else nothing."""
    if not isinstance(rows, Chats):
        return []
    return [system_text(rows.messages[row]) for row in examples.rows.tolist()]


def _problem_hashes(rows: Rows) -> Hashes:
    """Hashes of the problems of the rows [N, 2]; of tokens, nothing."""
    if isinstance(rows, Pairs):
        return text_hashes(rows.problems)
    if isinstance(rows, Chats):
        first = [said[0] if said else "" for said in said_by_users(rows)]
        return text_hashes(pa.array(first, pa.large_string()))
    return np.zeros((0, 2), np.uint64)


def _hashes(
    rows: Any, examples: Examples, problems: Hashes
) -> tuple[Hashes, npt.NDArray[np.uint64]]:
    """Hashes of the examples and of their problems."""
    if isinstance(rows, Pairs):
        solutions = text_hashes(rows.solutions)[examples.rows]
        problems = problems[examples.rows]
        return joined(problems, solutions), problems[:, 0]
    tokens = _stretch_hashes(examples.tokens, examples.lengths)
    masks = _stretch_hashes(examples.spans.reshape(-1), 2 * examples.span_counts)
    if isinstance(rows, Tokens):
        return joined(tokens, masks), tokens[:, 0]
    return joined(tokens, masks), problems[examples.rows, 0]


def _stretch_hashes(numbers: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> Hashes:
    """128 bits of each stretch of `numbers`, which lie end to end."""
    ends = running_sum(lengths).tolist()
    data = np.ascontiguousarray(numbers).view(np.uint8).data
    return hashes_of(data[4 * start : 4 * end] for start, end in pairwise(ends))


def _json_lines(rows: Rows, prompt: Prompt) -> Examples:
    """The rows as NeMo-Skills writes them, a line each; its bytes are what stands for tokens."""
    if not isinstance(rows, Pairs):
        raise DataError(f"{rows.name}: only problems and solutions can be written as plain JSON")
    answers = rows.answers.to_pylist() if rows.answers is not None else [None] * len(rows)
    texts = zip(rows.problems.to_pylist(), rows.solutions.to_pylist(), answers, strict=True)
    lines = []
    for problem, solution, answer in texts:
        known = {} if answer is None else {"expected_answer": answer}
        said = {"input": prompt.text(problem), "output": prompt.answer(problem, solution)}
        lines.append((json.dumps({**known, **said}) + "\n").encode())
    return Examples(
        tokens=np.frombuffer(b"".join(lines), np.uint8),
        lengths=np.array([len(line) for line in lines], np.int32),
        spans=np.zeros((0, 2), np.int32),
        span_counts=np.zeros(len(lines), np.int32),
        rows=np.arange(len(lines), dtype=np.int64),
    )


def _samples(rows: Rows, which: npt.NDArray[Any]) -> Iterator[Sample]:
    """The rows at `which` (a mask or indices) as they are shown, one by one."""
    for index in (np.flatnonzero(which) if which.dtype == np.bool_ else which).tolist():
        yield Sample(rows.where(index), excerpt(rows.text(index)))


def excerpt(text: str) -> str:
    """As much of a row's text as is shown."""
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + " ..."


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
