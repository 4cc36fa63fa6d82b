"""Text in, token ids out: Hugging Face fast tokenizers, sentencepiece models, tiktoken's ranks.

text -> ids -> text        column of texts -> ids end to end
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mcore_sft.base.model_folder import is_file, read_json, require_fetched
from mcore_sft.base.terminal import say
from mcore_sft.data.chat_template import ChatTemplate
from mcore_sft.data.codec import Codec, HuggingFace, read_codec
from mcore_sft.data.errors import DataError
from mcore_sft.data.rows import text_offsets

BULK = 64
"""Texts from which on a batch is worth gigatoken and the proof that it is right."""

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]

_SIDECARS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")
_WELL_KNOWN = {
    "bos": ("<|begin_of_text|>", "<s>"),
    "eos": ("<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
    "pad": ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>"),
}


class Tokenizer:
    """Ids of a text and text of ids; nothing is ever added that the text does not spell."""

    def __init__(self, path: Path, codec: Codec, folder: Path, *, gigatoken: bool = True) -> None:
        self.path = path
        self.vocab_size = max(codec.vocab.values()) + 1
        self.special_tokens = tuple(sorted(codec.special, key=lambda name: codec.special[name]))
        self.gigatoken = gigatoken and isinstance(codec, HuggingFace)
        self._codec = codec
        self._folder = folder
        self.special_ids = tuple(sorted(codec.special.values()))
        named = {role: self._named_id(role) for role in _WELL_KNOWN}
        self.bos_id = named["bos"]
        self.eos_id = named["eos"]
        self.named_pad_id = named["pad"]
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

    def encode_column(self, texts: pa.LargeStringArray) -> tuple[Ids, Offsets]:
        """Ids of N `texts` end to end, and where each begins, [N + 1]; as `encode` gives them.

        By gigatoken, where a sample of these very texts proves it right.
        """
        if self.gigatoken and len(texts) >= BULK:
            made = self._by_gigatoken(texts)
            if made is not None:
                return made
            self.gigatoken = False
            say(
                f"{self.path}: gigatoken cannot stand in for this tokenizer "
                "(other ids, or it does not load); using the slower `tokenizers`",
                error=True,
            )
        ids = self._codec.encode_batch(texts.to_pylist())
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(some) for some in ids], out=offsets[1:])
        return np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets

    def _by_gigatoken(self, texts: pa.LargeStringArray) -> tuple[Ids, Offsets] | None:
        """Ids of `texts`, or None if they are not those of the codec on an evenly spread sample."""
        if self._fast is None:
            return None
        made = self._fast.encode_batch(_flat(texts), parallel=False).layout
        ids, offsets = made.content.data.view(np.int32), made.offsets.data
        # An odd step: prompts and answers stand in turn.
        step = max(len(texts) // max(16, len(texts) // 500) - 1, 0) | 1
        sample = range(0, len(texts), step)
        proved = self._codec.encode_batch(texts.take(pa.array(sample)).to_pylist())
        found = (ids[offsets[i] : offsets[i + 1]].tolist() for i in sample)
        return (ids, offsets) if proved == list(found) else None

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`, special tokens spelt out or left out."""
        return self._codec.decode(ids, skip_special)

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
        return next((self.decode([i]) for i in self.encode(text) if i in self.special_ids), None)

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template came with the tokenizer."""
        return self.chat_template is not None

    @property
    def chat_template_source(self) -> str | None:
        """The chat template as it is written, if there is one."""
        return self.chat_template.source if self.chat_template else None

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template that came with the tokenizer."""
        beside = self._folder / "chat_template.jinja"
        if beside.is_file():
            require_fetched(beside)  # else a pointer would be what is trained
            source = beside.read_text(encoding="utf-8")
            return ChatTemplate(source, where=beside, tokens=self._names)
        where = self._folder / "tokenizer_config.json"
        written = _json(where).get("chat_template")
        if isinstance(written, list):
            written = {entry["name"]: entry["template"] for entry in written}.get("default")
        return ChatTemplate(written, where=where, tokens=self._names) if written else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids: vocabulary file, named tokens, chat template."""
        digest = hashlib.sha256(self._codec.content)
        named = [self.bos_id, self.eos_id, self.pad_id, self.chat_template_source]
        digest.update(json.dumps(named).encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write files into `folder` from which transformers.AutoTokenizer loads this tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self._codec.file_name).write_bytes(self._codec.content)
        for name in _SIDECARS:
            beside = self._folder / name
            if beside.is_file():
                shutil.copyfile(beside, folder / name)
        described = folder / "tokenizer_config.json"
        if not described.exists():
            known = {f"{role}_token": name for role, name in self._names.items()}
            config = {"tokenizer_class": self._codec.hf_class, **known}
            described.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def _names(self) -> dict[str, str]:
        """How the tokens with a role are spelt: bos, eos, pad."""
        spelt = {number: name for name, number in self._codec.vocab.items()}
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        return {role: spelt[i] for role, i in ids.items() if i is not None and i in spelt}

    @cached_property
    def _fast(self) -> Any:
        return _load_gigatoken(self._codec) if isinstance(self._codec, HuggingFace) else None

    def _named_id(self, role: str) -> int | None:
        """Id of the token with this role: as the files name it, or by its well-known name."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _json(self._folder / name).get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                return self.token_id(token)
        number = _json(self._folder / "generation_config.json").get(f"{role}_token_id")
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


def _load_gigatoken(codec: HuggingFace) -> Any:
    """gigatoken's reading of a tokenizer.json; None where it does not know this kind.

    None too where it has other ids for an added token in a text, which a sample of texts may not
    show.
    """
    import gigatoken

    try:
        fast = gigatoken.Tokenizer.from_json(codec.content)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError):
        return None
    texts = [text for token in codec.added for text in (f"a{token}b", f"1 {token} \n{token}")]
    same = not texts or fast.encode_batch_list(texts, parallel=False) == codec.encode_batch(texts)
    return fast if same else None


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


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    read = read_json(file)
    return read if isinstance(read, dict) else {}
