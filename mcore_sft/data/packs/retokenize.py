"""A packed dataset and its tokenizer in, the examples whose ids are not those of their text out.

The text of an example is what its tokens spell. Of a chat template it is tokenized whole, by what
transformers makes of the folder; of fixed strings, the last answer goes on where the rest ends.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mcore_sft.data.errors import DataError
from mcore_sft.data.packs.dataset import PackedDataset
from mcore_sft.data.text.reference import differ
from mcore_sft.data.text.tokenizer import Tokenizer

_AT_ONCE = 1000


def other_ids(
    folder: Path, split: str, tokenizer: Tokenizer, advance: Callable[[int], object]
) -> Iterator[str]:
    """A sentence for each example of a split whose ids are others; `advance` hears of tokens.

    `DataError` where that cannot be told.
    """
    dataset = PackedDataset(folder, split, verify=False)
    if dataset.counts.get("prompts", {}).get("tokenized_elsewhere"):
        raise DataError(
            f"{folder}: examples of {split} were tokenized elsewhere, by rules of their own, so "
            "that their ids cannot be told. Fix: leave out --tokenizer"
        )
    prompt = dataset.manifest["inputs"]["prompt"]
    whole = prompt["template"] == "chat"
    if prompt.get("mask_reasoning") and not whole:
        raise DataError(
            f"{folder}: its masks leave out reasoning, and so do not tell where an answer of fixed "
            "strings begins, which is tokenized by itself. Fix: leave out --tokenizer"
        )
    for first in range(0, dataset.num_distinct, _AT_ONCE):
        some = range(first, min(first + _AT_ONCE, dataset.num_distinct))
        examples = [dataset.example(index) for index in some]
        cuts = [len(example) if whole else int(example.spans[-1, 0]) for example in examples]
        pieces = [
            (example.tokens[:cut].tolist(), example.tokens[cut:].tolist())
            for example, cut in zip(examples, cuts, strict=True)
        ]
        texts = [tokenizer.text_of(asked) for asked, _ in pieces]
        made = tokenizer.encode_slowly(texts) if not whole else _by_transformers(tokenizer, texts)
        goes_on = [tokenizer.text_of(answer, continued=True) for _, answer in pieces]
        ends = tokenizer.encode_slowly(goes_on, continued=True)
        for index, piece, asked, answer in zip(some, pieces, made, ends, strict=True):
            if said := differ(tokenizer, [*piece[0], *piece[1]], [*asked, *answer]):
                yield f"{folder / split}.bin: example {index}: {said}"
        advance(sum(map(len, examples)))


def _by_transformers(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    made = tokenizer.hugging_face(list(texts), add_special_tokens=False)["input_ids"]
    return [list(ids) for ids in made]
