"""What the demo learns from: a seed in, word problems with their working and a tokenizer out.

    Random -> template and numbers -> row (problem, generated_solution, expected_answer, source)

    python tools/demo_data.py --output FOLDER

The working goes digit by digit and the tokenizer keeps every digit apart, so that a small model
sees each step of the arithmetic it is to learn.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mcore_sft import command
from mcore_sft.base.terminal import Parser

TRAIN_ROWS = 20_000
HELD_OUT_ROWS = 500
SEED = 7
VOCAB_SIZE = 381
"""Every word of the problems whole, and odd, so that tensor parallelism of 2 has to pad it."""

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
# Llama 3's pattern, but for single digits where it groups up to three: Qwen's, as it happens.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stones")

Row = dict[str, str]
Numbers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A kind of word problem: its text, which numbers fit in, and how it is solved."""

    name: str
    text: str
    draw: Callable[[random.Random], Numbers]
    solve: Callable[..., tuple[str, int]]


def add(a: int, b: int) -> tuple[str, int]:
    """The working of a + b and the sum, for numbers of two digits."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    working = f"{a % 10}+{b % 10}={ones}, carry {carry}\n{a // 10}+{b // 10}+{carry}={tens}\n"
    return working, a + b


def subtract(a: int, b: int) -> tuple[str, int]:
    """The working of a - b and the difference, for numbers of two digits with a > b."""
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow
    working = (
        f"{ones}-{b % 10}={ones - b % 10}, borrow {borrow}\n"
        f"{a // 10}-{borrow}-{b // 10}={a // 10 - borrow - b // 10}\n"
    )
    return working, a - b


def multiply(a: int, b: int) -> tuple[str, int]:
    """The working of a * b and the product, for `a` of two digits and `b` of one."""
    ones, tens = a % 10 * b, a // 10 * b
    carry = ones // 10
    working = (
        f"{a % 10}*{b}={ones}, carry {carry}\n{a // 10}*{b}={tens}, {tens}+{carry}={tens + carry}\n"
    )
    return working, a * b


def compare(a: int, b: int) -> tuple[str, int]:
    """How many more the second has: the larger minus the smaller."""
    return subtract(b, a)


def _pair(numbers: random.Random) -> Numbers:
    return numbers.randint(10, 99), numbers.randint(10, 99)


def _falling(numbers: random.Random) -> Numbers:
    small, large = sorted(numbers.sample(range(10, 100), 2))
    return large, small


def _rising(numbers: random.Random) -> Numbers:
    return tuple(reversed(_falling(numbers)))


def _factor(numbers: random.Random) -> Numbers:
    return numbers.randint(10, 99), numbers.randint(2, 5)


TEMPLATES = (
    Template(
        name="sum",
        text="{name} has {0} {things} and gets {1} more. How many {things} is that?",
        draw=_pair,
        solve=add,
    ),
    Template(
        name="rest",
        text="{name} has {0} {things} and gives away {1}. How many are left?",
        draw=_falling,
        solve=subtract,
    ),
    Template(
        name="difference",
        text="{name} has {0} {things} and {other} has {1}. How many more has {other}?",
        draw=_rising,
        solve=compare,
    ),
    Template(
        name="product",
        text="{name} has {1} boxes of {0} {things}. How many {things} is that?",
        draw=_factor,
        solve=multiply,
    ),
)


def make_rows(*, train: int, held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: no problem twice, no (template, numbers) on both sides.

    Numbers count as the same in whatever order, so that 23 + 45 does not give away 45 + 23.
    """
    problems = _Problems(random.Random(seed))
    asked = [problems.next(template) for template in islice(cycle(TEMPLATES), held_out)]
    problems.keep_apart()
    learned = [problems.next(template) for template in islice(cycle(TEMPLATES), train)]
    return learned, asked


class _Problems:
    """A source of problems that never gives one twice."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._given: set[str] = set()
        self._numbers: set[tuple[str, Numbers]] = set()
        self._apart: frozenset[tuple[str, Numbers]] = frozenset()

    def keep_apart(self) -> None:
        """From now on, no (template, numbers) that was given before."""
        self._apart = frozenset(self._numbers)

    def next(self, template: Template) -> Row:
        """Another problem of this kind."""
        while True:
            numbers = template.draw(self._chance)
            key = template.name, tuple(sorted(numbers))
            name, other = self._chance.sample(NAMES, 2)
            things = self._chance.choice(THINGS)
            problem = template.text.format(*numbers, name=name, other=other, things=things)
            if problem not in self._given and key not in self._apart:
                break
        self._given.add(problem)
        self._numbers.add(key)
        working, answer = template.solve(*numbers)
        return {
            "problem": problem,
            "generated_solution": f"{working}\\boxed{{{answer}}}",
            "expected_answer": str(answer),
            "problem_source": f"demo_{template.name}",
        }


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write `rows` as JSON lines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def texts_of(rows: Iterable[Row]) -> Iterator[str]:
    """What a tokenizer sees of `rows`: the text of the prompt with its roles, and the solution."""
    for row in rows:
        yield from ("user", row["problem"], "assistant", row["generated_solution"])


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE over `texts` with the special tokens of Llama 3 first and single digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_data(folder: Path) -> tuple[list[Row], list[Row], Tokenizer]:
    """Write text/train.jsonl, text/held_out.jsonl and tokenizer/ into `folder`."""
    (folder / "text").mkdir(parents=True)
    learned, held_out = make_rows(train=TRAIN_ROWS, held_out=HELD_OUT_ROWS, seed=SEED)
    write_rows(learned, folder / "text" / "train.jsonl")
    write_rows(held_out, folder / "text" / "held_out.jsonl")
    tokenizer = train_tokenizer(texts_of(learned), vocab_size=VOCAB_SIZE)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return learned, held_out, tokenizer


def main() -> None:
    """Write the demo's data and tokenizer."""
    made = Parser(description="Write the demo's word problems and tokenizer.")
    made.add_argument(
        "--output", type=command.path, required=True, help="folder; text/ must be new there"
    )
    write_data(made.parse_args().output)


if __name__ == "__main__":
    command.run(main)
