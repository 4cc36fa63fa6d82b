"""Text in, token ids out: Hugging Face fast tokenizers and sentencepiece models.

text -> ids -> text
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mcore_sft.data.chat_template import ChatTemplate
from mcore_sft.data.codec import Codec, HuggingFace, SentencePiece
from mcore_sft.data.errors import DataError

BULK = 64
"""Texts from which on a batch is worth gigatoken and the proof that it is right."""

_SIDECARS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_WELL_KNOWN = {
    "bos": ("<|begin_of_text|>", "<s>"),
    "eos": ("<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
    "pad": ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>"),
}


class Tokenizer:
    """Ids of a text and text of ids; nothing is ever added that the text does not spell."""

    def __init__(self, path: Path, codec: Codec, file: Path, *, gigatoken: bool = True) -> None:
        self.path = path
        self.vocab_size = max(codec.vocab.values()) + 1
        self.special_tokens = tuple(sorted(codec.special, key=lambda name: codec.special[name]))
        self.gigatoken = gigatoken and isinstance(codec, HuggingFace)
        self._codec = codec
        self._file = file
        named = {role: self._named_id(role) for role in _WELL_KNOWN}
        self.bos_id = named["bos"]
        self.eos_id = named["eos"]
        # Which id pads does not matter: padding is known by position, never by value.
        self.pad_id = next(
            (i for i in (named["pad"], named["eos"], named["bos"]) if i is not None), 0
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelt in it become their ids, and nothing is added."""
        return self._codec.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, by gigatoken where a sample of this very batch proves it right."""
        if self.gigatoken and len(texts) >= BULK:
            fast = self._fast
            ids = _by_gigatoken(fast, texts, self._codec) if fast else None
            if ids is not None:
                return ids
            self.gigatoken = False
            print(
                f"{self.path}: gigatoken cannot stand in for this tokenizer "
                "(other ids, or it does not load); using the slower `tokenizers`",
                file=sys.stderr,
            )
        return self._codec.encode_batch(texts)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`, special tokens spelt out or left out."""
        return self._codec.decode(ids, skip_special)

    def token_id(self, token: str) -> int:
        """Id of one token; `DataError` if the vocabulary does not have it."""
        found = self._codec.vocab.get(token)
        if found is None:
            raise DataError(f"{self.path}: the tokenizer has no token {token!r}; give another one")
        return found

    def spells_special(self, text: str) -> str | None:
        """The first special token that `text` spells out, if any."""
        found = self._special_pattern.search(text) if self.special_tokens else None
        return found.group() if found else None

    @property
    def has_chat_template(self) -> bool:
        """Whether a chat template came with the tokenizer."""
        return self._chat_template is not None

    def chat(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> str | None:
        """`messages` in the tokenizer's own chat template; None if it has none."""
        if self._chat_template is None:
            return None
        return self._chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, tokens=self._names
        )

    @property
    def chat_template_source(self) -> str | None:
        """The chat template as it is written, if there is one."""
        return self._chat_template.source if self._chat_template else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids: vocabulary file, named tokens, chat template."""
        digest = hashlib.sha256(self._file.read_bytes())
        named = [self.bos_id, self.eos_id, self.pad_id, self.chat_template_source]
        digest.update(json.dumps(named).encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write files into `folder` from which transformers.AutoTokenizer loads this tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._file, folder / self._codec.file_name)
        for name in _SIDECARS:
            beside = self._file.parent / name
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
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(re.escape(token) for token in longest_first))

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        beside = self._file.parent / "chat_template.jinja"
        if beside.is_file():
            return ChatTemplate(beside.read_text(encoding="utf-8"), where=beside)
        where = self._file.parent / "tokenizer_config.json"
        written = _json(where).get("chat_template")
        if isinstance(written, list):
            written = {entry["name"]: entry["template"] for entry in written}.get("default")
        return ChatTemplate(written, where=where) if written else None

    @cached_property
    def _fast(self) -> Any:
        return _load_gigatoken(self._file)

    def _named_id(self, role: str) -> int | None:
        """Id of the token with this role: as the files name it, or by its well-known name."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _json(self._file.parent / name).get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                return self.token_id(token)
        number = _json(self._file.parent / "generation_config.json").get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            return number
        known = (self._codec.vocab.get(token) for token in _WELL_KNOWN[role])
        return next((found for found in known if found is not None), None)


def load_tokenizer(path: Path, *, gigatoken: bool = True) -> Tokenizer:
    """Load a folder with tokenizer.json or tokenizer.model, or one of these files itself."""
    path = Path(path)
    candidates = [path] if path.is_file() else [path / "tokenizer.json", path / "tokenizer.model"]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise DataError(
            f"{path}: no tokenizer here; expected a folder with tokenizer.json or tokenizer.model, "
            "or one of these files (model.tokenizer=PATH)"
        )
    codec: Codec = SentencePiece(file) if file.suffix == ".model" else HuggingFace(file)
    return Tokenizer(path, codec, file, gigatoken=gigatoken)


def _load_gigatoken(file: Path) -> Any:
    """gigatoken's reading of a tokenizer.json, or None where it does not know this kind."""
    import gigatoken

    try:
        return gigatoken.Tokenizer.from_json(file.read_bytes())
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError):
        return None


def _by_gigatoken(fast: Any, texts: Sequence[str], exact: Codec) -> list[list[int]] | None:
    """Ids of `texts`, or None if they are not those of `exact` on an evenly spread sample."""
    ids: list[list[int]] = fast.encode_batch_list(list(texts))
    sample = range(0, len(texts), max(1, len(texts) // 16))
    proved = exact.encode_batch([texts[i] for i in sample])
    return ids if proved == [ids[i] for i in sample] else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from None
    return read if isinstance(read, dict) else {}
