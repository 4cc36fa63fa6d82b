"""JSON lines of text in, a tokenizer of their words with the special tokens of Llama 3 out.

python tools/make_tokenizer.py --output DIR --vocab-size 4096 FILE.jsonl FILE.jsonl
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from demo_data import train_tokenizer

from mcore_sft import command
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Parser, say


class TextError(UserError):
    """There is nothing to make a tokenizer of."""


def texts_in(paths: Iterable[Path]) -> Iterator[str]:
    """Every string of every row; raises `TextError`."""
    for path in paths:
        try:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    yield from (x for x in json.loads(line).values() if isinstance(x, str))
        except (OSError, ValueError, AttributeError) as error:
            raise TextError(f"{path}: expected JSON lines of objects ({error})") from None


def main() -> None:
    """Make the tokenizer that the command line describes."""
    made = Parser(description="Make a tokenizer of the text in JSON lines.")
    made.add_argument("--output", type=command.path, required=True, help="folder to write")
    made.add_argument("--vocab-size", type=int, required=True)
    made.add_argument(
        "text", type=command.path, nargs="+", help="JSON lines; all their strings are read"
    )
    given = made.parse_args()
    tokenizer = train_tokenizer(texts_in(given.text), vocab_size=given.vocab_size)
    given.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(given.output / "tokenizer.json"))
    say(f"{given.output}: a tokenizer of {tokenizer.get_vocab_size():,} tokens")


if __name__ == "__main__":
    command.run(main)
