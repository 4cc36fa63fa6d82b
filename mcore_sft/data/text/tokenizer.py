"""Text in, token ids out: Hugging Face fast tokenizers, sentencepiece models, tiktoken's ranks.

text -> ids -> text        column of texts -> ids end to end, and where in it each token stands
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.base.model_folder import is_file
from mcore_sft.base.terminal import say
from mcore_sft.data.errors import DataError
from mcore_sft.data.indexed import running_sum
from mcore_sft.data.rows import text_offsets
from mcore_sft.data.text import hugging_face
from mcore_sft.data.text.chat_template import ChatTemplate
from mcore_sft.data.text.codec import Codec, read_codec

BULK = 64
"""Texts from which on a batch is worth gigatoken and the proof that it is right."""

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")
_WELL_KNOWN = {
    "bos": ("<|begin_of_text|>", "<s>"),
    "eos": ("<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
    "pad": ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Located:
    """Tokens of a column of N texts, which lie end to end as bytes. T = tokens of all.

    data: the bytes; ids [T]; offsets [N + 1]: where each text begins in them; starts [N + 1]: where
    each begins in the bytes; begins, ends [T]: the bytes that each token stands for, perhaps none.
    """

    data: memoryview
    ids: Ids
    offsets: Offsets
    starts: Offsets
    begins: Offsets
    ends: Offsets

    def cut(self, places: Offsets) -> tuple[Offsets, npt.NDArray[np.bool_]]:
        """The first token at or behind each of P `places` in the bytes; whether one spans it."""
        cuts = np.searchsorted(self.begins, places, side="left")
        before = np.maximum(cuts - 1, 0)
        spanned = (cuts > 0) & (self.ends[before] > places) if len(self.ids) else cuts > 0
        return cuts, spanned

    def of(self, text: int) -> Ids:
        """The tokens of one text."""
        return self.ids[self.offsets[text] : self.offsets[text + 1]]

    def places(self, number: int, text: str, characters: Sequence[int]) -> Offsets:
        """Where `characters` of text `number`, which is `text`, lie in the bytes of all."""
        places: Offsets = self.starts[number] + byte_places(text, np.array(characters, np.int64))
        return places

    def joined(self) -> "Located":
        """Every two texts as one."""
        return replace(self, offsets=self.offsets[::2], starts=self.starts[::2])


class Tokenizer:
    """Ids of a text and text of ids; nothing is ever added that the text does not spell."""

    def __init__(self, path: Path, codec: Codec, folder: Path, *, gigatoken: bool = True) -> None:
        self.path = path
        self.vocab_size = max(codec.vocab.values()) + 1
        self.gigatoken = gigatoken
        self._codec = codec
        self._folder = folder
        self._fast: dict[Codec, Any] = {}
        named = {role: self._named_id(role) for role in _WELL_KNOWN}
        self.bos_id = named["bos"]
        self.eos_id = named["eos"]
        self.named_pad_id = named["pad"]
        # A token of the markup may be named by its role alone.
        added = {number: name for name, number in codec.added_ids.items()}
        special = {**codec.special, **{added[i]: i for i in named.values() if i in added}}
        self.special_tokens = tuple(sorted(special, key=lambda name: special[name]))
        self.special_ids = tuple(sorted(special.values()))
        # Which id pads does not matter: padding is known by position, never by value.
        self.pad_id = next(
            (i for i in (named["pad"], named["eos"], named["bos"]) if i is not None), 0
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelt in it become their ids, and nothing is added."""
        return self._codec.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them."""
        if len(texts) < BULK:
            return self._codec.encode_batch(texts)
        ids, offsets = self.encode_column(pa.array(texts, pa.large_string()))
        return [some.tolist() for some in np.split(ids, offsets[1:-1])]

    def encode_column(
        self, texts: pa.LargeStringArray, *, continued: bool = False
    ) -> tuple[Ids, Offsets]:
        """Ids of N `texts` end to end, and where each begins, [N + 1]; as `encode` gives them.

        `continued`: each goes on where another text ends, so that no space is put before it.
        By gigatoken, where a sample of these very texts proves it right.
        """
        codec = self._codec.continued if continued else self._codec
        if self.gigatoken and len(texts) >= BULK:
            try:
                return self._by_gigatoken(codec, texts)
            except _Unlike as unlike:
                self._leave_gigatoken(unlike)
        ids = codec.encode_batch(texts.to_pylist())
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(some) for some in ids], out=offsets[1:])
        return np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets

    def encode_turns(self, texts: pa.LargeStringArray) -> tuple[Ids, Offsets]:
        """As `encode_column`, of texts of which every second goes on where the one before ends."""
        if self._codec.continued is self._codec:
            return self.encode_column(texts)
        halves = [
            self.encode_column(texts.take(pa.array(range(k, len(texts), 2))), continued=bool(k))
            for k in (0, 1)
        ]
        lengths = np.zeros(len(texts), np.int64)
        for k, (_, offsets) in enumerate(halves):
            lengths[k::2] = np.diff(offsets)
        whole = running_sum(lengths)
        ids = np.empty(whole[-1], np.int32)
        for k, (half, offsets) in enumerate(halves):
            starts = np.repeat(whole[k:-1:2] - offsets[:-1], lengths[k::2])
            ids[starts + np.arange(len(half))] = half
        return ids, whole

    def locate_column(self, texts: pa.LargeStringArray, *, turns: bool = False) -> Located:
        """Tokens of N `texts`, and where in them each stands; `turns` as in `encode_turns`.

        Where the tokens spell a text, letter by letter, that is known from their lengths.
        """
        ids, offsets = (self.encode_turns if turns else self.encode_column)(texts)
        starts = text_offsets(texts)
        data = memoryview((texts.buffers()[2] if len(texts) else None) or b"")
        sums = running_sum(self._lengths[ids]) + starts[0]
        spelt, lead = self._spelt(data, ids, offsets, starts, np.diff(sums[offsets]))
        begins, ends = sums[:-1], sums[1:]
        if not spelt.all() or lead.any():
            shift = np.repeat(starts[:-1] - sums[offsets[:-1]] - lead, np.diff(offsets))
            begins, ends = begins + shift, ends + shift
            begins[offsets[:-1][lead > 0]] += 1
        for i in np.flatnonzero(~spelt).tolist():
            text = texts[i].as_py()
            codec = self._codec.continued if turns and i % 2 else self._codec
            found, places = codec.locate(text)
            this = slice(offsets[i], offsets[i + 1])
            if found != ids[this].tolist():
                self._leave_gigatoken(_Unlike(f"other ids for {text[:60]!r}"))
                return self.locate_column(texts, turns=turns)
            where = starts[i] + byte_places(text, np.array(places, np.int64).reshape(-1, 2))
            begins[this], ends[this] = where[:, 0], where[:, 1]
        return Located(data=data, ids=ids, offsets=offsets, starts=starts, begins=begins, ends=ends)

    def _spelt(
        self, data: memoryview, ids: Ids, offsets: Offsets, starts: Offsets, sums: Offsets
    ) -> tuple[npt.NDArray[np.bool_], Offsets]:
        """Which of N texts are what their tokens spell [N], and the spaces put before them [N].

        sums [N]: bytes that the tokens of each stand for.
        """
        extra = sums - np.diff(starts)
        none = np.zeros(len(extra), np.int64)
        spellings = self._codec.spellings
        if spellings is None:
            return none > 0, none
        if not self._codec.changes_text:
            return extra == 0, none
        lead = (extra == 1).astype(np.int64)
        spelt = (extra == 0) | (extra == 1)
        for i in np.flatnonzero(spelt).tolist():
            made = b"".join(map(spellings.__getitem__, ids[offsets[i] : offsets[i + 1]].tolist()))
            spelt[i] = made == b" " * lead[i] + data[starts[i] : starts[i + 1]]
        return spelt, lead

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int32]:
        """Bytes that each token stands for, by its id."""
        spellings = self._codec.spellings
        if spellings is None:
            return np.zeros(self.vocab_size, np.int32)
        return np.array([len(spelling) for spelling in spellings], np.int32)

    def _by_gigatoken(self, codec: Codec, texts: pa.LargeStringArray) -> tuple[Ids, Offsets]:
        """Ids of `texts`; `_Unlike` if they are not those of the codec on an even sample."""
        if codec not in self._fast:
            self._fast[codec] = _load_gigatoken(codec)
        made = self._fast[codec].encode_batch(_flat(texts), parallel=False).layout
        ids, offsets = made.content.data.view(np.int32), made.offsets.data
        sample = sampled(len(texts), least=16)
        proved = codec.encode_batch(texts.take(pa.array(sample)).to_pylist())
        for i, ours in zip(sample, proved, strict=True):
            if ids[offsets[i] : offsets[i + 1]].tolist() != ours:
                raise _Unlike(f"other ids for {texts[i].as_py()[:60]!r}")
        return ids, offsets

    def _leave_gigatoken(self, unlike: "_Unlike") -> None:
        self.gigatoken = False
        say(
            f"{self.path}: gigatoken cannot stand in for this tokenizer ({unlike}); using the "
            "slower `tokenizers`",
            error=True,
        )

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids` as an engine shows it, special tokens spelt out or left out."""
        return self._codec.decode(ids, skip_special)

    def spell(self, ids: Sequence[int]) -> str:
        """Text of `ids` to the letter: what each token stands for, end to end."""
        return self._codec.spell(ids)

    def text_of(self, ids: Sequence[int], *, continued: bool = False) -> str:
        """The text that has these `ids`; `continued` as in `encode_column`."""
        return self._codec.text_of(ids, continued=continued)

    def encode_slowly(self, texts: Sequence[str], *, continued: bool = False) -> list[list[int]]:
        """Ids of each text, as `encode_column` gives them, by `tokenizers` alone."""
        return (self._codec.continued if continued else self._codec).encode_batch(texts)

    @property
    def caveat(self) -> str | None:
        """What whoever trains with this tokenizer should know, if anything."""
        return self._codec.caveat

    @property
    def isolating_ids(self) -> Sequence[int]:
        """Ids of tokens that cut a text: what stands before one changes no id behind it."""
        return self._codec.isolating

    @cached_property
    def hugging_face(self) -> Any:
        """The tokenizer that transformers loads from an export of this one."""
        codec = self._codec
        return hugging_face.load(
            codec.saved,
            codec.file_name,
            self._folder,
            as_it_is=codec.roles is None,
            **self._roles,
        )

    @property
    def vocab(self) -> Mapping[str, int]:
        """Id of every token, by its name."""
        return self._codec.vocab

    def token_id(self, token: str) -> int:
        """Id of one token; `DataError` if the vocabulary does not have it."""
        found = self._codec.vocab.get(token)
        if found is None:
            raise DataError(f"{self.path}: the tokenizer has no token {token!r}; give another one")
        return found

    def special_in(self, text: str) -> str | None:
        """The first special token that `text` spells, if any."""
        spelt = dict(zip(self.special_ids, self.special_tokens, strict=True))
        return next((spelt[i] for i in self.encode(text) if i in spelt), None)

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template came with the tokenizer."""
        return self.chat_template is not None

    @property
    def chat_template_source(self) -> str | None:
        """The chat template as it is written, if there is one."""
        return self.chat_template.source if self.chat_template else None

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template that came with the tokenizer; of several, the one named `default`."""
        return self.chat_templates.get("default")

    @cached_property
    def chat_templates(self) -> Mapping[str, ChatTemplate]:
        """The chat templates that came with the tokenizer, by name."""
        return {
            name: ChatTemplate(source, where=where, tokens=self._told_tokens)
            for name, (source, where) in hugging_face.chat_templates(self._folder).items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids: vocabulary, named tokens, chat templates."""
        digest = hashlib.sha256(self._codec.saved)
        named: list[Any] = [self.bos_id, self.eos_id, self.pad_id, self.chat_template_source]
        if self._codec.saved != self._codec.content:  # files beside it add tokens
            named.append(sorted(self._codec.added_ids.items()))
        if len(self.chat_templates) > 1:
            named.append({name: one.source for name, one in self.chat_templates.items()})
        digest.update(json.dumps(named).encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write files into `folder` from which transformers.AutoTokenizer loads this tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        to = folder / self._codec.file_name
        hugging_face.copy(self._codec.saved, self._folder, to, **self._roles)

    @cached_property
    def _roles(self) -> dict[str, str]:
        """How the tokens with a role are spelt, for files that do not say: bos_token, ..."""
        spelt = {number: name for name, number in self._codec.vocab.items()}
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        return {f"{role}_token": spelt[i] for role, i in ids.items() if i in spelt}

    @cached_property
    def _told_tokens(self) -> Mapping[str, str]:
        """The tokens that a chat template is given by the name of their role."""
        if self._codec.roles is not None:
            return self._codec.roles
        return hugging_face.named_tokens(self._folder) or self._roles

    def _named_id(self, role: str) -> int | None:
        """Id of the token with this role: as the files name it, or by its well-known name."""
        roles = self._codec.roles
        named = hugging_face.named_tokens(self._folder) if roles is None else roles
        token = named.get(f"{role}_token")
        if token is not None:
            return self.token_id(token)
        told = hugging_face.read_object(self._folder / "generation_config.json")
        number = told.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            return number
        known = (self._codec.vocab.get(token) for token in _WELL_KNOWN[role])
        return next((found for found in known if found is not None), None)


def load_tokenizer(
    path: Path, *, gigatoken: bool = True, option: str = "model.tokenizer=PATH"
) -> Tokenizer:
    """Load a folder with tokenizer.json or tokenizer.model, or one of these files itself.

    `option` is what names another one to whoever runs this.
    A .model is sentencepiece's or, as a .tiktoken, holds the ranks of tiktoken, which need
    tiktoken.json beside them.
    """
    path = Path(path)
    file = tokenizer_file(path)
    if file is None:
        raise DataError(
            f"{path}: no tokenizer here; expected a folder with {', '.join(_FILES[:-1])} or "
            f"{_FILES[-1]}, or one of these files ({option})"
        )
    return Tokenizer(path, read_codec(file), file.parent, gigatoken=gigatoken)


def tokenizer_file(path: Path) -> Path | None:
    """The file that `load_tokenizer` reads the vocabulary from, if there is one."""
    candidates = [path] if is_file(path) else [path / name for name in _FILES]
    return next((candidate for candidate in candidates if is_file(candidate)), None)


def sampled(count: int, *, least: int) -> range:
    """Which of `count` texts or rows are proved: an even sample, 1 in 500 or more, and `least`."""
    # An odd step: prompts and answers stand in turn.
    return range(0, count, max(count // max(least, count // 500) - 1, 0) | 1)


def byte_places(text: str, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where `places` in the characters of a text lie in its bytes as UTF-8."""
    if text.isascii():
        return places
    letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return running_sum(1 + (letters > 0x7F) + (letters > 0x7FF) + (letters > 0xFFFF))[places]


class _Unlike(Exception):
    """Why gigatoken is not used."""


def _load_gigatoken(codec: Codec) -> Any:
    """gigatoken's reading of a tokenizer.json; `_Unlike` where it does not know this kind.

    Also where it has other ids for an added token in a text, which a sample of texts may not show.
    """
    import gigatoken

    try:
        fast = gigatoken.Tokenizer.from_json(codec.content)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise _Unlike(f"it does not load: {str(error).partition(chr(10))[0]}") from None
    texts = [text for token in codec.added for text in (f"a{token}b", f"1 {token} \n{token}")]
    made = fast.encode_batch_list(texts, parallel=False) if texts else []
    for text, ids, own in zip(texts, made, codec.encode_batch(texts), strict=True):
        if ids != own:
            raise _Unlike(f"other ids for {text!r}")
    return fast


def _flat(texts: pa.LargeStringArray) -> Any:
    """`texts` as gigatoken takes them without a copy."""
    import awkward as ak

    data = texts.buffers()[2]
    characters = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
    return ak.Array(
        ak.contents.ListOffsetArray(
            ak.index.Index64(text_offsets(texts)),
            ak.contents.NumpyArray(characters, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
    )
