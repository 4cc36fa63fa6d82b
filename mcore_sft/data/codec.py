"""One vocabulary file in, text -> ids -> text out: tokenizer.json or a sentencepiece .model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mcore_sft.data.errors import DataError


class Codec(Protocol):
    """What both kinds of tokenizer file can do."""

    file_name: str
    hf_class: str
    vocab: Mapping[str, int]
    special: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelt in it become their ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, exactly as `encode` gives them."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of `ids`."""


class HuggingFace:
    """A tokenizer.json, read by the `tokenizers` package."""

    file_name = "tokenizer.json"
    hf_class = "PreTrainedTokenizerFast"

    def __init__(self, file: Path) -> None:
        import tokenizers

        try:
            self._inner = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises plain Exception for a broken file
            raise DataError(f"{file}: not a tokenizer.json that can be read ({error})") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self.vocab: Mapping[str, int] = self._inner.get_vocab(with_added_tokens=True)
        added = self._inner.get_added_tokens_decoder()
        self.special: Mapping[str, int] = {
            token.content: number for number, token in added.items() if token.special
        }

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of `ids`."""
        return str(self._inner.decode(list(ids), skip_special_tokens=skip_special))


class SentencePiece:
    """A sentencepiece .model; its control pieces are the special tokens."""

    file_name = "tokenizer.model"
    hf_class = "LlamaTokenizer"

    def __init__(self, file: Path) -> None:
        import sentencepiece

        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{file}: not a sentencepiece model ({error})") from None
        pieces = range(self._inner.get_piece_size())
        self.vocab: Mapping[str, int] = {self._inner.id_to_piece(i): i for i in pieces}
        self.special: Mapping[str, int] = {
            self._inner.id_to_piece(i): i for i in pieces if self._inner.is_control(i)
        }
        self._special_ids = {number: name for name, number in self.special.items()}
        longest_first = sorted(self.special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(re.escape(token) for token in longest_first)})")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, cut at the control pieces that it spells."""
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids.extend(self._inner.encode(part))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of `ids`; sentencepiece itself would leave control pieces out."""
        parts: list[str] = []
        plain: list[int] = []
        for number in [*ids, None]:
            if number is not None and number not in self._special_ids:
                plain.append(int(number))
                continue
            if plain:
                parts.append(self._inner.decode(plain))
                plain = []
            if number is not None and not skip_special:
                parts.append(self._special_ids[number])
        return "".join(parts)
