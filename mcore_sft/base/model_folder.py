"""The files of a Hugging Face folder, whoever wrote it: read, or refused in one sentence.

config.json -> its value
*.safetensors (+ model.safetensors.index.json) -> which file holds which tensor
"""

import json
import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mcore_sft.base.errors import UserError
from mcore_sft.base.foreign import what_instead

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_bytes(path: Path) -> bytes:
    """Read a file; `UserError` if it cannot be, FileNotFoundError if it is not there."""
    require_fetched(path)
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """Parse a JSON file; errors as in `read_bytes`."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None


def require_fetched(path: Path) -> None:
    """Raise `UserError` if a file cannot be read, or a pointer or a web page stands in its place.

    Raises FileNotFoundError if it is not there.
    """
    try:
        path.open("rb").close()
        instead = what_instead(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if instead:
        raise UserError(f"{path}: this is {instead}")


def weight_files(folder: Path) -> dict[str, str]:
    """The name of each tensor -> its file; empty if the folder holds no weights.

    Of a single file beside an index the single file is read, as transformers does. `UserError` if
    what is there cannot be read.
    """
    if is_file(folder / SINGLE):
        return dict.fromkeys(open_weights(folder / SINGLE).keys(), SINGLE)
    index = folder / INDEX
    if not is_file(index):
        return {}
    read = read_json(index)
    files = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index}: not a readable index (no weight_map of names and files)")
    return files


def is_file(path: Path) -> bool:
    """Whether there is a file; `UserError` if that may not be known."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def open_weights(path: Path) -> Any:
    """Open a safetensors file; raises `UserError`."""
    try:
        require_fetched(path)  # safetensors says of whatever it may not read that it is not there
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(
            f"{path}: the index names this file, but it is missing; copy the model again"
        ) from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None


def stored_types(path: Path) -> dict[str, str]:
    """The name of each tensor of a safetensors file -> safetensors' name of its type."""
    opened = open_weights(path)
    return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
