"""manifest.json of a packed dataset: what made it, what is in it, and a checksum of every file."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcore_sft.data.errors import DataError

FORMAT = 2
NAME = "manifest.json"


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest_of(tree: Any) -> str:
    """SHA-256 of a JSON tree, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def describe_files(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, by name."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(files)
    }


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into `folder`."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a packed dataset; `DataError` if `folder` holds none that we can read."""
    file = folder / NAME
    if not file.is_file():
        raise DataError(
            f"{folder}: no packed dataset here (no {NAME}); make it with tools/preprocess.py, "
            "or mend data.packed"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: broken ({error}); run preprocess again with --overwrite"
        ) from None
    if found != FORMAT:
        raise DataError(
            f"{file}: format {found}, expected {FORMAT}; run preprocess again with --overwrite"
        )
    missing = {"splits", "files", "inputs", "fingerprint"} - manifest.keys()
    if missing:
        raise DataError(
            f"{file}: broken (no {', '.join(sorted(missing))}); "
            "run preprocess again with --overwrite"
        )
    return dict(manifest)


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, verify: bool) -> None:
    """Compare sizes, and with `verify` checksums, with what the manifest says of `files`."""
    for name, described in files.items():
        file = folder / name
        if not file.is_file():
            raise DataError(
                f"{file}: missing, but {NAME} names it; run preprocess again with --overwrite"
            )
        size = file.stat().st_size
        if size != described["bytes"]:
            raise DataError(
                f"{file}: {size} bytes, expected {described['bytes']} ({NAME}); the file is "
                "truncated or of another run; run preprocess again with --overwrite"
            )
        if verify and (found := sha256_of(file)) != described["sha256"]:
            raise DataError(
                f"{file}: corrupt: SHA-256 {found}, expected {described['sha256']} ({NAME}); "
                "run preprocess again with --overwrite"
            )
