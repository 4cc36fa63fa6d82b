"""manifest.json of a packed dataset: what made it, what is in it, and a checksum of every file."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from mcore_sft.base.files import sha256_of
from mcore_sft.data.errors import DataError

FORMAT = 3
NAME = "manifest.json"
REPORTS = ("report.json", "report.html")

_ASIDE = {"origins", "systems", "long"}
"""What the names of files have behind the split that tell where examples come from, or that hold
those too long for a sequence."""

_AGAIN = "run preprocess again with --overwrite"
_Count = Annotated[int, Field(ge=0)]


class _File(BaseModel):
    bytes: _Count
    sha256: str


class _Prompt(BaseModel):
    fingerprint: str


class _Tokenizer(BaseModel):
    fingerprint: str
    vocab_size: _Count


class _Inputs(BaseModel):
    data: dict[str, Any]
    prompt: _Prompt
    tokenizer: _Tokenizer


class _Split(BaseModel):
    rows: _Count
    examples: _Count
    visits: _Count
    tokens: _Count
    supervised_tokens: _Count
    longest: _Count
    packs: _Count
    packing_efficiency: float
    examples_per_pack: float
    dropped: dict[str, _Count]
    contaminated_problems: _Count


class _Manifest(BaseModel):
    """What must be there; more may be."""

    fingerprint: str
    sequence_length: _Count
    inputs: _Inputs
    splits: Annotated[dict[str, _Split], Field(min_length=1)]
    files: dict[str, _File]
    digest: str


def digest_of(tree: Any) -> str:
    """SHA-256 of a JSON tree, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def fingerprint_of(files: Mapping[str, Any]) -> str:
    """SHA-256 that stands for a dataset, of what `describe_files` says of its files.

    Reports are left out, and where examples come from: neither changes what is trained on.
    """
    return digest_of({name: told for name, told in files.items() if _is_trained(name)})


def split_fingerprint(manifest: Mapping[str, Any], split: str) -> str:
    """SHA-256 that stands for one split of a dataset, whatever other splits it has."""
    files = manifest["files"]
    own = (name for name in files if name.startswith(f"{split}.") and _is_trained(name))
    return digest_of({name: files[name] for name in own})


def _is_trained(name: str) -> bool:
    """Whether a file of a dataset decides what is trained on."""
    return name not in REPORTS and not _ASIDE & set(name.split(".")[1:])


def describe_files(
    files: Iterable[Path], known: Mapping[Path, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, by name; a checksum that is `known` is not made again."""
    ordered = sorted(files)
    with ThreadPoolExecutor() as threads:
        sums = threads.map(lambda file: known.get(file) or sha256_of(file), ordered)
        return {
            file.name: {"bytes": file.stat().st_size, "sha256": checksum}
            for file, checksum in zip(ordered, sums, strict=True)
        }


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into `folder`, with a digest of itself."""
    signed = {**manifest, "digest": digest_of(manifest)}
    text = json.dumps(signed, indent=2, ensure_ascii=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The manifest that was written into `folder`, without its digest.

    `DataError` if there is none, or it is of another format, or not as it was written.
    """
    file = folder / NAME
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest["format"]
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no packed dataset here (no {NAME}); make it with tools/preprocess.py, "
            "or mend data.packed"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: broken ({error}); {_AGAIN}") from None
    if "shard" in manifest:
        raise DataError(
            f"{folder}: a shard and no dataset; preprocess --merge {manifest.get('shards')} makes "
            "one of all shards"
        )
    if found != FORMAT:
        raise DataError(f"{file}: format {found}, expected {FORMAT}; {_AGAIN}")
    try:
        _Manifest.model_validate(manifest, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"])
        raise DataError(f"{file}: broken ({where}: {first['msg'].lower()}); {_AGAIN}") from None
    expected = manifest.pop("digest")
    if (digest := digest_of(manifest)) != expected:
        raise DataError(
            f"{file}: was changed (digest {digest}, expected {expected}); undo that, or {_AGAIN}"
        )
    return dict(manifest)


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, verify: bool) -> None:
    """Compare sizes, and with `verify` checksums, with what the manifest says of `files`."""
    for name, described in files.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file}: missing, but {NAME} names it; {_AGAIN}")
        size = file.stat().st_size
        if size != described["bytes"]:
            raise DataError(
                f"{file}: {size} bytes, expected {described['bytes']} ({NAME}); the file is "
                f"truncated or of another run; {_AGAIN}"
            )
    if not verify:
        return
    with ThreadPoolExecutor() as threads:
        sums = threads.map(sha256_of, [folder / name for name in files])
        for (name, described), found in zip(files.items(), sums, strict=True):
            if found != described["sha256"]:
                raise DataError(
                    f"{folder / name}: corrupt: SHA-256 {found}, expected {described['sha256']} "
                    f"({NAME}); {_AGAIN}"
                )
