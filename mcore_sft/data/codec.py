"""One vocabulary file in, text -> ids -> text out: tokenizer.json, sentencepiece or tiktoken.

tokenizer.json -----------------> HuggingFace
tiktoken ranks + tiktoken.json -> HuggingFace, as the tokenizer.json of the same ids
sentencepiece .model -----------> SentencePiece
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mcore_sft.base.model_folder import read_bytes
from mcore_sft.data.errors import DataError


class Codec(Protocol):
    """What all kinds of tokenizer file can do.

    content: what is saved as `file_name` for transformers, and loads here as this codec again.
    special: the tokens that only markup may spell, by name. added: all that stand beside the
    learned vocabulary, special or not.
    """

    file_name: str
    hf_class: str
    content: bytes
    vocab: Mapping[str, int]
    special: Mapping[str, int]
    added: Sequence[str]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelt in it become their ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, exactly as `encode` gives them."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of `ids`."""


def read_codec(file: Path) -> Codec:
    """The codec of a tokenizer.json, a sentencepiece .model or tiktoken's ranks.

    Raises `UserError` if the file cannot be read, or is none of them.
    """
    content = read_bytes(file)
    if _is_tiktoken(content):
        return HuggingFace(_tokenizer_json(file, content), file)
    if file.suffix == ".model":
        return SentencePiece(content, file)
    return HuggingFace(content, file)


class HuggingFace:
    """A tokenizer.json, read by the `tokenizers` package."""

    file_name = "tokenizer.json"
    hf_class = "PreTrainedTokenizerFast"

    def __init__(self, content: bytes, file: Path) -> None:
        import tokenizers

        self.content = content
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain Exception for a broken file
            raise DataError(f"{file}: not a tokenizer.json that can be read ({error})") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self.vocab: Mapping[str, int] = self._inner.get_vocab(with_added_tokens=True)
        added = self._inner.get_added_tokens_decoder()
        self.added: Sequence[str] = [token.content for token in added.values()]
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

    def __init__(self, content: bytes, file: Path) -> None:
        import sentencepiece

        self.content = content
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{file}: not a sentencepiece model ({error})") from None
        pieces = range(self._inner.get_piece_size())
        self.vocab: Mapping[str, int] = {self._inner.id_to_piece(i): i for i in pieces}
        self.special: Mapping[str, int] = {
            self._inner.id_to_piece(i): i for i in pieces if self._inner.is_control(i)
        }
        self.added: Sequence[str] = list(self.special)
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


def _is_tiktoken(content: bytes) -> bool:
    """Whether a file holds tiktoken's ranks: lines of a token in base64 and its rank."""
    first, _, _ = content[:1000].partition(b"\n")
    return re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\r?", first) is not None


def _tokenizer_json(file: Path, content: bytes) -> bytes:
    """The tokenizer.json with the ids of tiktoken's ranks, as transformers and gigatoken read it.

    Ranks name neither the pattern that cuts words nor the special tokens; releases of Llama 3 with
    the same ranks differ in the latter. So tiktoken.json beside them must.
    """
    ranks = _ranks(file, content)
    pattern, special = _tiktoken_json(file.parent / "tiktoken.json", taken=set(ranks.values()))
    spelt = {token: "".join(map(_BYTES.__getitem__, token)) for token in ranks}
    # tiktoken merges any two neighbours that make a token, the lowest rank first.
    merges = [
        (rank, ranks[token[:cut]], ranks[token[cut:]], spelt[token[:cut]], spelt[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {spelt[token]: rank for token, rank in ranks.items()} | special
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    to_bytes["use_regex"] = False
    described: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, **flags, "special": True}
            for token, number in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a token is that token
            "vocab": vocab,
            "merges": [[left, right] for *_, left, right in sorted(merges)],
        },
    }
    return json.dumps(described, ensure_ascii=False).encode()


def _ranks(file: Path, content: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{file}:{number}: {line[:60]!r}, expected a token in base64 and its rank"
            ) from None
    missing = next((i for i in range(256) if bytes([i]) not in ranks), None)
    if missing is not None:
        raise DataError(f"{file}: no rank for the byte {missing}; the file is not whole")
    if len(set(ranks.values())) != len(ranks):
        raise DataError(f"{file}: two tokens have the same rank")
    return ranks


def _tiktoken_json(file: Path, taken: set[int]) -> tuple[str, dict[str, int]]:
    """Pattern and special tokens, which must not have the number of a rank."""
    expected = (
        'expected {"pat_str": "the pattern that cuts words", '
        '"special_tokens": {"<|end_of_text|>": 128001, ...}} in it'
    )
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        pattern, special = read["pat_str"], read["special_tokens"]
        numbers = [int(number) for number in special.values()]
        if not isinstance(pattern, str):
            raise TypeError("pat_str is not text")
    except FileNotFoundError:
        raise DataError(
            f"{file}: not there, but ranks of tiktoken do not say how words are cut nor what the "
            f"special tokens are; {expected}, as the model's authors define them"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: cannot be used ({error!r}); {expected}") from None
    if taken.intersection(numbers) or len(set(numbers)) != len(numbers):
        raise DataError(f"{file}: a special token has the number of another token")
    return pattern, dict(zip(special, numbers, strict=True))


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in a tokenizer.json: itself where it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    letters = {byte: chr(byte) for byte in seen}
    return letters | {byte: chr(256 + index) for index, byte in enumerate(unseen)}


_BYTES = _letters()
