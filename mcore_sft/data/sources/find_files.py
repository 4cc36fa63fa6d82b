"""The path of a source in, the files that it names out; what cannot be read is refused by name.

path | glob | hf://datasets/OWNER/NAME/PATH -> files, in order of name
"""

import glob
import os
import re
import shlex
import stat
from pathlib import Path
from urllib.parse import unquote

from mcore_sft.data.errors import DataError, first_line
from mcore_sft.data.sources.text_blocks import COMPRESSED

FORMS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".idx", ".bin")
"""Endings of the files that are read."""

_HUB = re.compile(
    r"(?:hf://)?(datasets/|spaces/|)([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?/(.+)"
)
_MAGIC = re.compile(r"[*?\[]")


def find_files(path: str, *, root: Path) -> list[Path]:
    """Files that `path` names, in order of name; none if it is the name of a Hugging Face dataset.

    What lies on the hub (hf://) is downloaded into its cache. `DataError` if the files cannot be
    found or read.
    """
    if path.startswith("hf://"):
        return _from_hub(path)
    _require_local(path)
    found = _local_files(path, root)
    if not found and _looks_like_files(path):
        raise DataError(
            f"source {path!r}: no such file ({(root / path).absolute()}). "
            "Fix: data.root, or the source's path" + _about_brackets(path)
        )
    for file in found:
        _require_name(file)
    return found


def _local_files(path: str, root: Path) -> list[Path]:
    kind = _kind(root / path)
    if kind is not None and stat.S_ISREG(kind):
        return [root / path]
    if kind is not None and stat.S_ISDIR(kind):
        raise DataError(
            f"source {path!r}: {root / path} is a folder; name its files, such as "
            f"{path.rstrip('/')}/{_usual_form(root / path)}"
        )
    if kind is not None or path == "-":
        raise DataError(
            f"source {path!r}: a pipe or a device, which can be read only once; sources are read "
            f"twice. Fix: write it to a file first: `cat {shlex.quote(path)} > rows.jsonl`"
        )
    before = "" if os.path.isabs(path) else glob.escape(str(root))
    pattern = os.path.join(before, path)
    _require_open(pattern, len(Path(before).parts))
    found = map(Path, glob.glob(pattern, recursive=True))
    return sorted(file for file in found if stat.S_ISREG(_kind(file) or 0))


def _kind(path: Path) -> int | None:
    """What stands there; None if there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:  # it holds a NUL, or half of a surrogate pair
        raise DataError(f"source {str(path)!r}: no name of a file; give another") from None


def _require_open(pattern: str, begin: int) -> None:
    """`DataError` if a glob may not look into a folder: it would pass over it without a word.

    The first `begin` parts of `pattern` are no pattern.
    """
    parts = Path(pattern).parts
    for end in range(max(1, begin), len(parts)):
        if not any(map(_MAGIC.search, parts[begin : end + 1])):
            continue
        for folder in glob.glob(os.path.join(*parts[:end]), recursive=True):
            try:
                if _MAGIC.search(parts[end]):
                    os.scandir(folder).close()
                else:
                    os.stat(os.path.join(folder, parts[end]))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _require_name(file: Path) -> None:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{file}: its name is not UTF-8. Fix: rename the file, or the folder"
        ) from None


def _looks_like_files(path: str) -> bool:
    """Whether `path` cannot be the name of a dataset, which is `owner/name` or `name`."""
    return (
        path.lower().endswith((*FORMS, *COMPRESSED))
        or path.startswith(("/", "."))
        or bool(_MAGIC.search(path))
    )


def _usual_form(folder: Path) -> str:
    """The glob of the files in a folder: of those of the form that most of them have."""
    endings = [Path(name).suffix.lower() for name in os.listdir(folder)]
    return "*" + max(FORMS[:6], key=endings.count)


def _about_brackets(path: str) -> str:
    return "; [ begins a pattern: write [[] for the character itself" if "[" in path else ""


def _require_local(path: str) -> None:
    """`DataError` for the address of another machine, with the command that copies from it."""
    scheme, separator, rest = path.partition("://")
    if not separator or not scheme.isalnum():
        return
    scheme = scheme.lower()
    folder, _, name = f"{scheme}://{rest}".rpartition("/")
    quoted = shlex.quote(f"{folder}/{name}")
    commands = {
        "s3": f"aws s3 cp {quoted} .",
        "gs": f"gcloud storage cp {quoted} .",
        "http": f"curl -fLO {quoted}",
        "https": f"curl -fLO {quoted}",
        "hdfs": f"hdfs dfs -get {quoted} .",
    }
    if scheme == "s3" and _MAGIC.search(name):
        pattern = shlex.quote(name)
        copy = f"aws s3 cp {shlex.quote(folder)}/ . --recursive --exclude '*' --include {pattern}"
        commands["s3"] = copy
    if scheme == "file":
        raise DataError(f"source {path!r}: give the path itself, {rest}")
    how = f": `{commands[scheme]}`" if scheme in commands else ""
    raise DataError(
        f"source {path!r}: {scheme}:// is not read. Fix: copy the files here first{how}, and give "
        "the path of the copy"
    )


def _from_hub(path: str) -> list[Path]:
    """Copies, in the hub's cache, of the files that `path` names."""
    from huggingface_hub import HfFileSystem

    if path.startswith("hf://buckets/"):
        raise DataError(
            f"source {path!r}: no bucket is read. Fix: copy the files here first: "
            f"`hf cp {shlex.quote(path)} .`, and give the path of the copy"
        )
    if not _HUB.fullmatch(path):
        raise DataError(
            f"source {path!r}: expected hf://datasets/OWNER/NAME/FILE, or a glob of files; a "
            "whole dataset is given by its name, path: OWNER/NAME"
        )
    try:
        names = sorted(HfFileSystem().glob(path)) if _MAGIC.search(path) else [path]
        found = [_download(name) for name in names]
    except Exception as error:  # each release has errors of its own
        raise DataError(
            f"source {path!r}: cannot be read from the hub ({first_line(error)})"
        ) from None
    if not found:
        raise DataError(f"source {path!r}: the hub has no such file. Fix: the source's path")
    return found


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = _HUB.fullmatch(name)
    assert parts is not None
    kind, owner_and_name, revision, file = parts.groups()
    return Path(
        hf_hub_download(
            owner_and_name,
            file,
            repo_type={"datasets/": "dataset", "spaces/": "space", "": "model"}[kind],
            revision=revision and unquote(revision),
        )
    )
