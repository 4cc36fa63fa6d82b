"""A tokenizer's files in, what transformers makes of them out: the ids that engines work with.

Most classes of transformers read a tokenizer.json as it is; some keep its vocabulary alone, and all
add the tokens that the files beside it name.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mcore_sft.base.model_folder import is_file, read_bytes, read_json
from mcore_sft.data.errors import DataError

CONFIG = "tokenizer_config.json"
ROLES = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
"""What transformers reads beside a vocabulary: files, and a folder of named templates."""

# Of other classes and model types it may build the tokenizer anew.
_READ_AS_IT_IS = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_PLAIN_MODELS = (None, "llama")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is none."""
    read = read_json(file) if is_file(file) else {}
    return read if isinstance(read, dict) else {}


def named_tokens(folder: Path) -> dict[str, str]:
    """The tokens that the files of a folder name by their role: bos_token, ..."""
    told = read_object(folder / CONFIG)
    if "added_tokens_decoder" not in told:  # else it says all, and the older file is not read
        told |= read_object(folder / ROLES)
    own = told.get("extra_special_tokens")  # a model's own roles
    named = {role: token for role, token in told.items() if role.endswith("_token")}
    return {
        role: content
        for role, token in {**named, **(own if isinstance(own, Mapping) else {})}.items()
        if (content := _content(token)) is not None
    }


def chat_templates(folder: Path) -> dict[str, tuple[str, Path]]:
    """The text and the file of each chat template, by name: `default`, `tool_use`, ...

    Where templates have files of their own, those in the configuration are not read.
    """
    files = {"default": folder / TEMPLATE} if is_file(folder / TEMPLATE) else {}
    files |= {file.stem: file for file in _named_templates(folder)}
    if files:
        return {name: (_text(file), file) for name, file in files.items()}
    where = folder / CONFIG
    written = read_object(where).get("chat_template") or []
    if isinstance(written, str):
        return {"default": (written, where)}
    try:
        return {entry["name"]: (str(entry["template"]), where) for entry in written}
    except (KeyError, TypeError):
        raise DataError(
            f"{where}: chat_template is {written!r:.60}, expected text, or a list of name and "
            "template. Fix: copy the file again"
        ) from None


def require_numbers(folder: Path, vocab: Mapping[str, int]) -> None:
    """`DataError` if a file of a folder gives a token another id than its vocabulary."""
    decoder = read_object(folder / CONFIG).get("added_tokens_decoder")
    where = folder / (ADDED if decoder is None else CONFIG)
    try:
        if decoder is None:
            told = {token: int(number) for token, number in read_object(where).items()}
        else:
            told = {token["content"]: int(number) for number, token in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(
            f"{where}: expected tokens and their ids. Fix: copy the file again"
        ) from None
    for token, number in told.items():
        if vocab.get(token) != number:
            raise DataError(
                f"{where}: the token {token!r} has the id {number} (expected {vocab.get(token)}, "
                "as transformers gives it). Fix: take all files of a tokenizer from one folder"
            )


def reads_as_it_is(folder: Path, added: Mapping[int, Any]) -> bool:
    """Whether transformers takes the tokenizer.json of a folder for all there is to know.

    added: its added tokens.
    """
    told, model = read_object(folder / CONFIG), read_object(folder / "config.json")
    if (
        told.get("tokenizer_class", model.get("tokenizer_class")) not in _READ_AS_IT_IS
        or model.get("model_type") not in _PLAIN_MODELS
    ):
        return False
    for number, token in (told.get("added_tokens_decoder") or {}).items():
        own = added.get(int(number))
        if own is None or any(getattr(own, key) != value for key, value in token.items()):
            return False
    named = read_object(folder / ADDED).keys() | set(_named(told))
    named |= set(_named(read_object(folder / ROLES)))
    return named <= {token.content for token in added.values()}


def load(
    vocabulary: bytes, name: str, beside: Path, *, as_it_is: bool = False, **roles: str
) -> Any:
    """The tokenizer that transformers loads from a file `name` in the folder `beside`.

    The folder's other vocabularies, of which it would choose one, are not looked at. as_it_is:
    whether it is known to read the file so; `roles` as in `copy`. `DataError` if it loads none, or
    one that the `tokenizers` package does not run.
    """
    with TemporaryDirectory() as folder:
        copy(vocabulary, beside, Path(folder) / name, **roles)
        if is_file(beside / "config.json"):
            shutil.copyfile(beside / "config.json", Path(folder) / "config.json")
        loaded = _load(Path(folder), beside / name, as_it_is=as_it_is)
    if not hasattr(loaded, "backend_tokenizer"):
        raise DataError(
            f"{beside / name}: transformers reads it with {type(loaded).__name__}, which the "
            "tokenizers package does not run. Fix: name another tokenizer"
        )
    return loaded


def copy(vocabulary: bytes, beside: Path, to: Path, **roles: str) -> None:
    """Write the file `to` and, beside it, the files that stand in the folder `beside`.

    Where these do not name a class, the tokens of `roles` are told to one that reads the vocabulary
    as it is.
    """
    to.write_bytes(vocabulary)
    sidecars = [beside / name for name in (CONFIG, ROLES, ADDED, TEMPLATE)]
    for file in (*filter(is_file, sidecars), *_named_templates(beside)):
        target = to.parent / file.relative_to(beside)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    described = to.parent / CONFIG
    if not described.exists():
        told = {"tokenizer_class": "TokenizersBackend", "legacy": False, **roles}
        described.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _load(folder: Path, file: Path, *, as_it_is: bool) -> Any:
    import transformers

    # What finds the class imports torch, which takes seconds.
    kind = transformers.PreTrainedTokenizerFast if as_it_is else transformers.AutoTokenizer

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the class that a file names may raise
        said = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{file}: transformers cannot load it ({type(error).__name__}: {said:.300}). "
            "Fix: mend tokenizer_class in tokenizer_config.json, or name another tokenizer"
        ) from None
    finally:
        transformers.logging.set_verbosity(verbosity)


def _named(told: Mapping[str, Any]) -> Iterator[str]:
    """The tokens that a tokenizer_config.json or a special_tokens_map.json names."""
    for key, value in told.items():
        values: Any = [value] if key.endswith("_token") else []
        if key in ("additional_special_tokens", "extra_special_tokens"):
            values = value.values() if isinstance(value, Mapping) else value or []
        for token in values:
            if (content := _content(token)) is not None:
                yield content


def _named_templates(folder: Path) -> list[Path]:
    return sorted((folder / TEMPLATES).glob("*.jinja"))


def _text(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error}). Fix: copy the file again") from None


def _content(token: Any) -> str | None:
    """How a token is spelt that a file names, by itself or with its flags."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None
