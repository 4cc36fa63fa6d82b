"""One vocabulary file in, text -> ids -> text out: tokenizer.json, sentencepiece or tiktoken.

tokenizer.json -----------------> Codec, as transformers reads the folder it lies in
sentencepiece .model -----------> Codec, of the tokenizer.json that transformers makes of it
tiktoken ranks + tiktoken.json -> Codec, of the tokenizer.json of the same ids
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mcore_sft.base.model_folder import read_bytes
from mcore_sft.data.errors import DataError
from mcore_sft.data.text import hugging_face

Places = list[tuple[int, int]]
"""Where tokens begin and end in a text, in characters."""


class Codec:
    """A tokenizer.json, run by the `tokenizers` package; nothing is ever added to a text.

    content: the tokenizer.json. file_name, saved: the file that an export has, from which
    transformers makes the same tokenizer. special: the tokens that only markup may spell, by name.
    added: all that stand beside the learned vocabulary, special or not. roles: the tokens that
    transformers knows by a role (bos_token, ...), where it was asked.
    """

    def __init__(
        self,
        content: bytes,
        file: Path,
        *,
        file_name: str = "tokenizer.json",
        saved: bytes = b"",
        roles: Mapping[str, str] | None = None,
    ) -> None:
        import tokenizers

        self.content = content
        self.file_name = file_name
        self.saved = saved or content
        self.roles = roles
        self._file = file
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain Exception for a broken file
            raise DataError(f"{file}: not a tokenizer.json that can be read ({error})") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        # It only adds tokens, which nobody asks for, and takes spaces from where a token stands.
        self._inner.post_processor = None
        self.vocab: Mapping[str, int] = self._inner.get_vocab(with_added_tokens=True)
        added = self.added_tokens = self._inner.get_added_tokens_decoder()
        self.added: Sequence[str] = [token.content for token in added.values()]
        self.added_ids: Mapping[str, int] = {token.content: i for i, token in added.items()}
        self.special: Mapping[str, int] = {
            token.content: number for number, token in added.items() if token.special
        }
        self.isolating: Sequence[int] = sorted(
            i for i, token in added.items() if not token.normalized and not token.single_word
        )
        """Added tokens that cut a text: what stands on one side changes no id on the other."""
        self._stripping = {i: t.content for i, t in added.items() if t.lstrip or t.rstrip}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelt in it become their ids."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, exactly as `encode` gives them."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def locate(self, text: str) -> tuple[list[int], Places]:
        """Ids of `text`, and where in it each token stands.

        White space that an added token swallows is no part of it.
        """
        encoded = self._inner.encode(text, add_special_tokens=False)
        places: Places = encoded.offsets
        if self._stripping:
            for k, number in enumerate(encoded.ids):
                if number in self._stripping:
                    begin, end = places[k]
                    at = text.find(self._stripping[number], begin, end)
                    if at >= 0:
                        places[k] = at, at + len(self._stripping[number])
        return encoded.ids, places

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of `ids`, as engines show it."""
        return str(self._inner.decode(list(ids), skip_special_tokens=skip_special))

    def spell(self, ids: Sequence[int]) -> str:
        """Text of `ids` to the letter, with each space that a token begins with."""
        if self.spellings is None:
            return self.decode(ids, skip_special=False)
        return b"".join(map(self.spellings.__getitem__, ids)).decode("utf-8", "replace")

    def text_of(self, ids: Sequence[int], *, continued: bool) -> str:
        """The text that has these `ids`: what they spell, but for spaces that are always put in.

        `continued`: it goes on where another ends.
        """
        if self.spellings is None or not self._prepends:
            return self.spell(ids)
        cuts = [i for i, number in enumerate(ids) if number in self._cutting]
        texts, done = [], 0
        for cut in (*cuts, len(ids)):
            text = self.spell(ids[done:cut])
            texts.append(text if continued and not done else text.removeprefix(" "))
            texts.append(self.spell(ids[cut : cut + 1]))
            done = cut + 1
        return "".join(texts)

    @cached_property
    def _prepends(self) -> bool:
        """Whether a space is put before each stretch of text, even before a space."""
        return "Prepend" in _types(self._step("normalizer"))

    @cached_property
    def _cutting(self) -> frozenset[int]:
        return frozenset(self.isolating)

    @cached_property
    def caveat(self) -> str | None:
        """What is to be known of a sentencepiece model of which transformers makes something else.

        Its ids are those that engines work with, but not those that the model has seen.
        """
        if self.file_name != "tokenizer.model":
            return None
        import sentencepiece

        own = sentencepiece.SentencePieceProcessor(model_proto=self.saved)
        for text in _PROBES:
            if (ids := self.encode(text)) != (expected := own.encode(text)):
                return (
                    f"transformers, and so every engine that runs it, has other ids for {text!r} "
                    f"than the sentencepiece model itself ({ids}, and {expected}). They are used; "
                    "if the model has a tokenizer.json of its own, give that"
                )
        return None

    @cached_property
    def changes_text(self) -> bool:
        """Whether a token may stand for other letters than those of the text."""
        return self._is_sentencepiece or self._inner.normalizer is not None

    @cached_property
    def spellings(self) -> Sequence[bytes] | None:
        """The bytes that each token stands for, by its id; None where a token does not tell."""
        byte_level = "ByteLevel" in _types(self._step("decoder"))
        if not byte_level and not self._is_sentencepiece:
            return None
        spelt = [b""] * (max(self.vocab.values()) + 1)
        for token, number in self.vocab.items():
            if token in self.added_ids:
                spelt[number] = token.encode()
            elif byte_level:
                if not _LETTERS.keys() >= set(token):
                    return None
                spelt[number] = bytes(map(_LETTERS.__getitem__, token))
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                spelt[number] = bytes([int(token[3:5], 16)])
            else:
                spelt[number] = token.replace(_SPACE, " ").encode()
        return spelt

    @cached_property
    def _is_sentencepiece(self) -> bool:
        """Whether tokens write a space as sentencepiece does."""
        decoder = self._step("decoder")
        parts = decoder.get("decoders", [decoder]) if decoder else []
        return any(
            part["type"] == "Metaspace"
            or (part["type"] == "Replace" and part["pattern"] == {"String": _SPACE})
            for part in parts
        )

    @cached_property
    def continued(self) -> "Codec":
        """The same for a text that goes on where another ends: no space is put before it."""
        changed = {
            name: bare
            for name in ("normalizer", "pre_tokenizer")
            if (bare := _bare(self._step(name))) != self._step(name)
        }
        if not changed:
            return self
        made = json.dumps({**json.loads(self.content), **changed}, ensure_ascii=False)
        return Codec(made.encode(), self._file)

    def _step(self, name: str) -> Any:
        """A step of the tokenizer.json."""
        step = getattr(self._inner, name)
        return json.loads(step.__getstate__()) if step is not None else None


