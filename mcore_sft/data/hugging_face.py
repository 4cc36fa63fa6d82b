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

from mcore_sft.base.model_folder import is_file, read_json
from mcore_sft.data.errors import DataError

SIDECARS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
"""Files beside a vocabulary that transformers reads."""

# Of other classes and model types it may build the tokenizer anew.
_READ_AS_IT_IS = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_PLAIN_MODELS = (None, "llama")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is none."""
    read = read_json(file) if is_file(file) else {}
    return read if isinstance(read, dict) else {}


def named_tokens(folder: Path) -> dict[str, str]:
    """The tokens that the files of a folder name by their role: bos_token, ..."""
    files = ("special_tokens_map.json", "tokenizer_config.json")  # the last has the last word
    return {
        role: content
        for file in files
        for role, token in read_object(folder / file).items()
        if role.endswith("_token") and (content := _content(token)) is not None
    }


def reads_as_it_is(folder: Path, added: Mapping[int, Any]) -> bool:
    """Whether transformers takes the tokenizer.json of a folder for all there is to know.

    added: its added tokens.
    """
    told, model = read_object(folder / "tokenizer_config.json"), read_object(folder / "config.json")
    if (
        told.get("tokenizer_class", model.get("tokenizer_class")) not in _READ_AS_IT_IS
        or model.get("model_type") not in _PLAIN_MODELS
    ):
        return False
    for number, token in (told.get("added_tokens_decoder") or {}).items():
        own = added.get(int(number))
        if own is None or any(getattr(own, key) != value for key, value in token.items()):
            return False
    named = read_object(folder / "added_tokens.json").keys() | set(_named(told))
    named |= set(_named(read_object(folder / "special_tokens_map.json")))
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
    for name in SIDECARS:
        if is_file(beside / name):
            shutil.copyfile(beside / name, to.parent / name)
    described = to.parent / "tokenizer_config.json"
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


def _content(token: Any) -> str | None:
    """How a token is spelt that a file names, by itself or with its flags."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None