def read_codec(file: Path) -> Codec:
    """The codec of a tokenizer.json, a sentencepiece .model or tiktoken's ranks.

    The files beside it are read as transformers reads them. Raises `UserError` if the file cannot
    be read, or is none of them.
    """
    content = read_bytes(file)
    if _is_tiktoken(content):
        return Codec(_tokenizer_json(file, content), file)
    name = "tokenizer.json"
    if file.suffix == ".model":
        name = "tokenizer.model"
    else:
        codec = Codec(content, file)
        if hugging_face.reads_as_it_is(file.parent, codec.added_tokens):
            hugging_face.require_numbers(file.parent, codec.vocab)
            return codec
    loaded = hugging_face.load(content, name, file.parent)
    made = str(loaded.backend_tokenizer.to_str()).encode()
    named = loaded.special_tokens_map.items()
    roles = {role: token for role, token in named if isinstance(token, str)}
    codec = Codec(made, file, file_name=name, saved=content, roles=roles)
    hugging_face.require_numbers(file.parent, codec.vocab)
    return codec


def _types(part: Any) -> set[str]:
    """The types of a step of a tokenizer.json and of all in it."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    own = {part["type"]} if isinstance(part.get("type"), str) else set()
    return own.union(*map(_types, part.values()))


def _bare(step: Any) -> Any:
    """A step of a tokenizer.json that puts no space before a text; None where nothing is left."""
    kind = step["type"] if step else None
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        kept = {name: value for name, value in step.items() if name != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}
    if kind == "ByteLevel" and "add_prefix_space" in step:
        return {**step, "add_prefix_space": False}
    if kind == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, name: [bare for one in step[name] if (bare := _bare(one)) is not None]}
    return step


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
_LETTERS = {letter: byte for byte, letter in _BYTES.items()}
_SPACE = "\u2581"
_PROBES = ("The sum of two numbers is 12.", "so  a  b is   the answer", "one\n\n two\t3")
